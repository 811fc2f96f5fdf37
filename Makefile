# The commands of this project. `make demo` and `make test` need Python 3.11 or newer and make, nothing else.
# Another Python: make PYTHON=python3.13 test. Arguments for pytest: make test ARGS='-k packaging'.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
OUTAGES := tests/faults tests/fleet tests/link tests/model tests/processes tests/clocks tests/test_demo.py tests/test_examples.py
INTEGRATIONS := tests/integrations
COMPAT := tests/compat
CIRCUITBREAKER := 2.1.3
SITE := tests/docs
SCREENS := tests/web tests/test_cli.py tests/test_cli_fleet.py tests/test_terminal.py
TYPED := pybreaker_redis tests/typing/api.py
SECONDS ?= 600

define WRITE_BUNDLES
import pathlib
from pybreaker_redis.wire.scripts import SCRIPTS, compose, sha1
folder = pathlib.Path("build/lua")
folder.mkdir(parents=True, exist_ok=True)
for name in SCRIPTS:
    path = folder / f"{name}.lua"
    path.write_bytes(compose(name).encode())
    print(sha1(name), path)
endef
export WRITE_BUNDLES

.DEFAULT_GOAL := help
.PHONY: help demo test test-outages coverage test-faults test-servers test-pythons test-integrations test-compat test-web test-docs pictures soak mutants lint docs drawings bundles bench bench-link clean
.NOTPARALLEL:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/demo.stamp ## a misbehaving service, a Redis, four processes, one shared breaker
	@PYTHONPATH=examples $(BIN)/python -m demo $(ARGS)

test: $(VENV)/dev.stamp ## run the tests, but for outages, processes, the link, models, other libraries, screens, the site, and the long ones (five minutes)
	@$(BIN)/python -m pytest $(addprefix --ignore=,$(OUTAGES) $(INTEGRATIONS) $(COMPAT) $(SITE) $(SCREENS)) $(ARGS)

test-outages: $(VENV)/dev.stamp ## run those of outages, of processes, of the link and of models (ten minutes)
	@$(BIN)/python -m pytest $(OUTAGES) $(ARGS)

coverage: $(VENV)/compat.stamp ## run all tests but the long ones, and print the coverage (twelve minutes)
	@$(BIN)/python -m pytest --ignore=$(INTEGRATIONS) --ignore=$(SITE) --ignore=tests/web --cov --cov-report=term-missing:skip-covered $(ARGS)

test-faults: $(VENV)/dev.stamp ## run the fault and model tests in their long form (a quarter of an hour)
	@$(BIN)/python -m pytest $(OUTAGES) tests/races -m 'long or not long' $(ARGS)

test-servers: $(VENV)/dev.stamp ## run contract, scripts and cluster tests on every server found (four minutes)
	@$(BIN)/python -m pytest tests/faults/test_every_server.py tests/faults/test_cluster.py -m 'long or not long' \
	  -k 'not 300' $(ARGS)

test-pythons: ## run the tests on every Python found, with the oldest and the newest redis-py that is allowed
	@$(PYTHON) tests/run_pythons.py $(ARGS)

test-integrations: $(VENV)/integrations.stamp ## run the tests of integrations with other libraries, and of their pages (a minute)
	@$(BIN)/python -m pytest $(INTEGRATIONS) tests/test_docs.py -k 'integrations or http-clients or frameworks or retries or grpc' $(ARGS)

test-compat: $(VENV)/compat.stamp build/circuitbreaker-$(CIRCUITBREAKER) ## run the tests of what takes other libraries' place, and circuitbreaker's own (a minute)
	@CIRCUITBREAKER_TESTS=build/circuitbreaker-$(CIRCUITBREAKER)/tests $(BIN)/python -m pytest $(COMPAT) $(ARGS)

# Its wheel has no tests, but its sdist has.
build/circuitbreaker-$(CIRCUITBREAKER): | $(BIN)/python
	@mkdir -p build
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest build \
	  circuitbreaker==$(CIRCUITBREAKER)
	@tar -xzf $@.tar.gz -C build

test-web: $(VENV)/webtests.stamp ## run the tests of the operators' page, in Debian's chromium if it is there, and of the command line (four minutes)
	@$(BIN)/python -m pytest $(SCREENS) tests/test_docs.py -k 'web or cli or terminal or why-open' $(ARGS)

pictures: $(VENV)/webtests.stamp ## take the pictures of the operators' page and of watch in docs/images anew, from real runs
	@PYTHONPATH=tests $(BIN)/python -m tests.web.pictures
	@PYTHONPATH=tests $(BIN)/python tests/picture_of_watch.py

test-docs: $(VENV)/docs.stamp $(VENV)/webtests.stamp ## build the documentation, and look at every page in a browser without a network (a minute)
	@$(BIN)/python -m pytest $(SITE) $(ARGS)

soak: $(VENV)/dev.stamp ## random faults for ten minutes; another time: make soak SECONDS=3600
	@$(BIN)/python tests/faults/soak.py $(SECONDS) $(ARGS)

mutants: $(VENV)/mutation.stamp ## change the state machine in 4400 places, and count what the tests miss (hours)
	@$(BIN)/python tests/mutation/python_mutants.py
	@$(BIN)/python tests/mutation/lua_mutants.py $(ARGS)

lint: $(VENV)/integrations.stamp $(VENV)/webtests.stamp bundles ## check style, types, the Lua, and the files for GitHub
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict $(TYPED)
	$(BIN)/basedpyright --project pyproject.toml
	$(BIN)/python tests/check_lua.py
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms \
	  $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	@if command -v luacheck >/dev/null; then luacheck --quiet lua $(wildcard tests/lua) build/lua; fi

docs: $(VENV)/docs.stamp ## build the documentation into build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

drawings: $(VENV)/demo.stamp ## draw the pictures of README and the documentation, from the demo and the benchmarks
	@PYTHONPATH=docs $(BIN)/python -m pictures

bundles: $(VENV)/demo.stamp ## write build/lua/NAME.lua, the very bytes that Redis runs
	@$(BIN)/python -c "$$WRITE_BUNDLES"

bench: $(VENV)/bench.stamp ## compare with every peer, and simulate fleets; then draw the charts (eight minutes)
	@$(BIN)/python benchmarks/bench.py $(ARGS)
	@$(BIN)/python benchmarks/fleet.py
	@$(BIN)/python benchmarks/watch.py
	@PYTHONPATH=docs $(BIN)/python -m pictures

bench-link: $(VENV)/bench.stamp ## one process's line to Redis, and simulated fleets (twenty minutes)
	@$(BIN)/python benchmarks/link.py $(ARGS)
	@$(BIN)/python benchmarks/fleet_sim.py
	@$(BIN)/python benchmarks/fleet_sim.py --cost

clean: ## remove the virtual environment and everything generated
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find pybreaker_redis tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per extra: a change of pyproject.toml installs it anew.
$(VENV)/%.stamp: pyproject.toml | $(BIN)/python
	@echo "installing pybreaker_redis[$*] into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true);" \
	    "name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed (Debian and Ubuntu: install python3-venv);" \
	    "name another Python: make PYTHON=python3.12 ..." >&2; exit 1; }
