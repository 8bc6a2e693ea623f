# Every target sets up what it needs, in a virtual environment of this folder: nothing but python3 (>= 3.11, with venv) is asked for.
#   make PYTHON=python3.12 VENV=.venv-3.12 test     another Python, beside the first
VENV ?= .venv
PROMPT ?= The with statement
WORKERS ?= 2
PYTEST_ARGS ?=
EXTRAS_dev := [dev]
EXTRAS_docs := [docs]

BIN := $(VENV)/bin
export PYTHON PROMPT

.DEFAULT_GOAL := help
.PHONY: help demo chat test test-jax test-full test-all lint type docs site wheels wheel-arm package format hooks clean

help: ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

demo: $(VENV)/.run ## let the bundled model continue a sentence: make demo PROMPT="A list is"
	@$(BIN)/python -m jaxkv generate "$$PROMPT"

chat: $(VENV)/.run ## talk with it; what was said stays in the cache
	@$(BIN)/python -m jaxkv chat

# JAXKV_QUICK: without XLA's optimizations, which is a third of the time. The tests whose claims need them are `optimized`.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test: $(VENV)/.dev ## run all tests, the doctests and the code in README.md and docs/
ifdef PYTEST_ARGS
	$(PYTEST)
else
	JAXKV_QUICK=1 $(PYTEST) -m "not optimized"
	$(PYTEST) -m optimized
endif

# The cache, attention, the compiled loop, and the database of the memo: where another JAX or Python shows first.
JAX_TESTS := $(addprefix tests/test_,$(addsuffix .py,attend cache cross devices disk export generate imports native_devices pages plan setup \
  spec trees))

test-jax: $(VENV)/.dev ## run the tests that meet JAX most, and those of the compiled programs, for another Python
	JAXKV_QUICK=1 $(PYTEST) -m "not optimized" $(JAX_TESTS)
	$(PYTEST) -m optimized tests

test-full: $(VENV)/.dev ## run them with more random programs, every flipped bit and a million rows, all with XLA's optimizations: an hour
	JAXKV_FULL=1 $(PYTEST)

test-all: ## run the tests on every supported Python that is here
	@for version in 3.11 3.12; do \
	  if python=$$(.ci/find-python $$version); then \
	    $(MAKE) test PYTHON="$$python" VENV=".venv-$$version" || exit 1; \
	  else \
	    echo "Python $$version is not here; its tests were left out"; \
	  fi; \
	done

lint: $(VENV)/.dev ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/.dev ## check types
	$(BIN)/mypy
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python tests/public_types.py

docs: site ## build the documentation in docs/_build, and run all code that it shows
	$(BIN)/python -m pytest -q -n $(WORKERS) tests/test_readme.py

site: $(VENV)/.docs ## build the documentation only; a warning is an error
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build
	@echo "The documentation is in docs/_build/index.html"

# The same bytes from the same commit and compiler, whenever it is built.
wheels wheel-arm: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)
WHEEL = $(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist
wheels: $(VENV)/.run ## build the wheels of jaxkv and of its kernel for CPUs (jaxkv[cpu]) into dist/
	$(WHEEL) . ./native

wheel-arm: $(VENV)/.run ## build that of the kernel for Linux on aarch64, with the cross compiler aarch64-linux-gnu-g++
	CXX=aarch64-linux-gnu-g++ _PYTHON_HOST_PLATFORM=linux-aarch64 \
	  CMAKE_ARGS="-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64" $(WHEEL) ./native

package: ## build sdist and wheel, and use them in a clean environment, with the core alone and with memo, models and train
	.ci/package

format: $(VENV)/.dev ## repair style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(VENV)/.dev ## let git run lint and type before each commit
	$(BIN)/pre-commit install

clean: ## remove what the other targets made
	rm -rf .venv .venv-* .cache build dist docs/_build docs/api

# A stamp is made when pip has succeeded, and is out of date when pyproject.toml is newer. pip itself comes last into a new
# environment, so one that was interrupted is made again.
$(VENV)/.run $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: pyproject.toml
	@[ -x $(BIN)/pip ] || { python=$$(.ci/find-python) && echo "Making $(VENV) with $$python" && "$$python" -m venv --clear $(VENV); }
	@echo "Installing jaxkv$(EXTRAS_$*) into $(VENV) (once, a few minutes at most)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.$(EXTRAS_$*)'
	@touch $@
