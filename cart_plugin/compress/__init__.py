"""CART-Indexing of whole checkpoints: one common base, and a standard PEFT adapter a task.

The public functions are re-exported by `cart_plugin.indexing`. Modules, from the bottom:
`checkpoints` (reading), `writing`, `side_files` (tokenizers and the like), `names` (the
checkpoint's and the model's), `layers` (what becomes of each tensor), `peft_files` (how PEFT wants
it), `report`, `work` (what the steps share), `base` and `adapters` (the steps), `run` (all of it),
`expand` (the way back).
"""
