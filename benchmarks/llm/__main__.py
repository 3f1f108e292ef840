"""`python -m benchmarks.llm`: merge methods of mergekit on a language model."""

from benchmarks.llm.suite import main

if __name__ == "__main__":
    main(prog_name="python -m benchmarks.llm")
