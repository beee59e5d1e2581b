# Two commands: `make sweep` and `make test`. Both set up .venv first, once.
PYTHON ?= python3
STORE ?= mlruns
# Processes of tests, one more than CI has cores: some tests wait. A file's tests stay together and in
# order, the longest files first (tests/conftest.py) and not those with the most tests, as by default.
WORKERS ?= 3
export PYTHON
py = .venv/bin/python

.PHONY: docs help sweep test test-gpu lint ui bench stress versions compare clean

help:
	@echo "make sweep      set up .venv and run the first sweep (attention=aiter,sdpa)"
	@echo "make test       set up .venv and run linters, type checker and tests"
	@echo "make test-gpu   the tests that need a GPU"
	@echo "make ui         MLflow on http://127.0.0.1:5000, with the latest study open (STORE=mlruns)"
	@echo "make docs       the documentation as a site in build/site/"
	@echo "make bench      what a trial costs beside its own time, and how fast commands begin"
	@echo "make stress     300 random kills of sweeps and trials, and what was lost (5 to 10 minutes)"
	@echo "make versions   the tests that compile and measure, on each Python that the machine has"
	@echo "make compare    slots busy beside Hydra's own Optuna sweeper (installs it in build/)"
	@echo "make clean      remove .venv and caches; results in mlruns/ stay"

.venv/installed: pyproject.toml constraints.txt tools/setup.sh
	@echo "== setting up .venv (once; again when pyproject.toml or constraints.txt change)"
	sh tools/setup.sh
	@touch $@

sweep: .venv/installed
	$(py) -m openpi_opt.sweep -m attention=aiter,sdpa

lint: .venv/installed
	$(py) -m ruff check .
	$(py) -m ruff format --check .
	$(py) -m mypy

test: .venv/installed lint
	OMP_NUM_THREADS=1 $(py) -m pytest -m "not gpu" -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 15

test-gpu: .venv/installed
	$(py) -m pytest -m gpu

ui: .venv/installed
	$(py) -m openpi_opt.ui --store $(STORE) --port 5000

docs: .venv/installed
	$(py) -m pip -q install -c constraints.txt 'mkdocs-material>=9.5'
	$(py) -m mkdocs build -q

bench: .venv/installed
	$(py) -m benchmarks.bench

stress: .venv/installed
	$(py) -m benchmarks.stress

versions:
	sh tools/versions.sh

compare: .venv/installed
	$(py) -m benchmarks.compare_sweepers

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
