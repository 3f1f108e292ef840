"""CART's theory on the suites' own models: its curves, and what its measures say of accuracy."""

REVISION = 1
"""Raised when what is measured here comes to be something else."""
