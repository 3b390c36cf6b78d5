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

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# On a machine with a CUDA device: the op's tests and the quick benchmark; the two limits keep it under 8 minutes. Installs
# nothing and needs no network: $(PYTHON) has torch, triton, transformers, pytest. The benchmark runs after failing tests too.
gpu-check: export PYTHONPATH := .$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu-check:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
		|| { echo "make gpu-check: $(PYTHON) finds no CUDA device (or no torch)"; exit 2; }
	@status=0; \
	timeout 260 $(PYTHON) -m pytest tests/kernels/test_triton.py tests/kernels/test_memory.py tests/kernels || status=1; \
	timeout 210 $(PYTHON) -m medtrain bench kernels --quick --out '$(OUT_DIR)' || status=1; \
	[ $$status = 0 ] || echo "make gpu-check: something failed, see above"; \
	exit $$status

clean:
	rm -rf $(VENV) build *.egg-info
