"""`python -m benchmarks.convolutions`: merges of EfficientNets."""

from benchmarks.convolutions.suite import main

if __name__ == "__main__":
    main(prog_name="python -m benchmarks.convolutions")
