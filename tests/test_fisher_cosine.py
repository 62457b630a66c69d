"""The program of the paper's Figure 1."""

import functools
import itertools
import json

import fisher_cosine
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_examples import program

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")
WIDTHS = (6, 5, 4, 3)


def problem(examples):
    rng = np.random.default_rng(0)
    return rng.normal(size=(examples, 6)).astype(np.float32), rng.integers(0, 3, examples).astype(np.int32)


def test_block_fisher_against_numpy():
    inputs, labels = problem(7)
    params = fisher_cosine.initial_parameters(WIDTHS, jax.random.key(1))
    model = functools.partial(fisher_cosine.forward, jnp.tanh)
    ours = jax.jit(functools.partial(fisher_cosine.block_fisher, model))(params, inputs, labels)
    weights = [np.asarray(layer["kernel"], np.float64) for layer in params]
    expected = [np.zeros((m + n * m, m + n * m)) for n, m in itertools.pairwise(WIDTHS)]
    for x, label in zip(inputs.astype(np.float64), labels, strict=True):
        activations, hidden = [x], x
        for index, w in enumerate(weights):
            outputs = hidden @ w
            hidden = np.tanh(outputs)
            if index < 2:
                activations.append(hidden)
        probabilities = np.exp(outputs) / np.exp(outputs).sum()
        delta = probabilities - np.eye(3)[label]
        for index in (2, 1, 0):
            vector = np.concatenate([delta, np.outer(activations[index], delta).ravel()])
            expected[index] += np.outer(vector, vector) / len(inputs)
            if index:
                delta = (weights[index] @ delta) * (1 - activations[index] ** 2)
    for mine, truth in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, truth, rtol=1e-3, atol=1e-6)  # float32 products of a few layers


@pytest.mark.slow
def test_under_a_large_damping_all_directions_are_the_gradients():
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs it.
        cosines, _ = fisher_cosine.compare(problem(600), widths=WIDTHS, batch_size=500, steps=4, damping=1e6)
    # Adam knows no damping, and TNT gives that of a kernel to each of its two factors, so that a bias gets its root.
    for name in ("KFAC", "Shampoo", "SGD-m"):
        # Factors of size 1 beside a damping of at least 1e3.
        np.testing.assert_allclose(cosines[name], 1, atol=1e-2, err_msg=name)
    assert np.all(np.abs(cosines["TNT"]) < 0.9)


@pytest.mark.parametrize(
    ("hidden", "names"),
    [
        ((20,), ("TNT", "KFAC", "SGD-m")),
        pytest.param(fisher_cosine.HIDDEN, tuple(fisher_cosine.methods(0.01)), marks=pytest.mark.slow),
    ],
    ids=["small", "whole"],
)
def test_program(tmp_path, monkeypatch, hidden, names):
    monkeypatch.setattr(fisher_cosine, "HIDDEN", hidden)
    methods = fisher_cosine.methods
    monkeypatch.setattr(fisher_cosine, "methods", lambda damping: {name: methods(damping)[name] for name in names})
    result = program("fisher_cosine", "--steps", 2, "--batch-size", 64, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "fisher_cosine_digits.json").read_text())
    assert {name: len(values) for name, values in written["cosines"].items()} == dict.fromkeys(names, 2)
    assert (tmp_path / "fisher_cosine_digits.png").read_bytes().startswith(b"\x89PNG")
