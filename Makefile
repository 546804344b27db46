VENV ?= .venv
PYTHON ?= python3
PIP = $(VENV)/bin/python -m pip
# torch is pinned and installed first: a range would let pip choose a build with gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0
OLDEST_TRANSFORMERS = 5.17.0
OLDEST_VENV = .venv-oldest
STAMP = $(VENV)/.apack-installed
# Two workers with one thread each beat one worker with two threads on small models.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -P -m pytest -n 2 --dist worksteal
TESTS ?= tests

.PHONY: install demo test test-models test-oldest lint format wheel-test clean

install: $(STAMP)

$(STAMP): pyproject.toml requirements-assets.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), "Python 3.11 to 3.13 is needed"'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet $(EXTRA_PINS) -e ".[quant,demo,dev]"
	$(PIP) install --quiet --no-deps -r requirements-assets.txt
	touch $@

demo: install
	$(VENV)/bin/apack-compile demo

test: install
	$(PYTEST) $(TESTS)

# Every model type of transformers; docs/support.md is written anew where all of them do as expected.
test-models: install
	rm -rf build/support
	$(PYTEST) tests/models/test_matrix.py --every-model --results=build/support
	$(VENV)/bin/python -P tests/models/matrix/table.py build/support docs/support.md

test-oldest:
	$(MAKE) test VENV=$(OLDEST_VENV) EXTRA_PINS="transformers==$(OLDEST_TRANSFORMERS)"

# mypy sees the packages under the names they are imported by.
lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	rm -rf build/types && mkdir -p build/types/apack_compile
	ln -s $(CURDIR)/apack_compile/* $(CURDIR)/passes $(CURDIR)/kernels build/types/apack_compile/
	MYPYPATH=build/types $(VENV)/bin/mypy -p apack_compile

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

wheel-test: install
	VENV=$(abspath $(VENV)) bash .ci/wheel-test

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
