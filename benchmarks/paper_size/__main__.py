"""`python -m benchmarks.paper_size`: merges of models of the paper's size."""

from benchmarks.paper_size.suite import main

if __name__ == "__main__":
    main(prog_name="python -m benchmarks.paper_size")
