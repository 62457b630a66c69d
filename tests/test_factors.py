"""The Kronecker factors: against dense Kronecker products, float64 NumPy, and known tensor-normal covariances.

Each way to store a factor is tested against the dense matrix that it stands for.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from tnt_optax import factors
from tnt_optax.factors import Dense, Diagonal

SHAPES = [(1,), (6,), (3, 5), (2, 4, 3), (2, 3, 1, 2, 3)]
STORED = [Dense(), Diagonal()]


def covariance(rng, d):
    """A random positive definite matrix, whose eigenvalues are within a factor of about 30 of each other."""
    root = rng.normal(size=(d, 2 * d + 2))
    return root @ root.T / d


def kronecker(matrices):
    return functools.reduce(np.kron, matrices)


def stored(factor, matrix):
    """The array that holds a dense matrix: all of it, or its diagonal."""
    return jnp.asarray(matrix if isinstance(factor, Dense) else np.diag(matrix), jnp.float32)


def dense(factor, array):
    """The dense matrix of a stored factor, in float64."""
    return np.asarray(array, float) if isinstance(factor, Dense) else np.diag(np.asarray(array, float))


def projected(factor, matrix):
    """What a factor keeps of a dense matrix."""
    return matrix if isinstance(factor, Dense) else np.diag(np.diag(matrix))


def normalize(contractions):
    size = math.prod(len(c) for c in contractions)
    return [factors.normalize_factor(Dense(), c, len(contractions), size) for c in contractions]


@pytest.mark.parametrize("factor", STORED)
def test_the_interface_of_a_factor_against_the_dense_matrix(factor):
    rng = np.random.default_rng(0)
    tensor, d = rng.normal(size=(3, 5, 2)), 5
    matrix = covariance(rng, d)
    array, expected = stored(factor, matrix), projected(factor, matrix)
    assert array.shape == factor.shape(d)
    # Sums of some 10 products of numbers of size 1, and an inverse of condition number 30, in float32.
    close = {"rtol": 1e-4, "atol": 1e-5}
    contraction = factor.contraction(jnp.asarray(tensor, jnp.float32), 1)
    np.testing.assert_allclose(dense(factor, contraction), projected(factor, reference.contraction(tensor, 1)), **close)
    np.testing.assert_allclose(factor.trace(array), np.trace(expected), **close)
    np.testing.assert_allclose(factor.spectrum(array), np.linalg.eigvalsh(expected), **close)
    inverse = factor.inverse(array, jnp.float32(0.1))
    np.testing.assert_allclose(dense(factor, inverse), np.linalg.inv(expected + 0.1 * np.eye(d)), **close)
    leading = np.moveaxis(tensor, 1, 0)
    product = factor.product(jnp.asarray(leading, jnp.float32), array)
    np.testing.assert_allclose(product, np.moveaxis(reference.mode_product(leading, expected, 0), 0, -1), **close)


@pytest.mark.parametrize("shape", SHAPES)
def test_mode_products_equal_the_dense_kronecker_solve(shape):
    """Proposition 1: vec(G x_1 U_1^-1 ... x_k U_k^-1) = (U_1 x ... x U_k)^-1 vec(G)."""
    rng = np.random.default_rng(len(shape))
    stored_as = [STORED[mode % 2] for mode in range(len(shape))]
    matrices = [projected(f, covariance(rng, d)) for f, d in zip(stored_as, shape, strict=True)]
    gradient = rng.normal(size=shape)
    # The paper's vec of a tensor and NumPy's row-major ravel go with the same order of the factors.
    expected = np.linalg.solve(kronecker(matrices), gradient.ravel()).reshape(shape)
    inverses = [f.inverse(stored(f, u), jnp.float32(0)) for f, u in zip(stored_as, matrices, strict=True)]
    direction = factors.mode_products(stored_as, jnp.asarray(gradient, jnp.float32), inverses)
    # Condition numbers of 30^k times float32's 6e-8; 2e-3 is loose enough for k = 5.
    np.testing.assert_allclose(direction, expected, rtol=2e-3, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_contractions(shape):
    gradient = np.random.default_rng(0).normal(size=shape)
    tensor = jnp.asarray(gradient, jnp.float32)
    for mode in range(len(shape)):
        expected = reference.contraction(gradient, mode)
        for factor in STORED:
            # Sums of at most 36 products of numbers of size 1 in float32.
            ours = dense(factor, factor.contraction(tensor, mode))
            np.testing.assert_allclose(ours, projected(factor, expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_normalized_factors(shape, scale):
    """Eq. (5) in float64, and what it is for: equal mean eigenvalues, and the covariance's trace."""
    rng = np.random.default_rng(1)
    contractions = [reference.contraction(scale * rng.normal(size=shape), 0)]
    size = math.prod(shape)
    contractions += [np.trace(contractions[0]) / d * covariance(rng, d) for d in shape[1:]]
    contractions = [c * np.trace(contractions[0]) / np.trace(c) for c in contractions]
    normalized = normalize([jnp.asarray(c, jnp.float32) for c in contractions])
    # Relative: a handful of roundings of 6e-8, and of k-th roots.
    chex.assert_trees_all_close(list(normalized), reference.normalize_factors(contractions), rtol=2e-6)
    c0 = (np.trace(contractions[0]) / size) ** (1 / len(shape))
    for u, d in zip(normalized, shape, strict=True):
        assert np.trace(u) / d == pytest.approx(c0, rel=1e-5)


