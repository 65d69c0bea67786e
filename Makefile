# One front door: `make demo`, `make test`, `make lint`, `make docs`, `make bench`. Each sets up what it needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
WORKERS ?= 2
# One thread a worker: two cores shared by two workers go faster than four threads that fight.
TEST := OMP_NUM_THREADS=1 PYTHONWARNINGS=default

.PHONY: demo test test-nightly test-oldest test-kernels test-isa lint format docs bench coverage corpus test-coverage fuzz fuzz-programs mutants long-run clean

demo: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py --output runs/quickstart

test: $(VENV)/.installed
	$(TEST) $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

# Each law on 200 random examples, where `make test` takes the same 15 every time. ARGS="tests/passes" for less.
test-nightly: $(VENV)/.installed
	$(TEST) $(BIN)/python -m pytest -n $(WORKERS) -m hypothesis --hypothesis-profile=nightly $(ARGS)

test-oldest: $(OLDEST)/.installed
	$(TEST) $(OLDEST)/bin/python -m pytest -n $(WORKERS) $(ARGS)

# Where products round in other ways, as on another processor: a test that compares bits of two ways to compute fails.
test-kernels: $(VENV)/.installed
	$(TEST) $(BIN)/python -m pytest -n $(WORKERS) -p tests.other_kernels $(ARGS)

# What compares bits, on several instruction sets, with one and two threads, on both versions of torch. Hours; ARGS="tests/passes" for less.
test-isa: $(VENV)/.installed $(OLDEST)/.installed
	.ci/instruction_sets $(BIN)/python $(OLDEST)/bin/python -- -n $(WORKERS) $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pre-commit validate-config
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The site, in build/site; every warning is an error.
docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/run.py

# Rows that are in benchmarks/results/coverage.json are kept; ARGS="--rerun" makes them anew, ARGS="--only 'timm/*'" picks.
coverage: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[coverage]'
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/coverage.py $(ARGS)

# Public models called in other ways than they were prepared from; docs/fuzzing.md. ARGS="--only 'timm/*'" picks.
corpus: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[coverage]'
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/corpus.py $(ARGS)

# Which lines and branches of pege_fx the tests reach, those of the processes they start too.
test-coverage: $(VENV)/.installed
	$(TEST) $(BIN)/coverage run -m pytest $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered

# Hours for all of it; ARGS="--only curves" or ARGS="--share 0.1" for less. The survivors are judged in docs/mutants.md.
mutants: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet 'cosmic-ray>=8.4'
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/mutants.py $(ARGS)

# 100,000 training steps, alone and watched; about twenty minutes.
long-run: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/long_run.py $(ARGS)

# Random networks through everything; docs/fuzzing.md. ARGS="--seed 17" makes one batch again.
MINUTES ?= 10
fuzz: fuzz-programs
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py --minutes $(MINUTES) --workers $(WORKERS) $(ARGS)

# Random Python around layers, called in other ways than it was prepared from: the model's answer, or an error.
# PROGRAM_ARGS="--seed 17" makes one again.
PROGRAMS ?= 1000
fuzz-programs: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/programs.py --programs $(PROGRAMS) $(PROGRAM_ARGS)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

# The oldest supported pair; the GPU world is often behind.
$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet 'torch==2.11.*' 'torchvision==0.26.*' -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
