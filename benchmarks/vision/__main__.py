"""`python -m benchmarks.vision`: merging methods on eight image tasks."""

from benchmarks.vision.suite import main

if __name__ == "__main__":
    main(prog_name="python -m benchmarks.vision")
