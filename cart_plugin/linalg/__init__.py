"""Matrices in, factors out: truncated singular value decompositions and what they rest on.

Modules, from the bottom: `precision`, `rules` (how many directions), `factors` (what comes out),
`gram`, `krylov` and `subspace` (the solvers), `spectra` (values without vectors), `svd` (one
function for all solvers); `threads` (several matrices at a time). Nothing here knows of models,
names or files.
"""

REVISION = 1
"""Raised when the numbers that come out of this room change by more than rounding, or their cost:
what was measured or merged with another revision is then done anew. Not for moved files."""
