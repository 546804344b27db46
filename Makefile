VENV ?= .venv
PYTHON ?= python3
# Python compiles the modules that are used, when they are: pip would compile every one, a minute more.
INSTALL = $(VENV)/bin/python -m pip install --quiet --no-compile
# torch is pinned and installed first: a range would let pip choose a build with gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0
# The ends of the supported ranges (apack_compile/supported_versions.py).
# Triton 3.6, of that torch, interprets kernels with numpy before 2.4 only.
OLDEST = TORCH=torch==2.11.0 EXTRA_PINS="transformers==5.17.0 numpy==2.3.5"
NEWEST = TORCH=torch==2.15.0 EXTRA_PINS=transformers==5.24.0
DEFAULT = EXTRA_PINS=transformers==5.24.0
# What depends on torch and transformers most: a few minutes.
MATRIX_TESTS = tests/test_supported_versions.py tests/test_sensitivity.py tests/models/test_cache_argument.py \
	tests/models/test_errors.py tests/models/test_compile.py tests/generate/test_modes.py tests/generate/test_drafts.py \
	tests/cache tests/backend/test_own_cache.py tests/export/test_transformers.py tests/kernels/test_operations.py
# What a change needs first: under two minutes on two cores.
FAST_TESTS = $(filter-out tests/test_wheel.py,$(wildcard tests/test_*.py)) tests/docs/test_pages.py tests/cache/test_cache.py \
	tests/cache/test_crop.py tests/plan_file/test_plan_file.py tests/plan_file/test_plan_file_refusals.py \
	tests/models/test_errors.py tests/models/test_cache_argument.py tests/models/test_layer_kinds.py \
	tests/passes/test_attention.py tests/passes/test_sites.py tests/passes/test_cache_updates.py tests/passes/test_pack_buffers.py \
	tests/passes/test_share_heads.py tests/kernels/test_native.py tests/kernels/test_append_at.py tests/kernels/test_append_cpu.py \
	tests/kernels/test_attend_cpu.py tests/kernels/test_unpack_cpu.py tests/presets/test_presets.py
STAMP = $(VENV)/.apack-installed
# Two workers with one thread each beat one worker with two threads on small models.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -P -m pytest -n 2 --dist worksteal
TESTS ?= tests

.PHONY: install demo test test-fast test-models test-oldest test-matrix matrix-column lint format docs wheel-test clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py requirements-assets.txt $(wildcard kernels/csrc/*)
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 15), "Python 3.11 to 3.14 is needed"'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) "$(TORCH)"
	$(INSTALL) $(EXTRA_PINS) -e ".[quant,demo,dev,docs]"
	$(INSTALL) --no-deps -r requirements-assets.txt
	touch $@

demo: install
	$(VENV)/bin/apack-compile demo

test: install
	$(PYTEST) $(TESTS)

test-fast: install
	$(PYTEST) $(FAST_TESTS)

# Every model type of transformers; docs/support.md is written anew where all of them do as expected.
test-models: install
	rm -rf build/support
	$(PYTEST) tests/models/test_matrix.py --every-model --results=build/support
	PYTHONPATH=tests/support $(VENV)/bin/python -P -m matrix.table build/support docs/support.md

test-oldest:
	$(MAKE) test VENV=.venv-matrix/oldest $(OLDEST)

# The oldest, the default and the newest versions, each in an environment of its own; writes the table of docs/support.md.
test-matrix:
	$(MAKE) matrix-column COLUMN=oldest $(OLDEST)
	$(MAKE) matrix-column COLUMN=default $(DEFAULT)
	$(MAKE) matrix-column COLUMN=newest $(NEWEST)

# One column, also of another Python: make matrix-column COLUMN=python-3.13 PYTHON=python3.13
matrix-column: VENV = .venv-matrix/$(COLUMN)
matrix-column:
	$(MAKE) install VENV=$(VENV)
	mkdir -p build/matrix
	$(PYTEST) $(MATRIX_TESTS) --junitxml=build/matrix/$(COLUMN).xml; status=$$?; \
	$(VENV)/bin/python -P tests/support/matrix/versions.py $(COLUMN) build/matrix/$(COLUMN).xml && exit $$status

# mypy and the import contract see the packages under the names they are imported by.
lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	rm -rf build/types && mkdir -p build/types
	cp -r apack_compile build/types && cp -r passes kernels build/types/apack_compile
	cd build/types && $(abspath $(VENV))/bin/lint-imports $(CURDIR)/pyproject.toml
	MYPYPATH=build/types $(VENV)/bin/mypy -p apack_compile

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The pages in build/site; a broken link, a missing page or an unknown name is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -P -m mkdocs build

wheel-test: install
	VENV=$(abspath $(VENV)) bash .ci/wheel-test

clean:
	rm -rf kernels/_native* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
