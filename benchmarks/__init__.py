"""Benchmarks of cart-plugin on real models and data, through what its users have, nothing more."""
