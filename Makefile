# `make demo` and `make test` work on a fresh machine with Python 3.11 or newer: each makes the environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo bench paper test test-all lint docs clean help

help:
	@echo "make demo   train an autoencoder with adaptive TNT and with tuned optimizers (ARGS=--help for options)"
	@echo "make bench  the cost of a step, compared with other optimizers (ARGS=--help for options)"
	@echo "make paper  the paper's experiments in small: autoencoders, Figure 1, classification, Theorem 1, Table 1"
	@echo "make test   run the tests (make test-all: the long ones too)"
	@echo "make lint   ruff and pyright"
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

docs: $(VENV)/docs
	$(BIN)/python -m sphinx -W --keep-going -q docs site $(ARGS)

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

$(VENV)/test: $(VENV)/examples
	$(BIN)/python -m pip install --quiet --editable '.[examples,test]'
	touch $@

$(VENV)/dev: $(VENV)/test
	$(BIN)/python -m pip install --quiet --editable '.[examples,test,dev]'
	touch $@

clean:
	rm -rf $(VENV) results dist site .pytest_cache .ruff_cache
