"""The experiment of the paper's Figure 1."""

import json

import jax
import numpy as np
import pytest
from scipy.special import softmax

fisher_cosine = pytest.importorskip("experiments.fisher_cosine", reason="the experiments need the extra `examples`")


def test_block_fisher_and_its_direction_against_numpy():
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(7, 6)).astype(np.float32), rng.integers(0, 3, 7).astype(np.int32)
    params = fisher_cosine.dense_layers((6, 5, 3), seed=1)
    w1, w2 = (np.asarray(layer["kernel"], float) for layer in params)
    hidden = np.tanh(inputs.astype(float) @ w1)
    delta = softmax(hidden @ w2, axis=1) - np.eye(3)[labels]
    layers = (inputs, delta @ w2.T * (1 - hidden**2)), (hidden, delta)
    for (x, d), actual in zip(layers, jax.jit(fisher_cosine.block_fisher)(params, inputs, labels), strict=True):
        vectors = np.concatenate([d, np.einsum("ni,nj->nij", x, d).reshape(7, -1)], axis=1)
        expected = vectors.T @ vectors / 7
        momentum = {"bias": rng.normal(size=d.shape[1]), "kernel": rng.normal(size=(x.shape[1], d.shape[1]))}
        direction = fisher_cosine.block_direction(actual, momentum, 0.1)
        solution = np.linalg.solve(expected + 0.1 * np.eye(len(expected)), np.append(*momentum.values()))
        # Float32, condition number below 100.
        np.testing.assert_allclose(np.append(*direction.values()), solution, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("damping", [0.01, pytest.param(1e6, marks=pytest.mark.slow)])
def test_program(tmp_path, monkeypatch, damping):
    monkeypatch.setattr(fisher_cosine, "HIDDEN", (5,))
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs it.
        fisher_cosine.main(batch_size=400, steps=3, damping=damping, out=tmp_path)
    cosines = json.loads((tmp_path / "fisher_cosine_digits.json").read_text())["cosines"]
    for name in ("TNT", "TNT-EF", "KFAC", "Shampoo", "Adam", "SGD-m"):
        values = np.array(cosines[name]).reshape(3, 2)
        assert np.all((values > 0) & (values <= 1)), name  # Of directions of descent.
        # Without damping the directions differ; beside one of 1e3 or more the factors, of size 1, do not matter. But
        # Adam knows no damping, and TNT's biases have the root of that of the kernels.
        assert np.all(values > 0.99) == (damping > 1 and name in ("KFAC", "Shampoo", "SGD-m")), name