def test_a_diagonal_factor_is_normalized_as_the_dense_one():
    contractions = [np.diag([1.0, 2.0, 3.0]), np.array([[4.0, 1.0], [1.0, 2.0]])]
    expected = reference.normalize_factors(contractions)
    ours = factors.normalize_factor(Diagonal(), jnp.array([1.0, 2.0, 3.0]), 2, 6)
    np.testing.assert_allclose(ours, np.diag(expected[0]), rtol=1e-6)  # float32


@pytest.mark.slow
def test_factors_of_tensor_normal_draws_converge_to_the_true_covariance():
    """Eq. (2) and (5): from draws alone, the Kronecker product of the U_i approaches the covariance."""
    rng = np.random.default_rng(2)
    shape = (3, 4, 2)
    true = [covariance(rng, d) for d in shape]
    roots = [jnp.asarray(np.linalg.cholesky(u), jnp.float32) for u in true]

    @jax.jit
    def mean_contractions(key):
        def of_one(key):
            g = jax.random.normal(key, shape)
            for root in roots:
                g = jnp.tensordot(g, root, axes=(0, 1))
            return [Dense().contraction(g, mode) for mode in range(3)]

        return [jnp.mean(c, axis=0) for c in jax.vmap(of_one)(jax.random.split(key, 50_000))]

    errors = []
    for draws in (1, 16):
        parts = [mean_contractions(key) for key in jax.random.split(jax.random.key(0), draws)]
        means = [np.mean(c, axis=0) for c in zip(*parts, strict=True)]
        estimate = kronecker([np.asarray(u) for u in normalize([jnp.asarray(c) for c in means])])
        errors.append(np.linalg.norm(estimate - kronecker(true)) / np.linalg.norm(kronecker(true)))
    # The standard error of a mean of n heavy-tailed squares is some units over sqrt(n), for n = 800,000: 0.003.
    assert errors[1] < 0.01
    assert errors[1] < errors[0]


@pytest.mark.parametrize("factor", STORED)
def test_zero_statistics_give_the_identity_over_damping(factor):
    u = factors.normalize_factor(factor, jnp.zeros(factor.shape(3)), 1, 3)
    # float32
    np.testing.assert_allclose(dense(factor, factor.inverse(u, jnp.float32(0.1))), 10 * np.eye(3), rtol=1e-6)


def test_empty_modes():
    contractions = [Dense().contraction(jnp.zeros((0, 3)), mode) for mode in range(2)]
    normalized = [factors.normalize_factor(Dense(), c, 2, 1) for c in contractions]
    inverses = [Dense().inverse(u, jnp.float32(0.5)) for u in normalized]
    chex.assert_shape(inverses, [(0, 0), (3, 3)])
    np.testing.assert_allclose(inverses[1], 2 * np.eye(3), rtol=1e-6)  # float32
    chex.assert_shape(factors.mode_products([Dense(), Dense()], jnp.zeros((0, 3)), inverses), (0, 3))


def test_the_inverse_can_be_differentiated_and_vmapped():
    rng = np.random.default_rng(4)
    u = jnp.asarray([covariance(rng, 4) for _ in range(3)], jnp.float32)
    tangent = jnp.asarray(rng.normal(size=(3, 4, 4)), jnp.float32)

    def trace_of_inverse(u):
        return jnp.sum(jax.vmap(lambda m: Dense().inverse(m, jnp.float32(0.1)))(u))

    inverses = np.linalg.inv(np.asarray(u, float) + 0.1 * np.eye(4))
    expected = -np.einsum("bij,bjk,bkl->", inverses, np.asarray(tangent, float), inverses)
    # Condition numbers of 30 in float32, in a product of three.
    assert jnp.vdot(jax.grad(trace_of_inverse)(u), tangent) == pytest.approx(expected, rel=1e-3)
    assert jax.jvp(trace_of_inverse, (u,), (tangent,))[1] == pytest.approx(expected, rel=1e-3)
