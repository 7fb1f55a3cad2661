# Every target sets up .venv first, when pyproject.toml or constraints.txt changed. Needs make and Python 3.11 or later.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PEERS := build/peers

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format bench bench-peers data clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(READY)  ## make .venv and install lrcompile with everything that tests and demo need

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"needs Python 3.11 or later, got {sys.version.split()[0]}; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,models,plot,many]'
	@touch $@

demo: $(READY)  ## compile a trained model for a V100 and for this machine, and measure it
	$(BIN)/python tools/demo.py

test: $(READY)  ## run the quick tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

test-all: $(READY) data  ## run slow tests and those on real data too (those of large data where it is fetched)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "" --hypothesis-profile=all

lint: $(READY)  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy -p tools

format: $(READY)  ## format the code and mend what the linter can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(READY)  ## compile two trained models for this machine with real data, and measure the gain
	$(BIN)/python tools/demo.py minilm efficientnet-lite0 --target local --calibrate --folder build/bench

bench-peers: $(READY) $(PEERS)/.ready data  ## measure other tools beside lrcompile, into docs/peers.md; takes hours
	$(BIN)/python tools/bench_peers.py resnet --speedup 3 --minutes 0.5 --python $(PEERS)/bin/python --out docs/peers.md
	$(BIN)/python tools/bench_peers.py vit --speedup 1.5 --minutes 0.5 --python $(PEERS)/bin/python --out docs/peers.md
	$(BIN)/python tools/bench_peers.py gpt --speedup 1.5 --minutes 1 --python $(PEERS)/bin/python --out docs/peers.md
	$(BIN)/python tools/bench_peers.py minilm --speedup 1.5 --minutes 1 --python $(PEERS)/bin/python --out docs/peers.md
	$(BIN)/python tools/bench_peers.py efficientnet-lite0 --speedup 1.1 --minutes 0.3 --python $(PEERS)/bin/python --out docs/peers.md

$(PEERS)/.ready: tools/peers/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check -r tools/peers/requirements.txt
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check --no-deps aimet-torch==2.42.0
	@touch $@

data: $(READY)  ## fetch the trained weights and real data into the user's cache
	$(BIN)/python tools/fetch_data.py

clean:  ## remove what was built here; the cache of fetched data stays
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis
