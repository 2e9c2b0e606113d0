# The commands of this repository; `make` alone lists them. Everything is installed into .venv, nothing else changes.

PYTHON ?= python3
ISSUE ?= 01
ROWS ?=
COUNT ?= 20000
TARGETS ?= all
MINUTES ?= 10
RANKS ?= 1,2,3,4,6
SEED ?=
EXTRAS ?=
TORCH ?=
VENV := .venv
PY := $(VENV)/bin/python
DEMO := exps/demo_exps/tsm_resnet18/motion8
DEMO_RANKS ?= 2
# System packages that tests need (Debian names); installed through apt if that is allowed.
SYSTEM_PACKAGES := chromium-headless-shell memcached

.DEFAULT_GOAL := help
.PHONY: help install demo check test nightly lint accept fuzz soak site clean

help:
	@echo "make install           make .venv and install into it what Zoetrope needs (EXTRAS=export,dali: these extras too)"
	@echo "make demo              make a small video data set, train TSM on it, evaluate it (minutes, no download of data)"
	@echo "make check             the tests that start no process, and ruff: two minutes, for while you work"
	@echo "make test              install what the tests need; linters, and all tests but the nightly ones: what CI runs"
	@echo "make nightly           all tests, more examples of each property, fuzzing, the rehearsal for a GPU: an hour"
	@echo "make lint              ruff and pyright only"
	@echo "make accept ISSUE=01   print each figure of an issue's table as one JSON line (ROWS=a,b for some of them)"
	@echo "make fuzz COUNT=20000  damaged inputs for every parser (TARGETS=config,weights for some; about 5 ms per input)"
	@echo "make soak MINUTES=10   stop, kill and freeze training runs at drawn moments (RANKS=1,2,3,4,6 SEED=), compare every bit"
	@echo "make site              build the documentation into .site/"
	@echo "make clean             delete caches; data, runs and .venv stay"
	@echo
	@echo "python main.py --help  lists the verbs.   PYTHON=python3.12 make demo  takes another Python (>= 3.10),"
	@echo "TORCH=2.11 make demo  another PyTorch"

export TORCH

# The stamp is newer than pyproject.toml when everything that it asks for is installed. Its name has the PyTorch that
# was asked for: another one is another installation.
USED := $(VENV)/installed$(TORCH)
TESTED := $(VENV)/installed-dev$(TORCH)
ASKED := pyproject.toml .ci/install .ci/cpu.txt

$(USED): $(ASKED) | $(PY)
	@bash .ci/install $(VENV) ""
	@rm -f $(VENV)/installed*
	@touch $@

$(TESTED): $(ASKED) .ci/packages.txt | $(PY)
	@bash .ci/install $(VENV) dev,export,dali $(SYSTEM_PACKAGES)
	@rm -f $(VENV)/installed*
	@touch $@ $(USED)

$(PY):
	@bash .ci/make_venv "$(PYTHON)" $(VENV)

install: $(USED)
	@$(if $(EXTRAS),bash .ci/install $(VENV) $(EXTRAS))
	@echo "Installed: $(PY) main.py --help lists the verbs, $(PY) main.py doctor looks at this machine"

demo: $(USED)
	@$(PY) main.py demo-data
	@$(DEMO)/train.sh local $(DEMO_RANKS)
	@$(PY) -m anal_tools.demo_summary $(DEMO) --is-finished || $(DEMO)/eval.sh local $(DEMO_RANKS)
	@$(PY) -m anal_tools.demo_summary $(DEMO)

# Files keep together, for their fixtures, and start in the order of tests/tiers.py: long ones first.
# A third worker on two cores: tests that wait for ranks or processes leave a core idle.
# Without bytecode, each of a thousand processes would compile this repository.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder

check: $(TESTED)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PYTEST) --tier check

test: lint
	@$(PYTEST) --tier test --durations=15

nightly: lint
	@$(PYTEST) --tier nightly --durations=50
	@$(PY) -m tests.fuzz.runner --count $(COUNT) --targets $(TARGETS)
	@OMP_NUM_THREADS=1 $(PY) tests/gpu/one_gpu.py --rehearse

# Each PyTorch declares other types, so only those of CI's version are checked.
PINNED := $(shell sed -n 's/^torch==\([0-9]*\.[0-9]*\).*/\1/p' .ci/cpu.txt)

lint: $(TESTED)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(if $(filter-out $(PINNED),$(TORCH)),echo "pyright runs with PyTorch $(PINNED) only",$(PY) -m pyright --threads 2)

accept: $(TESTED)
	@$(PY) -m tests.benchmarks.issues $(ISSUE) $(if $(ROWS),--rows $(ROWS))

fuzz: $(TESTED)
	@$(PY) -m tests.fuzz.runner --count $(COUNT) --targets $(TARGETS)

site: $(TESTED)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict -f .mkdocs.yml
	@echo "open .site/index.html"

soak: $(TESTED)
	@$(PY) -m tests.benchmarks.reliability.soak --minutes $(MINUTES) --ranks $(RANKS) $(if $(SEED),--seed $(SEED))

clean:
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	@rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info
