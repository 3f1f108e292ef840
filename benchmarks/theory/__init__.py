"""CART's theory on the suites' own models: its curves, and what its measures say of accuracy.

Modules, from the bottom: `inputs` (what the suites' encoders see), `merges` (what merges keep and
lose, measured), `language` (the language models' merges), `subsets` (sets of models that no rule
was made by), `foretold` (the table) and `predict` (the recorded merges measured), `geometry` (R, I,
and what centring does to I) and `curves` (the paper's figures), `ranks` (what names the best one),
and `cost`.
"""

REVISION = 2
"""Raised when what is measured here comes to be something else."""
