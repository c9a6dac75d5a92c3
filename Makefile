# Needs only make and Python >= 3.11; everything else is installed into .venv.
#
#   make demo         warm-up, PPO, ROAD and evaluation of the small policy; results in runs/demo
#   make test         the tests            make test-slow   those that take minutes
#   make test-sim     the tests on ManiSkill: real physics and rendering, on a GPU or a processor
#   make check        lint, format, types, layers
#   make bench        the benchmarks       make clean       remove .venv and caches, keep runs/
#
# Variables:  ARGS="--seed 1"     more flags for the command that runs
#             PYTHON=python3.12   the interpreter that makes .venv
#             JOBS=2              test processes
#             PIP_ARGS=...        more flags for pip install
#             TORCH_INDEX=URL     install torch from this wheel index (see README: CPU-only wheel)

PYTHON ?=
PIP_ARGS ?=
TORCH_INDEX ?=
JOBS ?= 2
ARGS ?=

BIN := .venv/bin
VULKAN := .venv/vulkan
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-input \
	--constraint constraints.txt
INPUTS := pyproject.toml constraints.txt
# Tests run JOBS processes; one thread each keeps them from fighting over the cores.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow test-sim lint check bench clean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

demo: .venv/installed-core
	$(BIN)/roadvla demo $(ARGS)

test: .venv/installed-test
	$(TEST) -m "not slow and not sim" $(ARGS)

test-slow: .venv/installed-test
	$(TEST) -m "slow and not sim" $(ARGS)

# Without a GPU a driver in software draws; where it cannot be fetched, the tests skip and say so.
test-sim: .venv/installed-sim
	@test -n "$$VK_ICD_FILENAMES$$VK_DRIVER_FILES" || command -v nvidia-smi >/dev/null \
	  || test -e $(VULKAN)/vk_swiftshader_icd.json \
	  || $(BIN)/roadvla fetch-vulkan $(VULKAN) || echo "no Vulkan device: these tests will skip"
	VK=$$(ls $(VULKAN)/vk_swiftshader_icd.json 2>/dev/null); \
	export VK_ICD_FILENAMES="$${VK_ICD_FILENAMES:-$$VK}"; \
	test -n "$$VK_ICD_FILENAMES" || unset VK_ICD_FILENAMES; \
	$(TEST) -m "sim and not slow" --dist loadfile $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

check: lint
	$(BIN)/pyright

bench: .venv/installed-core
	@for script in benchmarks/*.py; do \
	  echo "== $$script"; $(BIN)/python "$$script" $(ARGS) || exit 1; \
	done

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .hypothesis .ruff_cache .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp says what .venv holds; a larger set satisfies the smaller ones.
.venv/installed-core: PACKAGE = .[openvla]
.venv/installed-test: PACKAGE = .[openvla,lerobot,serve,test]
.venv/installed-sim: PACKAGE = .[openvla,maniskill,lerobot,serve,test]
.venv/installed-dev: PACKAGE = .[openvla,maniskill,lerobot,ray,serve,test,dev]

.venv/installed-core: $(BIN)/python $(INPUTS)
	$(install)
	@touch $@

.venv/installed-test: $(BIN)/python $(INPUTS)
	$(install)
	@touch .venv/installed-core $@

.venv/installed-sim: $(BIN)/python $(INPUTS)
	$(install)
	@touch .venv/installed-core .venv/installed-test $@

.venv/installed-dev: $(BIN)/python $(INPUTS)
	$(install)
	@touch .venv/installed-core .venv/installed-test .venv/installed-sim $@

define install
	$(if $(TORCH_INDEX),$(PIP_INSTALL) --no-deps --index-url $(TORCH_INDEX) torch)
	$(PIP_INSTALL) $(PIP_ARGS) --editable "$(PACKAGE)"
endef

# The first interpreter that is new enough, and able to make an environment with pip in it.
$(BIN)/python:
	@python=; for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    python=$$candidate; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "roadvla needs Python 3.11 or newer: install it (apt-get install python3 python3-venv" \
	    "on Debian 12 or Ubuntu 24.04) or name it: make PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	if ! $$python -c 'import ensurepip, venv' 2>/dev/null; then \
	  package=$$($$python -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	  echo "$$python cannot make a virtual environment: run" \
	    "'sudo apt-get install $$package', then make again" >&2; exit 1; \
	fi; \
	echo "$$python -m venv .venv"; $$python -m venv --clear .venv
