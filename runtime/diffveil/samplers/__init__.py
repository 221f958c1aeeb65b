"""Samplers as coefficient tables; `diffveil.sampling.run` runs any of them.

Here: `table` what a table is; `nodes` which timesteps are visited; and one module a family.
"""

from diffveil.samplers.bdia import bdia, bdia_inversion
from diffveil.samplers.belm import o_belm, o_belm_inversion
from diffveil.samplers.consistency import lcm, tcd
from diffveil.samplers.ddim import ddim, ddim_inversion, retrace
from diffveil.samplers.dpm import dpm_solver
from diffveil.samplers.nodes import SPACINGS, Spacing
from diffveil.samplers.table import SamplerTable, Step

__all__ = [
    "SPACINGS",
    "SamplerTable",
    "Spacing",
    "Step",
    "bdia",
    "bdia_inversion",
    "ddim",
    "ddim_inversion",
    "dpm_solver",
    "lcm",
    "o_belm",
    "o_belm_inversion",
    "retrace",
    "tcd",
]
