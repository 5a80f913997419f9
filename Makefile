# Everything that is done with this project, from a fresh clone on: `make` lists it.
# .venv is made on the first call and again whenever pyproject.toml or constraints.txt change.

VENV   := .venv
STAMP  := $(VENV)/.installed
PYTHON_IN_VENV := $(VENV)/bin/python

# make test TESTS=tests/unit/cli ARGS="-k help -x": a part of the tests, without the coverage gate.
TESTS ?=
ARGS  ?=
# Processes that `make test` spreads the tests over.
WORKERS ?= 2
# Tests of what the coverage gate does not ask about; counting lines makes them five times as slow.
UNCOUNTED := tests/unit/engine tests/integration/engine

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint bench soak docs lock coverage clean distclean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## make .venv with vmlab and everything its tests need, from hash-locked constraints

$(STAMP): pyproject.toml constraints.txt tools/make-venv
	@tools/make-venv $(VENV)
	@touch $@

demo: ## boot Debian and run a command in it, from a fresh clone on; the time of each step, a report
	@tools/demo $(VENV) .build/demo/report.json

test: $(STAMP) ## every test but the soak tests, and the coverage that [tool.vmlab.coverage-gate] asks for
	@tools/debian-packages test
ifeq ($(strip $(TESTS)$(ARGS)),)
	@rm -f .coverage .coverage.*
	@status=0; set -x; \
	$(PYTHON_IN_VENV) -m pytest -n $(WORKERS) --dist worksteal -ra $(UNCOUNTED) || status=1; \
	$(PYTHON_IN_VENV) -m pytest -n $(WORKERS) --dist worksteal -ra --cov --cov-report= \
		$(addprefix --ignore=,$(UNCOUNTED)) || status=1; \
	{ set +x; } 2>/dev/null; exit $$status
	@$(PYTHON_IN_VENV) tools/coverage_gate.py
else
	$(PYTHON_IN_VENV) -m pytest -ra $(TESTS) $(ARGS)
endif

lint: $(STAMP) ## style, types, the floors, and nobody's mirror or home directory in the files
	@tools/lint $(VENV)/bin

bench: $(STAMP) ## run every benchmark in benchmarks/
	@set -e; for file in $$(grep -l '^def main' benchmarks/*.py); do \
		echo "== $$file"; $(PYTHON_IN_VENV) $$file; done

soak: $(STAMP) ## the tests marked `soak`: minutes to hours
	VMLAB_RESULTS=$(CURDIR)/benchmarks/results $(PYTHON_IN_VENV) -m pytest -m soak --timeout 0 -ra $(ARGS)

docs: $(STAMP) ## build the documentation into site/
	@tools/debian-packages docs
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet --site-dir site
	@echo "built site/index.html (its search needs a server: $(PYTHON_IN_VENV) -m http.server -d site)"

lock: $(STAMP) ## resolve pyproject.toml anew into constraints.txt, with hashes
	@tools/lock $(VENV)/bin/uv

coverage: test ## the same as `test`, and which lines and branches are not covered, into htmlcov/
	@$(VENV)/bin/coverage html --quiet
	@echo "wrote htmlcov/index.html"

clean: ## remove everything that was made here, but not .venv
	@rm -rf site htmlcov build dist .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache \
		.import_linter_cache .hypothesis .build
	@find src tests tools benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	@rm -rf $(VENV)
