# Everything runs in .venv, built here from the lock; only Python 3.11+ and make are assumed.
PYTHON ?= python3
BIN := .venv/bin
# How the suite runs on two cores, which wait a lot; the files that wait most come first.
SPREAD := -n 6 --dist loadfile --no-loadscope-reorder
BENCH_PYTHON ?= $(PYTHON)
# Another Python gets an environment of its own, so that both stay.
BENCH_VENV := .venv-bench$(if $(filter-out $(PYTHON),$(BENCH_PYTHON)),-$(notdir $(BENCH_PYTHON)))
BENCH_BIN := $(BENCH_VENV)/bin
CONFORMANCE_BIN := .venv-conformance/bin
# The folder with the exchange's openapi.yaml, which is not part of this repository.
SPECS ?= ../shared/exchange-specs
# The first Python 3.12+ there is; pyenv's need not be on the path.
PYTHON312 ?= $(shell for each in python3.14 python3.13 python3.12 python3 \
    $$(ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.1[2-9]*/bin/python3 2> /dev/null | sort -rV); do \
    $$each -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2> /dev/null && echo $$each && break; done)

.PHONY: demo test coverage faults conformance bench bench-flat lint lock clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   real cancels through Redis, a Celery worker and a local exchange, and a table of what became of them"
	@echo "make test   the whole suite"
	@echo "make coverage  the whole suite, and what of the workers it does not reach (half as long again)"
	@echo "make faults the fault campaign: every kind of fault x 10 seeds x 500 cancels, into bench/results/faults.md (about an hour)"
	@echo "make conformance  the sandbox against the exchange's OpenAPI document (SPECS=FOLDER) and two clients of others (Python 3.12+), into bench/results/conformance.md"
	@echo "make bench  our service and other queues at the same work (about an hour; ARGS=--quick: 10 minutes), into bench/results/performance.md"
	@echo "make bench-flat  time until flat against the bound that the token budget sets (about half an hour; ARGS=--quick), the same document"
	@echo "make lint   ruff, mypy --strict, and the Lua checker"
	@echo "make lock   pin every dependency anew (versions and hashes)"

demo: .venv/ready
	@$(BIN)/python -m trials.demo

# Compiled tests are kept: each of the six processes would take ten seconds to compile them all.
test: .venv/ready
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(SPREAD)

# Measuring takes a third of the processor time: too much for each run of the suite.
coverage: .venv/ready
	@rm -f .coverage .coverage.*
	@$(BIN)/coverage run -m pytest $(SPREAD)
	@$(BIN)/coverage combine -q
	@$(BIN)/coverage report

faults: .venv/ready
	@$(BIN)/python -m trials.campaign --seeds 10 --cancels 500 --write bench/results/faults.md

# The two clients are the newest there are, on purpose; all that they need is pinned. The official one asks for Python
# 3.13, works on 3.12, and without --ignore-requires-python would be an old one there. The sdist has the document, too.
conformance:
	@test -f "$(SPECS)/openapi.yaml" || { echo "No OpenAPI document at $(SPECS)/openapi.yaml: make conformance SPECS=FOLDER (each sdist of kalshi-sdk has it in specs/)"; exit 1; }
	@"$(PYTHON312)" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2> /dev/null || { echo "Python 3.12 or newer is needed for the clients: install python3.12 or newer, or name it: make conformance PYTHON312=/path/to/python3.13"; exit 1; }
	@$(MAKE) -s .venv/ready .venv-conformance/ready PYTHON312="$(PYTHON312)"
	@echo "Getting the newest clients ..."
	@rm -rf .venv-conformance/sdist .venv-conformance/specs
	@$(CONFORMANCE_BIN)/pip download --disable-pip-version-check -q --no-deps --no-binary kalshi-sdk -d .venv-conformance/sdist kalshi-sdk
	@tar -xzf .venv-conformance/sdist/*.tar.gz -C .venv-conformance --strip-components=1 --wildcards '*/specs/*'
	@$(CONFORMANCE_BIN)/pip install --disable-pip-version-check -q --no-deps --upgrade --ignore-requires-python kalshi-python-sync .venv-conformance/sdist/*.tar.gz
	@$(CONFORMANCE_BIN)/pip check -q || { echo "A new release of a client needs other packages than are pinned: make lock"; exit 1; }
	@$(CONFORMANCE_BIN)/python -m conformance --specs $(SPECS) --newest .venv-conformance/specs --python $(BIN)/python --write bench/results/conformance.md

bench: $(BENCH_VENV)/ready
	@$(BENCH_BIN)/python -m bench.peers $(ARGS)

bench-flat: $(BENCH_VENV)/ready
	@$(BENCH_BIN)/python -m bench.flat $(ARGS)

lint: .venv/ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m trials.lua_check

# Flower has a folder of its own: where Celery finds it, each worker loads it at its start.
.venv/ready: requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@echo "Setting up .venv from requirements-dev.lock (once; about a minute) ..."
	@$(PYTHON) -m venv --clear .venv
	@{ $(BIN)/pip install --disable-pip-version-check --progress-bar off --require-hashes -r requirements-dev.lock 2>&1 \
	    || touch .venv/failed; } | tee .venv/install.log | grep --line-buffered -Eo '^(Collecting|Installing) [^ ]+' || true
	@test ! -e .venv/failed || { tail -n 20 .venv/install.log; exit 1; }
	@$(BIN)/pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@rm -rf .venv/flower && mkdir .venv/flower && mv .venv/lib/python3*/site-packages/flower* .venv/flower
	@touch $@

# The peers stay out of .venv. From Python 3.12 on there is one more (ardiq): make bench BENCH_PYTHON=python3.13
$(BENCH_VENV)/ready: requirements-bench.lock
	@$(BENCH_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make BENCH_PYTHON=python3.13 ...")'
	@echo "Setting up $(BENCH_VENV) from requirements-bench.lock (once; about a minute) ..."
	@$(BENCH_PYTHON) -m venv --clear $(BENCH_VENV)
	@$(BENCH_BIN)/pip install --disable-pip-version-check -q --require-hashes -r requirements-bench.lock
	@touch $@

.venv-conformance/ready: requirements-conformance.lock
	@echo "Setting up .venv-conformance from requirements-conformance.lock (once) ..."
	@$(PYTHON312) -m venv --clear .venv-conformance
	@$(CONFORMANCE_BIN)/pip install --disable-pip-version-check -q --require-hashes -r requirements-conformance.lock
	@touch $@

lock:
	uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-annotate --python-version 3.11 pyproject.toml -o requirements.lock
	uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-annotate --python-version 3.11 pyproject.toml --group dev -o requirements-dev.lock
	uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-annotate --python-version 3.11 pyproject.toml --group bench -o requirements-bench.lock
	uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-annotate --python-version 3.12 --group conformance --no-emit-package kalshi-sdk --no-emit-package kalshi-python-sync -o requirements-conformance.lock

clean:
	rm -rf .venv .venv-bench* .venv-conformance .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
