# make demo   the quickstart           make test      the tests (make test-all: the long ones too)
# make bench  the benchmarks           make lint      ruff and mypy        make gpu   what needs a GPU
# make soak   kills, damages, full disks by the hundred: hours      make docs  the site, in site/
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
INSTALLED := .venv/.installed
DEMO_ARGS ?=
# tests are spread over processes by their files, each on one thread
WORKERS ?= 2
SPREAD := OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadfile
# waiting threads that spin take the core that others need; whoever set another policy is heard
export OMP_WAIT_POLICY ?= passive

.PHONY: setup demo test test-all soak bench docs lint format gpu clean

setup: $(INSTALLED)

# the extras hold everything the commands below need; a second run finds the stamp and installs nothing
$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(INSTALLED)

demo: setup
	$(BIN)/python -m exo.train $(DEMO_ARGS)

# The Triton kernels run for real in the second lane, on a CPU; TRITON_INTERPRET has to be set before triton is imported.
test: setup
	$(SPREAD) -m "not gpu and not slow"
	TRITON_INTERPRET=1 $(SPREAD) -m "kernel and not gpu and not slow"

test-all: setup
	$(SPREAD) -m "not gpu"
	TRITON_INTERPRET=1 $(SPREAD) -m "kernel and not gpu"

# hours; it goes on where it stopped
soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak

gpu: setup
	$(PYTEST) -m "gpu or kernel"

bench: setup
	$(PYTEST) benchmarks/

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

.venv/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell $$(git ls-files)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs build *.egg-info
