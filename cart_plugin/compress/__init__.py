"""CART-Indexing of whole checkpoints: one averaged base, and a standard PEFT adapter a task.

The public functions are re-exported by `cart_plugin.indexing`. Modules, in the order of the work:
`checkpoints` (reading), `names` (a checkpoint's names and the model's), `layers` (what becomes of
each tensor), `peft_files` (how PEFT wants it), `ranks`, `writing`, `run` (all of it), `report`,
`expand` (the way back).
"""
