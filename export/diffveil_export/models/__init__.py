"""Loaders: one module a family of source models. Each ends in `Components`."""
