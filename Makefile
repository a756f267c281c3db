# make demo   the embedded zoo, decoding        make lint    ruff      (ARGS="..." goes to hedgespec demo)
# make test   the tests a laptop can run        make clean   everything these targets made
#
# Everything happens in $(VENV), made once; an installation is repeated only when what it is made from has changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
INGREDIENTS := pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*) $(wildcard triton_kernels/__init__.py)

.PHONY: demo test lint clean

demo: $(VENV)/.installed-zoo
	$(BIN)/hedgespec demo $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu and not vllm"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks hedgespec/_native*.so

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
