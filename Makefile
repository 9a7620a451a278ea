# Two commands do everything on a fresh machine: make serve, make test.
PYTHON ?= python3
# HOST= and PORT= behind make win over all of this. A HOST of the environment is not meant for us:
# conda sets one, and so do some shells.
HOST := $(or $(UNET_HOST),127.0.0.1)
PORT := $(or $(UNET_PORT),$(PORT),8000)
BIN := .venv/bin
READY := .venv/ready

.PHONY: help setup serve test lint format bench clean

help:  ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(READY)  ## the environment, once

$(READY): pyproject.toml requirements/serve.txt requirements/torch.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "unet-server needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

serve: $(READY)  ## serve the shipped weights (HOST=, PORT=)
	UNET_LOG_FORMAT=$${UNET_LOG_FORMAT:-text} $(BIN)/unet serve --host $(HOST) --port $(PORT)

test: $(READY)  ## the whole suite
	$(BIN)/python -m pytest

lint: $(READY)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## let ruff format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## measure this machine (benchmarks/README.md)
	$(BIN)/unet bench

clean:  ## remove the environment and caches
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
