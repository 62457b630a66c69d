"""The inverse against float64, of sizes on both sides of the blocks that it is put together from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tnt_optax import linalg

SIZES = [1, 2, linalg._BLOCK - 1, linalg._BLOCK, linalg._BLOCK + 1, 2 * linalg._BLOCK + 3]


def positive(d, seed=0):
    root = np.random.default_rng(seed).normal(size=(d, 2 * d))
    return root @ root.T / d + 0.1 * np.eye(d)


@pytest.mark.parametrize("d", SIZES)
def test_inverse(d):
    matrix = positive(d)
    ours = np.asarray(jax.jit(linalg.inverse)(jnp.asarray(matrix, jnp.float32)))
    expected = np.linalg.inv(matrix)
    # Condition numbers below 60, times float32's 6e-8, with room for the order of the sums.
    assert np.linalg.norm(ours - expected, 2) < 60 * 6e-8 * 10 * np.linalg.norm(expected, 2)


@pytest.mark.parametrize("d", [7, linalg._BLOCK + 1])
def test_a_stack_of_inverses(d):
    matrices = np.stack([[positive(d, seed=3 * i + j) for j in range(3)] for i in range(2)])
    ours = jax.jit(jax.vmap(jax.vmap(linalg.inverse)))(jnp.asarray(matrices, jnp.float32))
    np.testing.assert_allclose(ours, np.linalg.inv(matrices), rtol=0, atol=1e-4)  # As above; the inverses are below 10.


def test_a_stack_of_numbers_needs_no_lapack():
    """On CPU, each call would be one iteration of a loop."""
    numbers = jnp.asarray([2.0, 0.0, -1.0]).reshape(3, 1, 1)
    np.testing.assert_array_equal(jax.vmap(linalg.inverse)(numbers).ravel(), [0.5, np.nan, np.nan])
    np.testing.assert_array_equal(jax.vmap(linalg.eigenvalues)(numbers).ravel(), numbers.ravel())
    program = str(jax.make_jaxpr(jax.vmap(lambda m: (linalg.inverse(m), linalg.eigenvalues(m))))(numbers))
    assert "cholesky" not in program
    assert "eigh" not in program


@pytest.mark.parametrize("d", [1, 3, linalg._BLOCK + 1])
def test_a_matrix_that_is_not_positive_definite_alone_is_nan(d):
    good = jnp.asarray(positive(d), jnp.float32)
    inverses = jax.jit(jax.vmap(linalg.inverse))(jnp.stack([good, -good]))
    assert np.isfinite(inverses[0]).all()
    assert np.isnan(np.diagonal(inverses[1])).any()  # What an inverse update tests.
