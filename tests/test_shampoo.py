"""The baseline of the examples, against eigenvalues in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.shampoo import inverse_root, shampoo


def covariance(rng, d):
    root = rng.normal(size=(d, 2 * d))
    return root @ root.T / d


def root_of(matrix, p):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values ** (-1 / p)) @ vectors.T


@pytest.mark.parametrize("p", [2, 4, 6])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_inverse_root(p, scale):
    matrix = scale * covariance(np.random.default_rng(0), 6)
    expected = root_of(matrix, p)
    # Condition number 30, in float32; the iteration stops at 1e-5.
    np.testing.assert_allclose(
        inverse_root(jnp.asarray(matrix, jnp.float32), p), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
    )


def test_steps_against_numpy():
    rng = np.random.default_rng(1)
    gradients = [rng.normal(size=(4, 3)) for _ in range(5)]
    tx = shampoo(0.1, damping=0.01, decay=0.8, momentum=0.5, statistics_period=1, inverse_period=3)
    state, update = tx.init(jnp.zeros((4, 3))), jax.jit(tx.update)
    left, right, velocity = np.zeros((4, 4)), np.zeros((3, 3)), np.zeros((4, 3))
    for t, g in enumerate(gradients):
        weight = max(0.2, 1 / (t + 1))
        left, right = (1 - weight) * left + weight * g @ g.T, (1 - weight) * right + weight * g.T @ g
        if t < 3 or t % 3 == 0:
            roots = root_of(left + 0.01 * np.eye(4), 4), root_of(right + 0.01 * np.eye(3), 4)
        velocity = 0.5 * velocity + g
        updates, state = update(jnp.asarray(g, jnp.float32), state)
        # Condition numbers up to 1e3 (rank-deficient statistics over the damping), to the power of 1/4.
        np.testing.assert_allclose(updates, -0.1 * roots[0] @ velocity @ roots[1], rtol=1e-2, atol=1e-3)
