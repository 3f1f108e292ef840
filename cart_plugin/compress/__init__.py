"""T models into one base and T adapters, and back: CART-Indexing of whole checkpoints.

::

    from cart_plugin.compress import compress, expand, load_peft, load_task, task_tensors, tasks

    compress(["mistral-math", "mistral-code", "mistral-german"], "served", rank_ratio=0.04)
    tasks("served")                                      # the adapters' names
    weights = load_task("served", "mistral-math")        # one task's state dict
    for name, tensor in task_tensors("served", "mistral-math"): ...     # a tensor at a time
    expand("served", "mistral-math", "mistral-math-again")              # its full checkpoint
    model = load_peft("served")                          # PEFT's model with all adapters

Modules, from the bottom: `ranks` (of all tensors and tasks), `layers` (how a tensor can be held),
`assigning` (what becomes of each), `peft_files` (how PEFT wants it), `trial_inputs`, `miniature`,
`trial` and `rehearsal` (whether PEFT works with it), `report`, `work` (what the steps share),
`base` and `adapters` (the steps), `run` (all of it), `expansion` (the way back), `loading` (in
PEFT).
"""

from cart_plugin.compress.expansion import expand, load_task, task_tensors, tasks
from cart_plugin.compress.loading import load_peft
from cart_plugin.compress.run import compress

__all__ = ["compress", "expand", "load_peft", "load_task", "task_tensors", "tasks"]

REVISION = 2
"""Raised when the numbers that come out of this room change by more than rounding, or their cost:
what was measured or merged with another revision is then done anew. Not for moved files."""
