# Everything runs in .venv, made once and remade only when the content of pyproject.toml changes.
# Use another interpreter with `make test PYTHON=python3.12`, another place with VENV=...
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# Releases that are tested beside the installed one, each in a folder of its own.
OLD_SPIKINGJELLY := 0.0.0.0.12 0.0.0.0.14
# Named by content, not by date: a fresh checkout touches every file without changing one.
STAMP := $(VENV)/.installed-$(shell (cat pyproject.toml; echo $(OLD_SPIKINGJELLY)) | cksum | tr ' ' '-')
PYTEST_ARGS ?= -n auto --dist worksteal
WATCHED := --timeout-method thread -o faulthandler_timeout=480
DEMO_ARGS ?=
BENCH_ARGS ?=
FUZZ_SECONDS ?= 3600

# Memory that is freed stays with the process. On a virtual machine the page faults of large tensors, mapped
# and unmapped again and again, can take longer than the arithmetic.
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 1099511627776

# What is compiled from source is kept: without, each process of the tests that imports torch compiles it anew,
# several seconds of a core.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help venv demo test full wheel notebooks browser matrix lint format types docs unit slow fuzz bench quick clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

venv: $(STAMP)  ## make the environment with every extra

$(STAMP):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}: run make with PYTHON=python3.11")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -e '.[all,dev]'
	@rm -rf $(VENV)/old
	@for version in $(OLD_SPIKINGJELLY); do \
		$(PY) -m pip install --quiet --disable-pip-version-check --no-compile --no-deps \
			--target $(VENV)/old/spikingjelly-$$version spikingjelly==$$version || exit 1; done
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: $(STAMP)  ## train one network twice, stock and converted, and compare (under three minutes)
	$(PY) -m snn_reversible_plugin demo $(DEMO_ARGS)

test: lint types docs unit  ## lint, types, docs and all tests but the slow ones

lint: $(STAMP)  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP)  ## let ruff rewrite the files
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(STAMP)  ## mypy
	$(PY) -m mypy

unit: $(STAMP)  ## pytest alone; choose with PYTEST_ARGS="-k data"
	$(PY) -m pytest -m "not slow" $(WATCHED) --timeout 600 $(PYTEST_ARGS)

slow: $(STAMP)  ## what takes long, and is a part of `make full`
	$(PY) -m pytest -m slow $(WATCHED) --timeout 3600 $(PYTEST_ARGS)

fuzz: $(STAMP)  ## random programs, stock and converted, for FUZZ_SECONDS=3600; prints those that differ, and what it covered
	PYTHONPATH=tests/helpers $(PY) -m fuzz --seconds $(FUZZ_SECONDS)

full: test slow wheel notebooks browser matrix  ## all that and what is heavy: the wheel, notebooks, the site, every supported version

wheel: $(STAMP)  ## sdist and wheel, installed with each extra in environments of their own, in two Pythons
	$(PY) tools/wheel.py

notebooks: $(STAMP)  ## run the notebooks from the top; `python tools/notebooks.py --write` stores their outputs
	$(PY) tools/notebooks.py

browser: docs  ## the site in Chromium, as wide as a desk's and a phone's; pictures in out/browser
	$(PY) tools/browse.py

matrix: $(STAMP)  ## the fast tests in every supported version, one environment at a time: docs/compatibility.md
	$(PY) tools/matrix.py

docs: $(STAMP)  ## the site in out/site; a warning fails
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

bench: $(STAMP)  ## every experiment, stock and peers in the same run; goes on where it was interrupted
	$(PY) -m benchmarks run $(BENCH_ARGS)

quick: $(STAMP)  ## the same at small shapes, in two minutes; writes to out/ only
	$(PY) -m benchmarks run steps --profile quick $(BENCH_ARGS)

clean:  ## remove caches and outputs, keep the environment
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis dist demo.png out/site
	find src tests examples -name __pycache__ -type d -exec rm -rf {} +
