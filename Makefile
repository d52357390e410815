# The commands of this project. From a bare clone: Python 3.11 or newer with pip and venv, nothing else.
#
#   make demo      the whole adaptation on this machine: TEXT=folder INSTRUCTIONS=file.json for your own data
#   make test      the test suite; make test-fast, its quick claims in three minutes; make test-all, the slowest too
#
# TORCH_INDEX_ARGS: what pip is told when it installs torch. PyPI's Linux torch is the CUDA build, some gigabytes; on a
# laptop the processor's build is enough: TORCH_INDEX_ARGS='--index-url ADDRESS', the address that pytorch.org names
# for "CPU". Empty: whatever pip finds first.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX_ARGS ?=
PYTEST_ARGS ?=
TEST_WORKERS ?= 2
TEST ?=
TEXT ?=
INSTRUCTIONS ?=
DEMO_ARGS ?=
ONLY ?=
SEEDS ?= 0:500
SOAK_SECONDS ?= 600
TRIES ?= 10000
MINUTES ?= 3
REGISTRY ?=
TAG ?= 0.1.0
REVISION ?= $(shell git rev-parse HEAD 2>/dev/null)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv gguf demo demo-toy test test-fast test-all bench compat soak fuzz lint format types render images images-test lock clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:[^#]*## */\t/' | expand -t 13

venv: $(INSTALLED)  ## .venv with everything, as constraints.txt pins it

# torch first: which build is taken must not be decided by a package that merely depends on it
$(INSTALLED): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$$($(PYTHON) --version): Python 3.11 or newer is needed; name one: make venv PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) \
		|| { echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	$(PIP) install -q -c constraints.txt $(TORCH_INDEX_ARGS) torch
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

# llama.cpp comes as source. Nothing that only this processor knows, no OpenMP library, no programs, no vision
GGUF := $(VENV)/.gguf
LLAMA_CMAKE_ARGS := -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAVA_BUILD=OFF

gguf: $(GGUF)  ## llama.cpp, compiled in some minutes: export to GGUF, its tests, serving GGUF

$(GGUF): $(INSTALLED)
	@command -v c++ >/dev/null \
		|| { echo "no C++ compiler to build llama.cpp with; on Debian and Ubuntu: apt-get install g++" >&2; exit 2; }
	CMAKE_ARGS="$(LLAMA_CMAKE_ARGS)" $(PIP) install -q -c constraints.txt -e '.[gguf]'
	@touch $@

# without a compiler the tests that need llama.cpp are skipped, and say so
WITH_GGUF := $(if $(shell command -v c++),$(GGUF))

demo: venv  ## the whole adaptation, on real Chinese text, on this machine
	$(BIN)/zhllama demo $(if $(TEXT),--text "$(TEXT)") $(if $(INSTRUCTIONS),--instructions "$(INSTRUCTIONS)") $(DEMO_ARGS)

demo-toy: venv  ## the same from a tiny model that is made here, and speaks no language
	$(BIN)/zhllama demo --toy $(if $(TEXT),--text "$(TEXT)") $(if $(INSTRUCTIONS),--instructions "$(INSTRUCTIONS)") $(DEMO_ARGS)

RUN_TESTS = $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadgroup
FAST := not slow and not slowest and not gguf and not browser and not images

test: venv $(WITH_GGUF)  ## the test suite, as CI runs it: all but the slowest claims
	$(RUN_TESTS) -m "not slowest" $(PYTEST_ARGS)

test-fast: venv  ## the quick claims, in three minutes, without llama.cpp: TEST=zhllama|components|pipelines chooses
	$(RUN_TESTS) -m "$(FAST)" $(PYTEST_ARGS) $(addprefix tests/,$(TEST))

test-all: venv $(WITH_GGUF)  ## everything, the slowest claims too
	$(RUN_TESTS) $(PYTEST_ARGS)

bench: venv $(WITH_GGUF)  ## speeds and memory beside their peers, as Markdown tables: ONLY="merge storage" chooses
	$(BIN)/python -m tests.bench $(ONLY)

compat: venv $(GGUF)  ## what other programs make of our files, and we of theirs: ONLY="trl mergekit" chooses; an hour
	TORCH_INDEX_ARGS="$(TORCH_INDEX_ARGS)" $(BIN)/python -m tests.compat $(ONLY)

soak: venv  ## hundreds of seeded runs with faults: ONLY="storage" chooses, SEEDS=0:500; of the gateway SOAK_SECONDS=600
	SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/python -m tests.soak --seeds $(SEEDS) $(ONLY)

fuzz: venv $(WITH_GGUF)  ## readers, and the gateway, against what programs make up: ONLY="gateway manifest", MINUTES=3 each, TRIES=10000
	$(BIN)/python -m tests.fuzz --tries $(TRIES) --minutes $(MINUTES) $(ONLY)

lint: venv  ## format, lint, who may import whom, Dockerfiles, workflows, as CI checks them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/hadolint --no-color images/*/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yaml
	$(BIN)/zizmor --offline --no-progress --quiet .github/workflows

format: venv  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: venv  ## mypy
	$(BIN)/mypy

render: venv  ## k8s/ again, from pipelines/sizes
	$(BIN)/zhllama render all

# a release: ATTEST=true BAKE_ARGS=--push, with a builder that can attest (docs/images.md)
images:  ## every image: REGISTRY=registry.example.com/team TAG=1.2.3
	@docker buildx version >/dev/null 2>&1 \
		|| { echo "docker with buildx is needed; docs/images.md says how to build with buildah or podman" >&2; exit 2; }
	REGISTRY="$(REGISTRY)" TAG="$(TAG)" REVISION="$(REVISION)" docker buildx bake $(BAKE_ARGS)

images-test: venv  ## every image built with buildah, as root, and run as a restricted pod: half an hour
	ZHLLAMA_TEST_IMAGES=full TORCH_INDEX_ARGS="$(TORCH_INDEX_ARGS)" $(BIN)/python -m pytest tests/images/test_build.py -rs

lock: venv  ## constraints.txt and images/requirements again, from what is installed and the index's hashes
	$(BIN)/python images/lock.py

clean:  ## caches and build output; the demo's data (.zhllama) stays
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
