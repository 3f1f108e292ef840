"""Merging models of the paper's size: seconds and memory of FusionBench's methods and ours.

`python -m benchmarks.paper_size` (`make bench-paper-size`). The rooms:

- `spectra`: how fine-tuning's differences decay in the suites' encoders, measured once
- `models`: random models of the paper's architectures, with differences that decay so
- `suite`, `report`: a process of `fusion_bench` a method, and the table
"""
