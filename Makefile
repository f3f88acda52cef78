# Two commands do everything on a machine with Python 3.11, make, and (for test) Java 17 and Maven:
#   make demo     the main job: agents are killed and frozen, nobody calls a recovery; no Java
#   make test     everything, a real Kafka and a real PostgreSQL included

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
SOURCES := langgraph_peerctx graphs tests

.DEFAULT_GOAL := help
.PHONY: help demo studio notebooks test chaos matrix lint types mypy pyright format bench clean

help:
	@echo "make demo    agents are killed and frozen, nobody calls a recovery (about 20 s, no Java)"
	@echo "make studio  the graphs in LangGraph Studio's server, offline, on port 2024"
	@echo "make notebooks  the notebooks, run, as web pages in build/notebooks (the last needs Java)"
	@echo "make test    lint, types, layers, and all tests on a real Kafka and PostgreSQL"
	@echo "make chaos   200 kills, 200 freezes and the outages, on both databases (about 20 min)"
	@echo "make matrix  300 kills of each of three systems, and docs/evidence.md (about 15 min)"
	@echo "make bench   figures, each beside its yardstick"
	@echo "make format  format the code;  make clean  remove what was made here"

demo: $(VENV)/demo
	$(BIN)/python -m graphs.demo

studio: $(VENV)/studio
	LANGGRAPH_CLI_NO_ANALYTICS=1 LANGGRAPH_NO_VERSION_CHECK=true LANGSMITH_TRACING=false \
	$(BIN)/langgraph dev --no-browser

notebooks: $(VENV)/notebooks
	$(BIN)/jupyter nbconvert --execute --to html --output-dir build/notebooks notebooks/*.ipynb

# Tests wait more than they compute: four at a time, a file in one go; conftest.py has an order.
# The experiments have processes of their own, and want the machine for themselves.
test: $(VENV)/dev
	$(MAKE) --jobs 3 --output-sync lint mypy pyright
	$(BIN)/python -m pytest --ignore tests/chaos --ignore tests/matrix \
		--numprocesses 4 --dist loadfile --no-loadscope-reorder \
		--cov --cov-report term:skip-covered
	$(BIN)/python -m pytest tests/chaos \
		--numprocesses 3 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest tests/matrix

chaos: $(VENV)/dev
	PEERCTX_CHAOS=200 $(BIN)/python -m pytest tests/chaos --capture no

matrix: $(VENV)/dev
	$(BIN)/python tests/matrix/run.py --write \
		$(if $(KILLS),--kills $(KILLS)) $(if $(SEED),--seed $(SEED))

lint: $(VENV)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet
	$(BIN)/lint-imports --no-cache

types: mypy pyright

mypy: $(VENV)/dev
	$(BIN)/mypy

pyright: $(VENV)/dev
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(VENV)/dev
	$(BIN)/python tests/benchmarks/gather.py
	$(BIN)/python tests/benchmarks/langgraph_face.py
	$(BIN)/python tests/benchmarks/event_store.py
	$(BIN)/python tests/benchmarks/fence.py
	$(BIN)/python tests/benchmarks/death.py
	$(BIN)/python tests/benchmarks/revival.py --database sqlite
	$(BIN)/python tests/benchmarks/revival.py --database postgresql
	$(BIN)/python tests/benchmarks/dead_peer.py
	$(BIN)/python tests/benchmarks/recording.py
	$(BIN)/python tests/benchmarks/effects.py

clean:
	rm -rf $(VENV) .cache bench-results build .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis .langgraph_api .studio

# One environment; what each target needs is installed when it is first asked for, and again when
# the project's metadata changes.
$(VENV)/python:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/demo: $(VENV)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/studio: $(VENV)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[studio]'
	touch $@

$(VENV)/notebooks: $(VENV)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[notebooks]'
	touch $@

$(VENV)/dev: $(VENV)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/demo $(VENV)/notebooks $(VENV)/studio
