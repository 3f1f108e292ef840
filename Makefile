# `make` or `make help` lists the targets. Everything runs in .venv, which each target sets up if need be.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
SERVERS := .venv-servers

# Python keeps what it has compiled, also where the system says otherwise (as many container images do): compiling all that
# a command imports takes longer than all the rest of its start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv test test-all test-servers lint format demo bench-startup bench-memory bench-distributed bench-solvers bench-threads bench-merge bench-gpu bench-accuracy bench-profile bench-vision bench-text bench-llm bench-auto bench-compress bench-adapters bench-theory bench-architectures bench-paper-size bench-twenty bench-convolutions readme dist clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

venv: $(STAMP) ## set up .venv with the package (editable) and all it is tested with

# torch first: resolved alone, it takes the exact build that the constraints name before anything else asks for one.
# Nothing is compiled ahead: Python compiles what it imports, a fraction of what is installed.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile -c constraints.txt torch
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[fusion-bench,lm-eval,ray,benchmarks,dev]'
	touch $@

# Two processes: a test uses one thread.
test: $(STAMP) ## the tests, without the slow ones
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: $(STAMP) ## the tests, slow ones included
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not servers'

test-servers: $(STAMP) $(SERVERS)/.installed ## adapters in vLLM, SGLang and llama.cpp, in an environment of their own (15 min)
	$(BIN)/python -m pytest -m servers tests/servers

# vLLM's CPU build brings torch's, beside which PyPI's torchvision and the like fail to load. llama.cpp's converters are in
# the source distribution of its bindings, which is not built: another package has the run time.
$(SERVERS)/.installed: $(wildcard tests/servers/*.txt)
	test -x $(SERVERS)/bin/python || $(PYTHON) -m venv $(SERVERS)
	$(SERVERS)/bin/python -m pip install --no-compile -r tests/servers/requirements.txt
	$(SERVERS)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	$(SERVERS)/bin/python -m pip install --no-compile --no-deps -r tests/servers/alone.txt
	$(SERVERS)/bin/python -m pip download --no-deps --no-binary :all: --dest $(SERVERS)/sources -r tests/servers/sources.txt
	mkdir -p $(SERVERS)/llama.cpp
	tar -xzf $(SERVERS)/sources/llama_cpp_python-*.tar.gz -C $(SERVERS)/llama.cpp --strip-components=3 --wildcards \
		'*/vendor/llama.cpp/convert_*_to_gguf.py' '*/vendor/llama.cpp/conversion/*' '*/vendor/llama.cpp/gguf-py/*'
	touch $@

lint: $(STAMP) ## ruff (rules and format), mypy, and which room may import which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## let ruff format and fix what it can
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

demo: $(STAMP) ## fine-tune, merge and evaluate a small vision suite, and print the table
	$(BIN)/python -m benchmarks.demo.run

bench-startup: $(STAMP) ## what the import hook adds to the start of every Python
	$(BIN)/python -m benchmarks.speed.startup

bench-memory: $(STAMP) ## time and peak memory of mergekit-yaml with cart, beside other methods
	$(BIN)/python -m benchmarks.speed.memory

bench-distributed: $(STAMP) ## merges by several workers beside mergekit-yaml, four models of 1.2 B parameters (17 GB of disk)
	$(BIN)/python -m benchmarks.speed.distributed
	$(BIN)/python -m benchmarks.speed.estimate

bench-solvers: $(STAMP) ## truncated SVDs: time and error of cart's solvers and of others (25 min)
	$(BIN)/python -m benchmarks.solvers

bench-threads: $(STAMP) ## what threads do to merges of small matrices, on a quiet machine and a busy one (5 min)
	$(BIN)/python -m benchmarks.solvers.threads

bench-gpu: $(STAMP) ## the core's tests, solvers and merges on a CUDA GPU (8 min; needs a torch with CUDA in .venv)
	$(BIN)/python -m benchmarks.gpu

bench-profile: $(STAMP) ## where the fast solver's time goes, and its floor
	$(BIN)/python -m benchmarks.solvers.profile

bench-merge: $(STAMP) ## whole merges: cart beside other methods, and how its time grows (30 min)
	$(BIN)/python -m benchmarks.speed.merges

bench-accuracy: $(STAMP) ## accuracy of the demo's merges by cart with svd exact and fast
	$(BIN)/python -m benchmarks.solvers.fast_accuracy

bench-vision: $(STAMP) ## 26 merging methods on eight image tasks, tuned alike (hours; from cached encoders one less)
	$(BIN)/python -m benchmarks.vision

bench-text: $(STAMP) ## merge methods of mergekit on eight text tasks, by mergekit-cart compare
	$(BIN)/python -m benchmarks.text

bench-llm: $(STAMP) ## merge methods of mergekit on a language model, by mergekit-cart compare and lm-eval
	$(BIN)/python -m benchmarks.llm

bench-auto: $(STAMP) ## CART without hyperparameters: variants on validation splits, then other tasks and models (hours; goes on where it stopped)
	$(BIN)/python -m benchmarks.auto.search
	$(BIN)/python -m benchmarks.auto.study --gentle
	$(BIN)/python -m benchmarks.auto.number
	$(BIN)/python -m benchmarks.auto.adapters
	$(BIN)/python -m benchmarks.auto.low_rank
	$(BIN)/python -m benchmarks.auto.carry
	$(BIN)/python -m benchmarks.auto.cost

bench-compress: $(STAMP) ## eight encoders as base and adapters beside other ways to store them, and what that costs (an hour)
	$(BIN)/python -m benchmarks.compression
	$(BIN)/python -m benchmarks.compression.speed

bench-adapters: $(STAMP) ## LoRA adapters merged into one: what is left of them, and what it costs, beside PEFT and others (hours)
	$(BIN)/python -m benchmarks.adapters.speed
	$(BIN)/python -m benchmarks.adapters.accuracy
	$(BIN)/python -m benchmarks.adapters.cost
	$(BIN)/python -m benchmarks.adapters.exact

bench-theory: $(STAMP) ## the theory's curves on the suites' models, and whether measures of the weights foretell accuracy (hours; after bench-vision, -llm and -auto)
	$(BIN)/python -m benchmarks.theory.curves
	$(BIN)/python -m benchmarks.theory.subsets
	$(BIN)/python -m benchmarks.theory.predict
	$(BIN)/python -m benchmarks.theory.ranks
	$(BIN)/python -m benchmarks.theory.cost

bench-architectures: $(STAMP) ## which architectures merge whole, by mergekit-yaml and by mergekit-cart merge (ten minutes)
	$(BIN)/python -m benchmarks.architectures

bench-paper-size: $(STAMP) ## merges of 8, 14 and 20 random models of the paper's size by FusionBench: time and memory (hours; 25 GB of disk)
	$(BIN)/python -m benchmarks.paper_size

bench-twenty: $(STAMP) ## up to twenty image tasks merged: accuracy by rank, and by the number of tasks (hours)
	$(BIN)/python -m benchmarks.twenty

bench-convolutions: $(STAMP) ## four EfficientNets merged, their kernels decomposed or averaged
	$(BIN)/python -m benchmarks.convolutions

readme: $(STAMP) ## copy result tables into README.md and docs/
	$(BIN)/python -m benchmarks.readme

# No isolation: what builds it is pinned and installed already, and nothing is fetched.
dist: $(STAMP) ## build sdist and wheel, check them, and try the wheel in a fresh environment
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python .ci/try_wheel.py dist/*.whl

clean: ## remove .venv, builds and caches of this folder (not the benchmarks' cache)
	rm -rf .venv $(SERVERS) dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
