# Everything runs in .venv, built here from the lock; only Python 3.11+ and make are assumed.
PYTHON ?= python3
BIN := .venv/bin
# How the suite runs on two cores; the files that wait most come first.
SPREAD := -n 4 --dist loadfile --no-loadscope-reorder
BENCH_PYTHON ?= $(PYTHON)
BENCH_BIN := .venv-bench/bin

.PHONY: demo test coverage faults bench bench-flat lint lock clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   real cancels through Redis, a Celery worker and a local exchange, and a table of what became of them"
	@echo "make test   the whole suite"
	@echo "make coverage  the whole suite, and what of the workers it does not reach (half as long again)"
	@echo "make faults the fault campaign: every kind of fault x 10 seeds x 500 cancels, into docs/faults.md (about an hour)"
	@echo "make bench  our service and five other queues at the same work (about an hour; ARGS=--quick: 10 minutes), into docs/performance.md"
	@echo "make bench-flat  time until flat against the bound that the token budget sets (about half an hour; ARGS=--quick), the same document"
	@echo "make lint   ruff and mypy --strict"
	@echo "make lock   pin every dependency anew (versions and hashes)"

demo: .venv/ready
	@$(BIN)/python -m sandbox.demo

test: .venv/ready
	@$(BIN)/python -m pytest $(SPREAD)

# Measuring takes a third of the processor time: too much for each run of the suite.
coverage: .venv/ready
	@rm -f .coverage .coverage.*
	@$(BIN)/coverage run -m pytest $(SPREAD)
	@$(BIN)/coverage combine -q
	@$(BIN)/coverage report

faults: .venv/ready
	@$(BIN)/python -m sandbox.campaign --seeds 10 --cancels 500 --write docs/faults.md

bench: .venv-bench/ready
	@$(BENCH_BIN)/python -m bench.peers $(ARGS)

bench-flat: .venv-bench/ready
	@$(BENCH_BIN)/python -m bench.flat $(ARGS)

lint: .venv/ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

.venv/ready: requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@echo "Setting up .venv from requirements-dev.lock (once; about a minute) ..."
	@$(PYTHON) -m venv --clear .venv
	@{ $(BIN)/pip install --disable-pip-version-check --progress-bar off --require-hashes -r requirements-dev.lock 2>&1 \
	    || touch .venv/failed; } | tee .venv/install.log | grep --line-buffered -Eo '^(Collecting|Installing) [^ ]+' || true
	@test ! -e .venv/failed || { tail -n 20 .venv/install.log; exit 1; }
	@$(BIN)/pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@

# The peers stay out of .venv. From Python 3.12 on there is one more (ardiq): make bench BENCH_PYTHON=python3.13
.venv-bench/ready: requirements-bench.lock
	@$(BENCH_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make BENCH_PYTHON=python3.13 ...")'
	@echo "Setting up .venv-bench from requirements-bench.lock (once; about a minute) ..."
	@$(BENCH_PYTHON) -m venv --clear .venv-bench
	@$(BENCH_BIN)/pip install --disable-pip-version-check -q --require-hashes -r requirements-bench.lock
	@touch $@

lock:
	uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-annotate --python-version 3.11 pyproject.toml -o requirements.lock
	uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-annotate --python-version 3.11 pyproject.toml --group dev -o requirements-dev.lock
	uv pip compile -q --universal --generate-hashes --no-emit-index-url --no-annotate --python-version 3.11 pyproject.toml --group bench -o requirements-bench.lock

clean:
	rm -rf .venv .venv-bench .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
