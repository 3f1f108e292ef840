"""Benchmarks of cart-plugin on real models and data, through what its users have, nothing more.

`README.md` says what each one asks and found. A folder each: `demo`, `solvers`, `speed`, `vision`,
`text`, `llm`, `auto` and `compression`; `suites` gives the encoders of `vision` and `text` to the
last two, `common` what all share.
"""
