# `make demo` and `make test` are all a newcomer needs: each makes .venv and installs the project into it first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT_DIR ?= benchmarks/results

.PHONY: demo test lint gpu-check clean

# The stamp is remade when the requirements or this file change, so a pull never leaves an old environment behind.
$(VENV)/.installed: setup.py pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "medtrain needs Python 3.11 or newer; found $$($(PYTHON) --version). Say: make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# The tests against peers (TRL, Liger) need the peers; they need Triton, so elsewhere those tests skip.
$(VENV)/.installed-peers: $(VENV)/.installed
	[ "$$(uname)" != Linux ] || $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,bench]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/medtrain demo

test: $(VENV)/.installed-peers
	$(BIN)/python -m pytest

# What to run between two edits, in a minute: the kernels (of the Triton path, which an interpreter runs here, a sample),
# the data and the configurations.
.PHONY: test-fast
test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 tests/kernels tests/trainer/test_data_*.py tests/trainer/test_config.py tests/test_configs.py \
		-k 'not test_triton or odd_shapes or strided'

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# On a machine with a CUDA device: the op's tests and the quick benchmark; the two limits keep it under 8 minutes. Installs
# nothing and needs no network: $(PYTHON) has torch, triton, transformers, pytest. The benchmark runs after failing tests too.
gpu-check: PYTHON := $(if $(filter file default,$(origin PYTHON)),$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)),$(PYTHON))
gpu-check: export PYTHONPATH := .$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu-check:
	@$(PYTHON) -c 'import importlib.util as u, sys; sys.exit(3 if not u.find_spec("torch") else not __import__("torch").cuda.is_available())' \
		|| { [ $$? = 3 ] && echo "make gpu-check: $(PYTHON) has no torch. Say: make gpu-check PYTHON=..." \
		|| echo "make gpu-check: no CUDA device for $(PYTHON)"; exit 2; }
	@status=0; \
	timeout 260 $(PYTHON) -m pytest tests/kernels/test_triton.py tests/kernels/test_memory.py tests/kernels || status=1; \
	timeout 210 $(PYTHON) -m medtrain bench kernels --quick --out '$(OUT_DIR)' || status=1; \
	[ $$status = 0 ] || echo "make gpu-check: something failed, see above"; \
	exit $$status

clean:
	rm -rf $(VENV) build *.egg-info
