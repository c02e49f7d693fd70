# Every target works from nothing but Python and a C++ compiler: it makes $(VENV), installs the package
# there (editable) and rebuilds the C++ extension where a source has changed.
#
#   make demo [IMAGE=photo.jpg]   segment a picture, with the speed and the parity beside it
#   make test                     the tests, but for the groups that it names at its end
#   make extras                   the tests of what the extras app, hub and ray bring, in an environment beside it
#   make bench                    the whole network (and bench.png), then every fused op, against torch
#   make sanitize                 the C++ kernels under AddressSanitizer, UBSan and ThreadSanitizer (GCC or Clang)
#   make lint                     ruff, clang-format, mypy, the contracts on imports
#   make docs                     the pages of docs/ in build/site, strictly: a broken link is an error
#   make clean                    remove what was built; $(VENV) stays
#
# PYTHON=python3.12 makes the environment with another Python. VENV=path uses an environment of your own;
# a torch that is installed there is kept. FASTSCNN_REQUIRE_CPU=0 goes on where the C++ build fails. Where
# there is nvcc, the CUDA extension is built for the GPUs of this machine, or else for compute capability 8.0
# (TORCH_CUDA_ARCH_LIST says otherwise, FASTSCNN_CUDA=0 leaves it out).

PYTHON ?= python3
VENV ?= .venv
export FASTSCNN_REQUIRE_CPU ?= 1

gpus := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u)
export TORCH_CUDA_ARCH_LIST ?= $(or $(gpus),8.0+PTX)

python := $(VENV)/bin/python
constraints := $(VENV)/fastscnn-constraints.txt
installed := $(VENV)/fastscnn-installed
installed_dev := $(VENV)/fastscnn-installed-dev
installed_bench := $(VENV)/fastscnn-installed-bench
installed_docs := $(VENV)/fastscnn-installed-docs
beside := $(VENV)-extras
installed_extras := $(beside)/fastscnn-installed
built := $(VENV)/fastscnn-built
csrc := $(shell find csrc -type f -not -name '*.md')
install := $(python) -m pip install --disable-pip-version-check -c $(constraints)

.PHONY: demo test extras bench sanitize lint docs clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: $(installed) $(built)
	$(python) -m fastscnn_fast demo $(if $(IMAGE),"$(IMAGE)")

test: $(installed_dev) $(built)
	$(python) -m pytest

extras: $(installed_extras) $(built)
	$(beside)/bin/python -m pytest -m "not gpu" --durations=5 tests/checkpoints/test_hub.py tests/cli/test_app.py \
	  tests/packaging/test_examples.py tests/runtime/test_cluster.py

bench: $(installed_bench) $(built)
	$(python) -m fastscnn_fast bench
	$(python) -m pytest benchmarks --benchmark-only

sanitize:
	$(MAKE) -j$(shell nproc 2>/dev/null || echo 1) -f tests/sanitize/Makefile

lint: $(installed_dev)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(csrc) tests/sanitize/driver.cpp
	$(python) -m mypy
	$(VENV)/bin/lint-imports

docs: $(installed_docs)
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict

clean:
	rm -rf build dist demo_out bench.png *.egg-info fastscnn_fast/_c*.so
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f $(VENV)/fastscnn-* $(installed_extras)

$(python):
	$(PYTHON) -m venv $(VENV)

$(constraints): constraints.txt | $(python)
	@torch=$$($(python) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
	  2>/dev/null); sed "s/^torch==.*/$${torch:-&}/" constraints.txt > $@

$(installed) $(installed_dev) $(installed_bench) $(installed_docs): $(constraints) pyproject.toml setup.py
	$(install) setuptools pybind11
	$(install) --no-build-isolation -e .$(extras)
	@touch $@ $(installed) $(built)

$(installed_dev): extras := [dev]
$(installed_bench): extras := [dev,bench]
$(installed_docs): extras := [docs]

# Gradio wants an older Pillow than the tests: it gets one where only these tests see it, beside all that $(VENV) has.
$(installed_extras): $(installed_dev)
	$(python) -m venv --clear $(beside)
	@$(python) -c 'from sysconfig import get_path; print("import site; site.addsitedir(%r)" % get_path("purelib"))' \
	  > $$($(beside)/bin/python -c 'from sysconfig import get_path; print(get_path("purelib"))')/borrowed.pth
	sed '/^pillow/d' $(constraints) > $(beside)/constraints.txt
	$(beside)/bin/python -m pip install --disable-pip-version-check -c $(beside)/constraints.txt \
	  'fastscnn_fast[app,hub,ray]'
	@touch $@

$(built): $(csrc) setup.py | $(installed)
	$(python) setup.py --quiet build_ext --inplace
	@touch $@
