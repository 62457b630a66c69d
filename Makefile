# `make demo` and `make test` work on a fresh machine with Python 3.11 or newer: each makes the environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo bench paper test test-all test-oldest lint docs notebooks package test-package clean help

help:
	@echo "make demo   train an autoencoder with adaptive TNT and with tuned optimizers (ARGS=--help for options)"
	@echo "make bench  the cost of a step, compared with other optimizers (ARGS=--help for options)"
	@echo "make paper  the paper's experiments in small: autoencoders, Figure 1, classification, Theorem 1, Table 1"
	@echo "make test   run the tests (make test-all: the long ones too)"
	@echo "make lint   ruff and pyright"
	@echo "make notebooks     run the notebooks"
	@echo "make test-oldest   run the tests with the lowest versions of all packages, in .venv-oldest"
	@echo "make package       the source distribution and the wheel, in dist (make test-package: run their tests)"
	@echo "make docs   the site, in site; warnings are errors"
	@echo "make clean  remove the environment and all results that are not committed"

# The packages `experiments` and `benchmarks` stand in examples/.
EXAMPLES = PYTHONPATH=examples $(BIN)/python -m

demo: $(VENV)/examples
	$(EXAMPLES) experiments run digits -o adaptive_tnt,tnt,adam,sgdm $(ARGS)
	$(EXAMPLES) experiments report

bench: $(VENV)/bench
	$(EXAMPLES) benchmarks step $(ARGS)

paper: $(VENV)/examples
	$(EXAMPLES) experiments run digits -o adaptive_tnt,tnt_published,kfac,shampoo,adam,sgdm --out results/paper
	$(EXAMPLES) experiments run digits_resnet -o adaptive_tnt,tnt,sgdm --epochs 5 --tuning-epochs 1 --out results/paper
	$(EXAMPLES) experiments report results/paper
	$(EXAMPLES) experiments.fisher_cosine
	$(EXAMPLES) experiments.convergence
	$(EXAMPLES) benchmarks complexity

test: $(VENV)/test
	$(BIN)/python -m pytest -n auto $(ARGS)

test-all: $(VENV)/test
	$(BIN)/python -m pytest -n auto -m '' $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

notebooks: $(VENV)/notebooks
	$(BIN)/python -m pytest -n auto --nbmake --nbmake-timeout=120 examples/notebooks $(ARGS)

docs: $(VENV)/docs
	$(BIN)/python -m sphinx -W --keep-going -q docs site $(ARGS)

package: $(VENV)/dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

test-package: package
	rm -rf build/sdist
	mkdir -p build/sdist
	tar -xzf dist/*.tar.gz -C build/sdist --strip-components=1
	$(MAKE) -C build/sdist test

test-oldest:
	test -x .venv-oldest/bin/uv || { $(PYTHON) -m venv .venv-oldest && .venv-oldest/bin/python -m pip install --quiet uv; }
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest --resolution lowest-direct --editable '.[test]'
	.venv-oldest/bin/python -m pytest -n auto $(ARGS)

# Each environment's file says that it is complete; they build on one another.
$(VENV)/examples: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tnt_optax needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[examples]'
	touch $@

$(VENV)/bench: $(VENV)/examples
	$(BIN)/python -m pip install --quiet --editable '.[examples,bench]'
	touch $@

$(VENV)/docs: $(VENV)/examples
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

$(VENV)/notebooks: $(VENV)/examples
	$(BIN)/python -m pip install --quiet --editable '.[notebooks]'
	touch $@

$(VENV)/test: $(VENV)/examples
	$(BIN)/python -m pip install --quiet --editable '.[examples,test]'
	touch $@

$(VENV)/dev: $(VENV)/test
	$(BIN)/python -m pip install --quiet --editable '.[examples,test,dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest results build dist site jupyter_execute .pytest_cache .ruff_cache
