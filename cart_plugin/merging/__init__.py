"""The tensors of T models in, one tensor out.

Modules, from the bottom: `tensors` (what is decomposed, and as which matrices), `inputs` (checks),
`normal_equations` (sums over tasks), `least_interference` (`cart_auto`) and `informed` (the same
with a base model), `settings`, `kept` (how much of the differences), `cart` (the method),
`state_dicts` (whole models), `indexing` (CART-Indexing of one tensor), `directions` (a merge by
singular directions, to be adapted), `spans` (models that differ by low rank, from their factors)
and `span_measures` (what is kept of them).
"""

REVISION = 6
"""Raised when the numbers that come out of this room change by more than rounding, or their cost:
what was measured or merged with another revision is then done anew. Not for moved files."""
