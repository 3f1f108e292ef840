"""`python -m benchmarks.gpu`: what there is to run on a GPU."""

from benchmarks.gpu.run import main

if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gpu")
