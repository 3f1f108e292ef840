"""The text suite: a MiniLM and, for each of several small text tasks, data to fine-tune it on.

`python -m benchmarks.text` (`make bench-text`) compares merge methods of mergekit on eight tasks;
`tasks.prepare_task("newsgroups")` fetches and splits into a cache (`CART_CACHE`, or
`~/.cache/cart-plugin`). The rooms:

- `splits`: train, validation and test without leaks, for texts
- `documents`, `dictionaries`, `passages`, `places`, `molecules`: texts from the downloads
- `tasks`: the table of tasks
- `backbone`, `encoder`, `finetune`: the pretrained encoder, and one fine-tuned copy a task
- `evaluator`, `suite`: accuracy of an encoder folder, and the comparison
"""
