"""Truncated SVDs: time and error of the solvers, and what the faster one does to merges."""
