"""What fine-tuning did to the weights of several models, and what a merge of them will lose.

Modules, from the bottom: `inputs` (what weights are multiplied by), `weights` (what T models make
of one weight, in factors), `weighting` (how much each counts), `places` (where a weight is),
`measures` (the record of it), `state_dicts` (models in memory), `watching` and `activations` (what
models see), `sources` (models on the disk), of which there are `factors` (adapters), `fused` (a
base and an adapter) and `whole`, `models` (finds them), `journal` (records of a run that may be cut
off), `summary` (what all records come to), `advice`, `page`, `report`, and `run`, which does all of
it.
"""

from cart_plugin.checkpoints.orientation import turned_parameters
from cart_plugin.inspect.run import inspect_models
from cart_plugin.inspect.state_dicts import inspect_state_dicts

__all__ = ["inspect_models", "inspect_state_dicts", "turned_parameters"]
