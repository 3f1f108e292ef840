"""`python -m benchmarks.text`: merge methods of mergekit on eight text tasks."""

from benchmarks.text.suite import main

if __name__ == "__main__":
    main(prog_name="python -m benchmarks.text")
