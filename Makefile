# One virtual environment, .venv, holds the package (editable). The demo needs little beside torch; the first of the
# other targets adds the tools of all of them.

PYTHON ?= python3
BIN := .venv/bin
DEMO := .venv/.demo
STAMP := .venv/.installed

# As variables, since these reach the isolated build too (newer pips read the second one there). The path is relative,
# since pip splits it at spaces.
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt

.PHONY: help demo test test-all bench docs lint clean

help:
	@echo "make demo      train a small model with AdamW, with NexusAdamW and with the control between them"
	@echo "make test      run the tests, with a sample of the long parameter products"
	@echo "make test-all  run all tests"
	@echo "make bench     run the benchmarks"
	@echo "make docs      build the documentation's site into site/"
	@echo "make lint      ruff and mypy"
	@echo "make clean     remove .venv, build output and caches"
	@echo "The first one creates .venv; PYTHON=python3.12 chooses its Python (3.10 or newer; make clean forgets it)."

demo: $(DEMO)
	$(BIN)/python -m nexus_fused.demo

test: $(STAMP)
	$(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

test-all: $(STAMP)
	$(BIN)/pytest -m "" -n auto --maxprocesses 8 --dist worksteal

bench: $(STAMP)
	$(BIN)/python -m bench

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open site/index.html, or, for the search, http://localhost:8000 after: python3 -m http.server --directory site"

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Python sources take effect by themselves; these files need a new install (__init__.py states the version).
$(DEMO): pyproject.toml constraints.txt nexus_fused/__init__.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("nexus_fused needs Python 3.10 or newer, " \
		"but $(PYTHON) is " + sys.version.split()[0] + "; choose another with: make PYTHON=python3.12 ...")'
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(PINNED) $(BIN)/python -m pip install -e '.[demo]'
	@touch $@

# By name and version: the package is there, and is neither built again nor taken from an index.
$(STAMP): $(DEMO)
	$(PINNED) $(BIN)/python -m pip install "nexus_fused[demo,test,trainers,optimizers,bench,docs,dev]==$$( \
		$(BIN)/python -c 'from importlib.metadata import version; print(version("nexus_fused"))')"
	@touch $@

clean:
	rm -rf .venv build dist site .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find nexus_fused triton_kernels tests bench docs -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
