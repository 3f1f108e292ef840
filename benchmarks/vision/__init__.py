"""The vision suite: a ViT-S/14 and copies of it, each fine-tuned on a small image task.

`python -m benchmarks.vision.prepare --tasks mnist,thai --seed 0` fetches, renders and fine-tunes
into a cache (`CART_CACHE`, or `~/.cache/cart-plugin`). The rooms, in the order in which they are
used:

- `splits`: train, validation and test without leaks, for images
- `digits`, `glyphs`, `icons`: pictures from those downloads
- `tasks`: the table of tasks
- `backbone`: the pretrained encoder
- `heads`, `finetune`: prototype heads and one fine-tuned encoder a task
- `evaluate`: accuracy of an encoder folder
"""
