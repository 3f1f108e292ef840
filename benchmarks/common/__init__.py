"""What several benchmarks share.

- `cache`: where things are kept; folders that appear whole or not at all
- `sources`: downloads from PyPI, npm and Debian
- `splits`: train, validation and test without leaks
- `tasks`: tables of tasks, and their data in the cache
- `heads`, `training`: prototype heads, and what fine-tunes one model a task, once
- `recipes`: merges by the real `mergekit-yaml`
- `measure`: commands, and what they needed
- `provenance`, `record`: where figures come from, and whether they still hold
- `commands`, `tables`, `colors`: options, progress bars, tables, plots
- `comparison`: `mergekit-cart compare` on a suite (`text` and `llm`)
"""
