# make demo   the quickstart     make test   the tests; make test-all adds the slow ones     make gpu   the GPU tests
# make bench  all benchmarks     make lint   ruff, mypy and codespell                        make docs  the site, in site/
# make soak   hundreds of kills, damaged files and full disks: takes hours
# make against REV=v0.1.0  time, memory and accuracy of this tree beside those of another revision
# make nightly  what CI runs every night: test-all, and against the last release
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
INSTALLED := .venv/.installed
DEMO_ARGS ?=
# pytest-xdist runs the files of tests on two processes, each with one thread
WORKERS ?= 2
SPREAD := OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# a waiting thread must not spin: it would take the core that another process needs
export OMP_WAIT_POLICY ?= passive

# the last release; the parent of the newest commit if there is none
REV ?= $(shell git describe --tags --abbrev=0 HEAD~1 2>/dev/null || echo HEAD~1)

.PHONY: setup demo test test-all soak bench against nightly docs lint format gpu clean

setup: $(INSTALLED)

# the extra `test` has everything that the commands below need; the stamp keeps a second run from installing again
$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(INSTALLED)

demo: setup
	$(BIN)/python -m exo.train $(DEMO_ARGS)

# The second lane runs the Triton kernels on a CPU; TRITON_INTERPRET must be set before triton is imported.
test: setup
	$(SPREAD) -m "not gpu and not slow"
	TRITON_INTERPRET=1 $(SPREAD) -m "kernel and not gpu and not slow"

test-all: setup
	$(SPREAD) -m "not gpu"
	TRITON_INTERPRET=1 $(SPREAD) -m "kernel and not gpu"

# a second call continues where the first one stopped
soak: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak

gpu: setup
	$(PYTEST) -m "gpu or kernel"

# 45 minutes: every case and peer, then the pictures and the figures in the pages, whatever the guard says
bench: .venv/.peers
	-$(PYTEST) benchmarks/ --full --allocator default --results
	-$(PYTEST) benchmarks/test_logits.py benchmarks/test_linear.py --full --results -k "half or D512"
	$(BIN)/python -m benchmarks.figures
	$(BIN)/python -m benchmarks.publish

.venv/.peers: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[peers]'
	touch $@

against: setup
	$(BIN)/python -m benchmarks.against $(REV)

nightly:
	$(MAKE) test-all
	$(MAKE) against

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
