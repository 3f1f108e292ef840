"""`python -m benchmarks.compression`: accuracy against bytes."""

from benchmarks.compression.suite import main

if __name__ == "__main__":
    main(prog_name="python -m benchmarks.compression")
