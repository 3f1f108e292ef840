"""The vision suite: a ViT-S/14 and copies of it, each fine-tuned on a small image task.

`python -m benchmarks.vision` (`make bench-vision`) compares merging methods on eight tasks;
`python -m benchmarks.vision.prepare --tasks mnist,thai --seed 0` only fetches, renders and
fine-tunes into a cache (`CART_CACHE`, or `~/.cache/cart-plugin`). The rooms, in the order in which
they are used:

- `splits`: train, validation and test without leaks, for images
- `digits`, `glyphs`, `icons`: pictures from those downloads
- `tasks`: the table of tasks
- `backbone`: the pretrained encoder
- `heads`, `finetune`, `strength`: prototype heads and one fine-tuned encoder a task
- `evaluate`, `evaluator`: accuracy of an encoder folder
- `pool`, `extra`: the suite as FusionBench sees it, and what FusionBench lacks
- `methods`, `program`, `jobs`, `run`: what is merged, how, and in which order
- `results`, `report`, `plots`, `suite`: from a finished run to the table and the plots
"""
