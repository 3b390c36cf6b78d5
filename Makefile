# `make demo` and `make test` are all a newcomer needs: each makes .venv and installs the project into it first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT_DIR ?= benchmarks/results

.PHONY: demo test test-fast test-newest test-lowest lint gpu-check clean

# An environment of its own, with the extra $(2), installed with pip's options $(1).
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "medtrain needs Python 3.11 or newer; found $$($(PYTHON) --version). Say: make PYTHON=python3.11"; exit 2; }
	[ -x $(@D)/bin/python ] || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(1) -e '.[dev,$(2)]'
	@touch $@
endef

# The stamps are remade when the requirements or this file change, so a pull never leaves an old environment behind.
REQUIREMENTS := setup.py pyproject.toml constraints.txt Makefile
LINUX := $(filter Linux,$(shell uname))
$(VENV)/.installed: $(REQUIREMENTS)
	$(call install,-c constraints.txt,dev)

# The tests against peers (TRL, Liger) need the peers; they need Triton, so elsewhere those tests skip.
$(VENV)/.installed-peers: $(VENV)/.installed
	$(call install,-c constraints.txt,$(if $(LINUX),bench,dev))

# The two ends of setup.py's ranges.
$(VENV)-newest/.installed: $(REQUIREMENTS)
	$(call install,--upgrade --upgrade-strategy eager,$(if $(LINUX),liger,dev))

$(VENV)-lowest/.installed: $(REQUIREMENTS)
	sed -nE 's/^ *.([a-z0-9]+)>=([0-9.]+),<.*/\1==\2/p' setup.py > $(VENV)-lowest.txt
	$(call install,-c $(VENV)-lowest.txt,$(if $(LINUX),liger,dev))

demo: $(VENV)/.installed
	$(BIN)/medtrain demo

# Two processes; not --dist loadfile or worksteal: tests that fork must come before those that import TRL or Liger.
test: $(VENV)/.installed-peers
	$(BIN)/python -m pytest -n 2

# What to run between two edits, in a minute: the kernels (of the Triton path, which an interpreter runs here, a sample),
# the data and the configurations.
test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 tests/kernels tests/trainer/data tests/trainer/config tests/test_configs.py \
		-k 'not test_triton or odd_shapes or strided'

# What we rely on of each library, with the newest and with the lowest versions that setup.py allows.
test-newest test-lowest: test-%: $(VENV)-%/.installed
	$(VENV)-$*/bin/python -m pytest -n 2 tests/contracts

# With the peers, since kernels that are imported where they are installed are type-checked too.
lint: $(VENV)/.installed-peers
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# On a machine with a CUDA device: the op's tests and the quick benchmark; the two limits keep it under 8 minutes. Installs
# nothing and needs no network: $(PYTHON) has torch, triton, transformers, pytest, in versions of its own, whose warnings are no
# errors. The benchmark runs after failing tests too.
gpu-check: PYTHON := $(if $(filter file default,$(origin PYTHON)),$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)),$(PYTHON))
gpu-check: export PYTHONPATH := .$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu-check:
	@$(PYTHON) -c 'import importlib.util as u, sys; sys.exit(3 if not u.find_spec("torch") else not __import__("torch").cuda.is_available())' \
		|| { [ $$? = 3 ] && echo "make gpu-check: $(PYTHON) has no torch. Say: make gpu-check PYTHON=..." \
		|| echo "make gpu-check: no CUDA device for $(PYTHON)"; exit 2; }
	@status=0; \
	timeout 260 $(PYTHON) -m pytest -W default tests/kernels/test_triton.py tests/kernels/test_memory.py tests/kernels || status=1; \
	timeout 210 $(PYTHON) -m medtrain bench kernels --quick --out '$(OUT_DIR)' || status=1; \
	[ $$status = 0 ] || echo "make gpu-check: something failed, see above"; \
	exit $$status

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-lowest $(VENV)-lowest.txt build *.egg-info
