"""CART's theory on the suites' own models: its curves, and what its measures say of accuracy.

Modules, from the bottom: `inputs` (what the suites' models see), `merges` (what merges keep and
lose, measured), `subsets` (sets of models that no rule was made by), `predict` (the recorded merges
measured, and `foretold`, the table of it), `settings` (methods at other settings, and whether the
curves name a rank), `curves` (the paper's figures) and `cost`.
"""

REVISION = 2
"""Raised when what is measured here comes to be something else."""
