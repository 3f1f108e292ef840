"""What several benchmarks share: data, training, merges, measurements and records."""
