# simvlm: everything runs from one environment, .venv/, that `make setup` builds from requirements/.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv
# Extra options for pip, for instance a machine without a GPU: PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
OP ?=
MINUTES ?= 12

PY := $(VENV)/bin/python
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY)
# Two test processes of one thread each; neighbouring cases stay together, for they share truth and yardstick.
WORKERS := -n 2 --dist worksteal
STAMP := $(VENV)/.simvlm-setup
# What the environment and the compiled module are made from: a change of its hash makes both anew.
INPUTS := csrc CMakeLists.txt setup.py pyproject.toml requirements

# Cases that `make test-xla` must pass, in two dtypes. It spends its time compiling: XLA's optimizer is off.
XLA_PARITY := prefix_attention/torch/xla=43x2 batch_norm_act/torch/xla=46x2 embed_sequence/torch/xla=25x2

# What `make wheel` builds for, commands or paths: .venv's interpreter, and of each other version from 3.11 to 3.14 the
# first one, on PATH or under pyenv, that can build (it has venv and Python.h).
PYTHONS ?= $(PY) $(shell own=$$($(PY) -c 'import sys; print(sys.version_info.minor)'); \
  can_build='import ensurepip, os, sysconfig, venv; os.stat(sysconfig.get_path("include") + "/Python.h")'; \
  for minor in 11 12 13 14; do \
    [ $$minor != $$own ] || continue; \
    for python in python3.$$minor ~/.pyenv/versions/3.$$minor.*/bin/python; do \
      if $$python -c "$$can_build" 2>/dev/null; then echo $$python; break; fi; \
    done; \
  done)

.PHONY: help setup check format test test-full test-soak test-sanitize test-xla wheel test-wheel bench gpu-compile demo quick clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | sort | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: ## .venv/ with the pinned packages and the C++ kernels; safe to repeat, quick when nothing changed
	@now=$$(find $(INPUTS) -type f | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -c1-16); \
	if [ "$$(cat $(STAMP) 2>/dev/null || true)" = "$$now" ] && ls simvlm/_cpp*.so >/dev/null 2>&1; then exit 0; fi; \
	fail() { echo "make setup: $$1" >&2; exit 1; }; \
	command -v $(PYTHON) >/dev/null || fail "$(PYTHON) not found (Debian, Ubuntu: apt-get install python3)"; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed: make setup PYTHON=python3.11"; \
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || fail "Python's venv module is missing (Debian, Ubuntu: apt-get install python3-venv)"; \
	command -v "$${CXX:-g++}" >/dev/null || fail "$${CXX:-g++} not found (Debian, Ubuntu: apt-get install g++)"; \
	[ -x $(PY) ] || { echo "creating $(VENV)/"; $(PYTHON) -m venv $(VENV); }; \
	packages=$$(sha256sum requirements/dev.txt | cut -c1-16); \
	if [ "$$(cat $(STAMP)-packages 2>/dev/null || true)" != "$$packages" ]; then \
	  echo "installing requirements/dev.txt"; \
	  $(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements/dev.txt; \
	  echo "$$packages" > $(STAMP)-packages; \
	fi; \
	echo "building the C++ kernels"; \
	SIMVLM_REQUIRE_CPP=1 $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	echo "$$now" > $(STAMP)

check: setup ## formatting, lint and types
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@$(VENV)/bin/clang-format --dry-run --Werror csrc/*.h csrc/*.cc tests/*.cc

format: setup ## rewrite the sources as `make check` wants them
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .
	@$(VENV)/bin/clang-format -i csrc/*.h csrc/*.cc tests/*.cc

test: setup ## the core tier of every test; ends with a table of what ran on which implementation
	@$(RUN) -m pytest $(WORKERS) -m "not full and not wheel and not xla and not soak"

test-full: setup ## every test of the sources, the long tier included
	@XLA_FLAGS=--xla_force_host_platform_device_count=8 $(RUN) -m pytest $(WORKERS) -m "not wheel and not xla and not soak"

test-soak: setup ## runs of training killed a dozen times and runs of thousands of steps: half an hour
	@$(RUN) -m pytest -m soak tests/test_ranks.py

test-sanitize: setup ## the C++ kernels under the address, undefined-behaviour and thread sanitizers
	@$(RUN) tests/sanitize.py

test-xla: ## the torch-xla implementations on XLA's CPU, in .venv-xla/: torch_xla wants a torch of its own, 7 GB of disk
	@packages=$$(sha256sum requirements/xla.txt | cut -c1-16); \
	if [ "$$(cat .venv-xla/.packages 2>/dev/null || true)" != "$$packages" ]; then \
	  echo "installing requirements/xla.txt into .venv-xla/"; \
	  [ -x .venv-xla/bin/python ] || $(PYTHON) -m venv .venv-xla; \
	  .venv-xla/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements/xla.txt; \
	  echo "$$packages" > .venv-xla/.packages; \
	fi
	@PJRT_DEVICE=CPU XLA_FLAGS=--xla_backend_optimization_level=0 SIMVLM_MIN_PARITY="$(XLA_PARITY)" \
	  .venv-xla/bin/python -m pytest -n 2 --dist worksteal -m xla tests/test_torch_xla.py

wheel: setup ## dist/: the sdist, and from it a manylinux wheel for each of PYTHONS="python3.12 …" (default: all found)
	@rm -rf dist build/wheel; mkdir -p dist build/wheel/empty
	@echo "building the sdist"; $(RUN) -m build --no-isolation --sdist --outdir dist . > build/wheel/sdist.log
	@for python in $(PYTHONS); do \
	  echo "building the wheel for $$($$python --version)"; \
	  $$python -m venv --clear build/wheel/env; \
	  (cd build/wheel/empty; SIMVLM_REQUIRE_CPP=1 ../env/bin/python -m pip wheel --quiet --disable-pip-version-check \
	    --no-deps --wheel-dir .. $(CURDIR)/dist/*.tar.gz); \
	done
	@$(RUN) -m auditwheel repair --wheel-dir dist build/wheel/*.whl 2> build/wheel/auditwheel.log \
	  || { cat build/wheel/auditwheel.log >&2; exit 1; }
	@ls -l dist

test-wheel: ## make wheel, then install each one into an environment of its own and test it; old processors in qemu
	@command -v qemu-x86_64 >/dev/null || \
	  { echo "make test-wheel: qemu-x86_64 not found (Debian, Ubuntu: apt-get install qemu-user)" >&2; exit 1; }
	@$(MAKE) --no-print-directory wheel
	@SIMVLM_MIN_PARITY= SIMVLM_WHEEL_PYTHONS="$(PYTHONS)" $(RUN) -m pytest -m wheel tests/test_wheel.py

bench: setup ## time the kernels against their peers (OP=prefix_attention for one op)
	@$(RUN) -m benchmarks $(if $(OP),--op $(OP))

gpu-compile: setup ## every Triton kernel as shipped, compiled for sm_80, sm_90, sm_100 without a GPU: what each takes
	@$(RUN) -m benchmarks.gpu_compile

demo: setup ## a SimVLM learns to caption pictures in MINUTES=12, and shows it in runs/demo/report.html
	@$(RUN) -m simvlm.cli demo --minutes $(MINUTES)

quick: setup ## in less than a minute: what runs here, that it is right, how fast it is
	@$(RUN) -m benchmarks.quick

clean: ## remove everything that was built, .venv/ included
	rm -rf $(VENV) .venv-xla build dist *.egg-info simvlm/_cpp*.so simvlm/_cpp_build_error.txt
