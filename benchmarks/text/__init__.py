"""The text suite: a MiniLM and, for each of several small text tasks, data to fine-tune it on.

`tasks.prepare_task("newsgroups")` fetches and splits into a cache (`CART_CACHE`, or
`~/.cache/cart-plugin`). The rooms:

- `splits`: train, validation and test without leaks, for texts
- `documents`, `dictionaries`, `passages`, `places`, `molecules`: texts from the downloads
- `tasks`: the table of tasks
- `backbone`: the pretrained encoder
"""
