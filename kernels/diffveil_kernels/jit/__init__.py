"""The kernels as Triton sources. Importing a module of this package needs Triton.

Only built-in functions of `triton.language` are used, none of its own jitted ones (`tl.sum`,
`tl.zeros`, …): those can be interpreted only if Triton was imported for interpretation, which a
process cannot know of other packages.
"""
