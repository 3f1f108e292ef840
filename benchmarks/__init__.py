"""Benchmarks of cart-plugin on real models and data, through what its users have, nothing more.

The suites are `vision`, `text` and `llm`. What they share:

- `cache`: where things are kept; folders that appear whole or not at all
- `sources`: downloads from PyPI, npm and Debian
- `splits`: train, validation and test without leaks
- `tasks`: tables of tasks, and their data in the cache
- `training`: the loop that fine-tunes, in processes of one thread
- `comparison`: `mergekit-cart compare` on a suite (`text` and `llm`)
"""
