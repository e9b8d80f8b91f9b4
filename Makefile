# make train        set up, train a RetNet on addition, test it, decode some sums
# make test         set up, with the tools for it, run the tests (all but the slow ones)
# make test-slow    set up, run the slow ones
# make test-triton  compile every kernel for a GPU, under the pinned Triton and the oldest, without one
# make lint         set up, check style and types
# make test-extras  set up an environment with the extras (docs, report, demo, peft, eval, trackers), run their tests
# make browser      install Chromium for them, where it is missing (Debian, as root or by sudo)
# make docs         build the documentation as a site: open site/index.html
# make clean        remove the environments and the caches; never runs/
#
# Variables:
#   PYTHON=python3.12   the Python that makes the environment (3.11 or newer)
#   TORCH_INDEX=URL     the package index torch comes from; empty: the one pip is set up with
#   STEPS=20            make train: stop after so many steps
#   PYTEST_ARGS=...     make test, test-slow: more arguments, such as tests/test_cli.py

PYTHON ?= python3
TORCH_INDEX ?=
STEPS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
EXTRAS := .venv-extras
OLDEST := .venv-triton
PIP := $(BIN)/python -m pip install --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
# With a GPU torch brings its own; without one it interprets the kernels for their tests.
TRITON := $(shell grep '^triton==' constraints.txt)
PYTEST := $(BIN)/pytest -n 2 --dist worksteal

# Where Python may not write bytecode, every import of torch takes seconds longer.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup tools train test test-slow test-triton test-extras browser docs lint clean
.DEFAULT_GOAL := test

# What training needs; what tests and linters need beside it.
setup: $(VENV)/installed
tools: $(VENV)/tools

# ---- make train -------------------------------------------------------------------------------
RUN := runs/addition

train: setup
	@echo "Training a small RetNet to add. Python imports torch and Lightning first, some seconds; then" \
	  "there is a line every few seconds, for some minutes."
	$(BIN)/python train.py fit --config configs/addition.yaml $(if $(STEPS),--trainer.max_steps $(STEPS))
	@echo && echo "On sums that it has never seen:"
	$(BIN)/python train.py test --ckpt_path $(RUN)/last.ckpt
	@echo && echo "As a recurrent network, token by token from a state of constant size:"
	$(BIN)/archzoo generate $(RUN)/last.ckpt "123+456=" "77+38=" "905+95=" "9+999="
	@echo && echo "$(RUN) holds the checkpoints, the log (metrics.csv) and the settings (config.yaml)."
# -----------------------------------------------------------------------------------------------

test: tools
	$(PYTEST) $(PYTEST_ARGS)

test-slow: tools
	$(PYTEST) -m slow $(PYTEST_ARGS)

# Triton's names change from one version to the next. Its compiler needs no GPU, so what a GPU would
# find is found here. -n 2: one kernel after the other takes twice as long.
test-triton: $(OLDEST)/installed
	for bin in $(BIN) $(OLDEST)/bin; do \
	  $$bin/python -m pytest -n 2 -m slow tests/test_kernels_compile.py $(PYTEST_ARGS) || exit 1; done

# What brings packages of its own is tested in an environment of its own. Tests that need a browser
# are skipped where there is none, unless ARCHZOO_BROWSER=required.
test-extras: $(EXTRAS)/installed
	$(EXTRAS)/bin/python -m pytest -n 2 --dist loadfile -m extras \
	  --confcutdir=tests/extras tests/extras $(PYTEST_ARGS)

# Debian's Chromium: Playwright's own builds are not in any package index.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || { \
	  as=; test "$$(id -u)" = 0 || as="sudo -n"; \
	  echo "Installing Chromium, some 120 MB."; \
	  { $$as apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  $$as apt-get install -y -qq --no-install-recommends chromium; } >/dev/null || { \
	  echo "Chromium was not installed: it needs apt-get, and root or sudo without a password" >&2; exit 1; }; }

docs: $(EXTRAS)/installed
	NO_MKDOCS_2_WARNING=1 $(EXTRAS)/bin/python -m mkdocs build --strict

lint: tools
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(EXTRAS) $(OLDEST) site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find archzoo tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "archzoo needs Python 3.11 or newer: make PYTHON=python3.11 names one")'
	@echo "Setting up $(VENV), once: torch, Lightning and what they need, some hundred MB (with an NVIDIA" \
	  "GPU some GB), in a few minutes. pip says how far it is."
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch first and alone. PyPI's build for Linux brings several GB of CUDA libraries, so a Linux
# machine without an NVIDIA GPU asks for the CPU build by its version, which no other build can
# satisfy: pip finds it, or stops before it downloads anything.
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@if [ -n "$(TORCH_INDEX)" ]; then \
	  echo "$(TORCH) from $(TORCH_INDEX)"; \
	  $(PIP) --no-deps --index-url "$(TORCH_INDEX)" "$(TORCH)"; \
	elif [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then \
	  echo "No NVIDIA GPU here: $(TORCH)+cpu"; \
	  $(PIP) --no-deps "$(TORCH)+cpu" || { echo "pip's package index has no CPU build of torch:" \
	    "add TORCH_INDEX=https://download.pytorch.org/whl/cpu to the make command" >&2; exit 1; }; \
	fi
	$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/tools: $(VENV)/installed
	@echo "Adding what tests and linters need, once."
	@if [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then \
	  $(PIP) --no-deps "$(TRITON)" || echo "no $(TRITON) here: the kernels' tests will be skipped"; \
	fi
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

# torch and all else that dev brings is read from .venv, so that it is downloaded once. The line in
# a .pth file puts .venv's packages on sys.path after those of .venv-extras: what an extra needs in
# another version (gradio an older pillow) is installed here and found first, and .venv stays as it
# is. pip sees .venv's packages like those of the system in a venv with --system-site-packages, and
# changes none of them. .pth files in there are not read, so archzoo itself is installed here too.
$(EXTRAS)/installed: pyproject.toml constraints-extras.txt $(VENV)/tools
	@echo "Setting up $(EXTRAS), once: what docs, report, demo, peft, datasets, eval, deepspeed and the trackers need beside $(VENV), some 1.6 GB."
	@rm -rf $(EXTRAS)
	@$(BIN)/python -m venv $(EXTRAS)
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  $(BIN)/python -c "$$site" > "$$($(EXTRAS)/bin/python -c "$$site")/archzoo-venv.pth"
	$(EXTRAS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-extras.txt \
	  -e '.[docs,report,demo,peft,datasets,eval,wandb,mlflow,trackio,deepspeed]' playwright tiktoken
	@touch $@

# The same with one package, found before the Triton of .venv.
$(OLDEST)/installed: constraints-triton.txt $(VENV)/tools
	@rm -rf $(OLDEST)
	@$(BIN)/python -m venv $(OLDEST)
	@site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  $(BIN)/python -c "$$site" > "$$($(OLDEST)/bin/python -c "$$site")/archzoo-venv.pth"
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-installed \
	  -r constraints-triton.txt
	@touch $@
