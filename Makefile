# `make test` and `make demo` do all their own set-up in .venv; they need Python >= 3.11 and a package index.
PYTHON ?= python3
# The versions to install; CONSTRAINTS=constraints-lowest.txt is the lowest that pyproject.toml declares, /dev/null the newest.
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup format lint types test test-wheel campaigns demo clean

setup: $(VENV)/.ready

# Everything at the versions of $(CONSTRAINTS); changed dependencies install anew.
$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit("maekit needs Python >= 3.11, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	touch $@

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The folders cli/ and exporters/ install as maekit.cli and maekit.exporters; mypy sees them so only in one tree.
types: setup
	rm -rf build/types && mkdir -p build/types
	cp -r maekit build/types/maekit && cp -r cli build/types/maekit/cli && cp -r exporters build/types/maekit/exporters
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

# A process for each core, up to four; a file's tests stay together, so that what they share is made once.
PYTEST := python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: lint types
	$(BIN)/$(PYTEST) -m "not whole or source"
	$(MAKE) test-wheel

# The built wheel, from outside the root, so that a sub-package missing from it cannot hide behind the source tree.
# The tests that go through whole commands (marker `whole`) run here only: the wheel is what users have.
test-wheel: setup
	rm -rf build/wheel build/lib && mkdir -p build/wheel/site build/wheel/run
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/wheel/site build/wheel/*.whl
	cp -r tests build/wheel/run/tests && cp pyproject.toml README.md build/wheel/run/
	cd build/wheel/run && PYTHONPATH=$(CURDIR)/build/wheel/site MAEKIT_WHEEL=$(CURDIR)/build/wheel/site $(CURDIR)/$(BIN)/$(PYTEST) -m "whole and not source"

# The same campaigns as in `make test`, in full: 10,000 of each damage, 300 kills of packing, training, embedding, and the
# dry run of bench/gpu; an hour.
campaigns: setup
	MAEKIT_CAMPAIGNS=1 $(BIN)/python -m pytest tests/campaigns tests/shards/test_pack.py tests/bench/test_gpu_bench.py -s

demo: setup
	$(BIN)/maekit demo

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
