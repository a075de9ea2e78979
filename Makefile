# `make` alone lists the targets. Each of them first makes .venv, once: the versions in requirement.lock.

SHELL := bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup quickstart test check lint format lock clean

# The interpreter that makes .venv, and the number of test processes.
PYTHON3 ?= python3
WORKERS ?= 2

BIN := .venv/bin
SETUP := .venv/complete
SCRIPTS := train.sh start_on_terminate.sh .ci/run
QUICK := tests/test_house.py tests/utils/config tests/model/quantizers/test_registry.py
RUNS := digits-fp-resnet20 digits-lsq-2bit-resnet20
TRAINED := weights/resnet20/digits-lsq-2bit-resnet20-checkpoint.pth.tar
unexport PYTHON # train.sh would take it instead of .venv's

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(SETUP) ## make .venv, with uv where it is installed, otherwise with pip

# An interrupted installation may hold half a package, so it is made anew. One made by hand, for instance with the
# CPU build of torch, is kept and gets the missing packages.
$(SETUP): requirement.txt requirement-engines.txt requirement-data.txt requirement-track.txt requirement.lock
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'make: error: $(PYTHON3) is not Python 3.11 or newer; name one that is: make PYTHON3=python3.12' >&2; \
	  exit 1; }
	@set -e; \
	if [[ -e .venv/incomplete ]]; then rm -rf .venv; fi; \
	mkdir -p .venv; \
	rm -f $@; \
	touch .venv/incomplete; \
	pinned='-r requirement.txt -r requirement-engines.txt -r requirement-data.txt -r requirement-track.txt -c requirement.lock'; \
	if command -v uv >/dev/null; then \
	  [[ -x $(BIN)/python ]] || uv venv --quiet --seed --allow-existing --python '$(PYTHON3)' .venv; \
	  (set -x; uv pip install --python $(BIN)/python $$pinned); \
	else \
	  [[ -x $(BIN)/python ]] || $(PYTHON3) -m venv .venv; \
	  (set -x; $(BIN)/python -m pip install --disable-pip-version-check $$pinned); \
	fi; \
	mv .venv/incomplete $@

quickstart: $(SETUP) ## train a small network, then its 2-bit version, compare them, and export it
	bash train.sh config/config.dorefa.train-scratch.digits.fp.resnet20
	bash train.sh config/config.lsq.finetune.digits.2bit.resnet20
	$(BIN)/python tools.py --keyword compare $(RUNS:%=exp/%)
	$(BIN)/python tools.py --keyword export_onnx --old $(TRAINED) --new exp/digits.onnx --force
	$(BIN)/python tools.py --keyword export_packed --old $(TRAINED) --new exp/digits.safetensors --force
	$(BIN)/python tools.py --keyword verify --old $(TRAINED) exp/digits.onnx

test: $(SETUP) ## run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: $(SETUP) ## in under a minute: style, types, and the tests of layout, registry and options
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@set -e; set -x; \
	$(BIN)/pyright --project pyproject.toml & types=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(QUICK) || status=$$?; \
	wait $$types && exit $${status:-0}

lint: $(SETUP) ## check code, types, scripts and configs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --project pyproject.toml
	$(BIN)/shellcheck $(SCRIPTS)
	for config in config/config.*; do bash train.sh --check "$$config" || exit; done

format: $(SETUP) ## sort imports and format the code
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

lock: ## renew requirement.lock from the requirement files (needs uv)
	uv pip compile --quiet --universal --upgrade --python-version 3.11 --no-annotate \
	  --custom-compile-command 'make lock' --output-file requirement.lock \
	  requirement.txt requirement-engines.txt requirement-data.txt requirement-track.txt

clean: ## remove .venv and caches; trainings in exp/ and weights/ stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
