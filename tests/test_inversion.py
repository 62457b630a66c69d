"""The inverse against float64, of sizes on both sides of the blocks that it is put together from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tnt_optax import inversion

SIZES = [1, 2, inversion._BLOCK - 1, inversion._BLOCK, inversion._BLOCK + 1, 2 * inversion._BLOCK + 3]


def positive(d, seed=0):
    root = np.random.default_rng(seed).normal(size=(d, 2 * d))
    return root @ root.T / d + 0.1 * np.eye(d)


@pytest.mark.parametrize("d", SIZES)
def test_inverse(d):
    matrix = positive(d)
    ours = np.asarray(jax.jit(inversion.inverse)(jnp.asarray(matrix, jnp.float32)))
    expected = np.linalg.inv(matrix)
    # Condition numbers below 60, times float32's 6e-8, with room for the order of the sums.
    assert np.linalg.norm(ours - expected, 2) < 60 * 6e-8 * 10 * np.linalg.norm(expected, 2)


@pytest.mark.parametrize("d", [7, inversion._BLOCK + 1])
def test_a_stack_of_inverses(d):
    matrices = np.stack([[positive(d, seed=3 * i + j) for j in range(3)] for i in range(2)])
    ours = jax.jit(jax.vmap(jax.vmap(inversion.inverse)))(jnp.asarray(matrices, jnp.float32))
    np.testing.assert_allclose(ours, np.linalg.inv(matrices), rtol=0, atol=1e-4)  # As above; the inverses are below 10.


@pytest.mark.parametrize("d", [3, inversion._BLOCK + 1])
def test_a_matrix_that_is_not_positive_definite_alone_is_nan(d):
    good = jnp.asarray(positive(d), jnp.float32)
    inverses = jax.jit(jax.vmap(inversion.inverse))(jnp.stack([good, -good]))
    assert np.isfinite(inverses[0]).all()
    assert np.isnan(np.diagonal(inverses[1])).any()  # What the refresh looks at.
