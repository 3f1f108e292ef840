"""Tests and benchmarks on a CUDA GPU: `make bench-gpu`."""
