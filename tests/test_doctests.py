"""The examples in the docstrings run, and every public name has one."""

import doctest
import importlib
import pkgutil

import jax
import pytest

import tnt_optax

MODULES = [f"tnt_optax.{module.name}" for module in pkgutil.iter_modules(tnt_optax.__path__)]
STATES = {"TNTState", "QuadraticModelState"}  # Made by `init`.


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name == "tnt_optax.linen":
        pytest.importorskip("flax", reason="needs Flax")
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam promotes.
        assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", sorted(set(tnt_optax.__all__) - STATES))
def test_every_public_name_has_an_example(name):
    assert ">>>" in getattr(tnt_optax, name).__doc__
