"""`python -m benchmarks.solvers`: truncated SVDs side by side."""

from benchmarks.solvers.suite import main

if __name__ == "__main__":
    main(prog_name="python -m benchmarks.solvers")
