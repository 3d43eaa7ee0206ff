# Everything a person does with memlib. Personal settings (TORCH, PYTHON, LAB_ARGS …) go in local.mk.
-include local.mk

# The build of torch: cpu or cuda. An environment that is there keeps the one it has.
TORCH ?= $(if $(wildcard .venv/.locked-cuda),cuda,cpu)
PYTHON ?=
LAB_ARGS ?=
PYTEST_ARGS ?=
LOCK_ARGS ?=

# The image: what builds and runs it, and what that needs to be told here.
ENGINE ?= docker
IMAGE ?= memlib$(if $(filter cuda,$(TORCH)),:cuda)
BUILD_ARGS ?=
RUN_ARGS ?=
TEST_ARGS ?=

ifeq ($(filter cpu cuda,$(TORCH)),)
$(error TORCH=$(TORCH): the lock has two builds of torch, cpu and cuda; for example make env TORCH=cuda)
endif

BIN := .venv/bin
ENV := .venv/.locked-$(TORCH)
# For what must also work while there is no environment, or a broken one.
ANY_PYTHON := $(firstword $(wildcard $(BIN)/python) $(PYTHON) python3)

# Two torch threads on two busy cores can be ten times slower than one.
test test-fast notebooks: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help lab test test-fast test-newest notebooks lint format types hooks doctor docs \
	docs-check table lock lock-check env browser compiler extras evaluation model image image-run image-test wheelhouse clean

help: ## List what make can do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

lab: $(ENV) ## Open the lab in a browser; options: LAB_ARGS="--no-browser --port=9999"
	@echo "Starting JupyterLab; Ctrl-C stops it."
	@JUPYTER_CONFIG_PATH="$(CURDIR)/environment/jupyter$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" \
		exec $(BIN)/python -m jupyterlab $(LAB_ARGS)

# In CI nothing is skipped for lack of a browser, a compiler, a library to compare with, or a pretrained model.
test: $(ENV) $(if $(CI),browser compiler extras evaluation model) ## Run every test and every notebook; options: PYTEST_ARGS="-k recall"
	$(BIN)/python -m tests.run $(PYTEST_ARGS)

test-fast: $(ENV) ## Run the tests that take seconds: no notebooks, nothing that learns
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS) tests

# No browser and no image there; the first call takes some minutes.
test-newest: ## Run the tests under Python 3.13, in a Debian 13 root made here; needs root
	bash environment/newest.sh test TORCH=$(TORCH) CI= \
		PYTEST_ARGS='-m "not browser" --ignore=tests/image $(PYTEST_ARGS)'

notebooks: $(ENV) ## Run all notebooks in place and store what they show
	$(BIN)/python -m memlib.lab.notebooks run notebooks/*.ipynb

lint: $(ENV) ## Check style and format, notebooks too
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(ENV) ## Mend style and format where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(ENV) ## Check the types
	$(BIN)/mypy

hooks: $(ENV) ## Run CI's checks of style, types, lock and docs before each git commit
	$(BIN)/pre-commit install

doctor: ## Say what this machine and its environment can do
	@PYTHONSAFEPATH=1 $(ANY_PYTHON) memlib/doctor.py

docs: $(ENV) ## Write docs/config.md and docs/capacity.md from the package itself
	$(BIN)/python -m memlib.cli config docs --out docs/config.md
	$(BIN)/python -m memlib.cli capacity --out docs/capacity.md

docs-check: $(ENV) ## Fail if docs/config.md is out of date
	$(BIN)/python -m memlib.cli config docs --out .venv/config.md
	@diff -u docs/config.md .venv/config.md || \
		{ echo "docs/config.md is out of date; 'make docs' writes it anew"; exit 1; }

table: $(ENV) ## Measure the README's tables on this machine (5 minutes)
	$(BIN)/memlib table recall
	$(BIN)/memlib table rewrite

lock: ## Bring the lock files up to pyproject.toml; newest versions: LOCK_ARGS=--upgrade
	@test -x $(BIN)/uv || $(MAKE) --no-print-directory env
	$(BIN)/python environment/lock.py $(LOCK_ARGS)

lock-check: ## Fail if the lock files do not satisfy pyproject.toml
	@$(ANY_PYTHON) environment/lock.py --check

env: $(ENV) ## Make .venv from the lock files; with CUDA: TORCH=cuda
	@echo ".venv is as locked, with the $(TORCH) build of torch"

$(ENV): pyproject.toml environment/base.txt environment/torch-$(TORCH).txt
	@bash environment/env.sh $(TORCH) $(PYTHON)

browser: .venv/.locked-browser ## Add what the browser tests need: Playwright, and Chromium by apt

.venv/.locked-browser: $(ENV) environment/browser.txt
	@bash environment/env.sh browser

compiler: $(ENV) ## Add g++ by apt if there is no C++ compiler: `memlib export` and its tests need one
	@bash environment/env.sh compiler

extras: .venv/.locked-extras ## Add what pretrained models need, and the libraries tests compare with

.venv/.locked-extras: $(ENV) environment/extras.txt
	@bash environment/env.sh extras

evaluation: .venv/.locked-evaluation ## Add lm-eval, for standard benchmarks of pretrained models

.venv/.locked-evaluation: .venv/.locked-extras environment/evaluation.txt
	@bash environment/env.sh evaluation

model: extras ## Fetch SmolLM2-135M-Instruct (93 MB) into ~/.cache/memlib, or into MEMLIB_CACHE
	$(BIN)/python -m memlib.pretrained.fetch

# Podman's own format has no health check.
image: ## Build the lab's image; options: ENGINE=podman TORCH=cuda BUILD_ARGS="--build-arg …"
	BUILDAH_FORMAT=docker $(ENGINE) build --build-arg TORCH=$(TORCH) $(BUILD_ARGS) -t $(IMAGE) .

# The files in ./work stay their owner's; podman without root must be told that this is the same user.
image-run: ## Run the lab from the image, its notebooks in ./work; options: RUN_ARGS="--gpus all"
	@mkdir -p work
	$(ENGINE) run --rm -p 127.0.0.1:8888:8888 -v "$(CURDIR)/work:/home/jovyan/work" \
		--user "$$(id -u)" --group-add users \
		$(if $(findstring podman,$(ENGINE)),$$(test "$$(id -u)" = 0 || echo --userns=keep-id)) \
		$(RUN_ARGS) $(IMAGE) lab $(LAB_ARGS)

image-test: ## Check the built image from outside; options: TEST_ARGS="--host-network -k token"
	$(ANY_PYTHON) tests/image/check.py --engine $(ENGINE) --torch $(TORCH) $(TEST_ARGS) $(IMAGE)

wheelhouse: $(ENV) ## Fetch the locked wheels, for an image built without a network (Linux only)
	$(BIN)/python -m pip download --no-deps --require-hashes -d environment/wheelhouse \
		-r environment/base.txt
	$(BIN)/python -m pip download --no-deps --require-hashes -d environment/wheelhouse \
		-r environment/torch-$(TORCH).txt

clean: ## Remove .venv, caches and build leftovers
	rm -rf .venv build dist *.egg-info kernels/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -prune -exec rm -rf {} +
