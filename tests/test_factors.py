"""The Kronecker factors: against dense Kronecker products, float64 NumPy, and known tensor-normal covariances."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from tnt_optax import factors
from tnt_optax.modes import Modes, default_modes

SHAPES = [(1,), (6,), (3, 5), (2, 4, 3), (2, 3, 2, 4), (2, 3, 1, 2, 3)]


def covariance(rng, d):
    """A random positive definite matrix, whose eigenvalues lie within a factor of about 30."""
    root = rng.normal(size=(d, 2 * d + 2))
    return root @ root.T / d


def kronecker(matrices):
    return functools.reduce(np.kron, matrices)


def identify(contractions):
    size = math.prod(len(c) for c in contractions)
    return [factors.identify(c, len(contractions), size) for c in contractions]


@pytest.mark.parametrize("shape", SHAPES)
def test_mode_products_equal_the_dense_kronecker_solve(shape):
    """Proposition 1: vec(G x_1 U_1^-1 ... x_k U_k^-1) = (U_1 x ... x U_k)^-1 vec(G)."""
    rng = np.random.default_rng(len(shape))
    matrices = [covariance(rng, d) for d in shape]
    gradient = rng.normal(size=shape)
    # The paper's vec of a tensor and NumPy's row-major ravel go with the same order of the factors.
    expected = np.linalg.solve(kronecker(matrices), gradient.ravel()).reshape(shape)
    inverses = [factors.damped_inverse(jnp.asarray(u, jnp.float32), jnp.float32(0)) for u in matrices]
    direction = factors.mode_products(jnp.asarray(gradient, jnp.float32), inverses)
    # Condition numbers of 30^k times float32's 6e-8; 2e-3 is loose enough for k = 5.
    np.testing.assert_allclose(direction, expected, rtol=2e-3, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_contractions_and_their_diagonals(shape):
    gradient = np.random.default_rng(0).normal(size=shape)
    for mode in range(len(shape)):
        expected = reference.contraction(gradient, mode)
        tensor = jnp.asarray(gradient, jnp.float32)
        # Sums of at most 48 products of numbers of size 1 in float32.
        np.testing.assert_allclose(factors.contraction(tensor, mode, diagonal=False), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(factors.contraction(tensor, mode, diagonal=True), np.diag(expected), rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_identified_factors(shape, scale):
    """Eq. (5) in float64, and what it is for: equal mean eigenvalues, and the covariance's trace."""
    rng = np.random.default_rng(1)
    contractions = [reference.contraction(scale * rng.normal(size=shape), 0)]
    size = math.prod(shape)
    contractions += [np.trace(contractions[0]) / d * covariance(rng, d) for d in shape[1:]]
    contractions = [c * np.trace(contractions[0]) / np.trace(c) for c in contractions]
    identified = identify([jnp.asarray(c, jnp.float32) for c in contractions])
    # Relative: a handful of roundings of 6e-8, and of k-th roots.
    chex.assert_trees_all_close(list(identified), reference.identify(contractions), rtol=2e-6)
    c0 = (np.trace(contractions[0]) / size) ** (1 / len(shape))
    for u, d in zip(identified, shape, strict=True):
        assert np.trace(u) / d == pytest.approx(c0, rel=1e-5)


def test_identified_factors_of_diagonal_modes():
    contractions = [np.diag([1.0, 2.0, 3.0]), np.array([[4.0, 1.0], [1.0, 2.0]])]
    dense = reference.identify(contractions)
    diagonal = identify([jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray(contractions[1], jnp.float32)])
    np.testing.assert_allclose(diagonal[0], np.diag(dense[0]), rtol=1e-6)
    np.testing.assert_allclose(diagonal[1], dense[1], rtol=1e-6)


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
            return [factors.contraction(g, mode, diagonal=False) for mode in range(3)]

        return [jnp.mean(c, axis=0) for c in jax.vmap(of_one)(jax.random.split(key, 50_000))]

    errors = []
    for draws in (1, 16):
        parts = [mean_contractions(key) for key in jax.random.split(jax.random.key(0), draws)]
        means = [np.mean(c, axis=0) for c in zip(*parts, strict=True)]
        estimate = kronecker([np.asarray(u) for u in identify([jnp.asarray(c) for c in means])])
        errors.append(np.linalg.norm(estimate - kronecker(true)) / np.linalg.norm(kronecker(true)))
    # The standard error of a mean of n heavy-tailed squares is some units over sqrt(n), for n = 800,000: 0.003.
    assert errors[1] < 0.01
    assert errors[1] < errors[0]


def test_zero_statistics_give_the_identity_over_damping():
    for zeros in (jnp.zeros((3, 3)), jnp.zeros(3)):
        (u,) = identify([zeros])
        inverse = factors.damped_inverse(u, jnp.float32(0.1))
        expected = np.full(3, 10.0) if zeros.ndim == 1 else 10 * np.eye(3)
        np.testing.assert_allclose(inverse, expected, rtol=1e-6)


def test_empty_modes():
    contractions = [factors.contraction(jnp.zeros((0, 3)), mode, diagonal=False) for mode in range(2)]
    inverses = [factors.damped_inverse(u, jnp.float32(0.5)) for u in identify(contractions)]
    chex.assert_shape(inverses, [(0, 0), (3, 3)])
    np.testing.assert_allclose(inverses[1], 2 * np.eye(3), rtol=1e-6)
    chex.assert_shape(factors.mode_products(jnp.zeros((0, 3)), inverses), (0, 3))


def test_stacked_tensors_equal_separate_ones():
    rng = np.random.default_rng(3)
    stack = jnp.asarray(rng.normal(size=(4, 3, 2, 5)), jnp.float32)
    modes, single = Modes(((2,), (0,)), batch=(3, 1)), default_modes((2, 4))
    zeros = tuple(jnp.zeros((5, 3, d, d)) for d in (2, 4))
    weight, eps = jnp.float32(0.3), jnp.float32(0.1)
    contractions = factors.average_contractions(modes, stack, zeros, weight)
    ((inverses,), finite) = factors.damped_inverses([modes], [contractions], eps)
    assert finite
    direction = factors.precondition(modes, stack, inverses)
    for i in range(5):
        for j in range(3):
            one = stack[:, j, :, i].T
            c = factors.average_contractions(single, one, tuple(z[0, 0] for z in zeros), weight)
            ((p,), _) = factors.damped_inverses([single], [c], eps)
            expected = factors.precondition(single, one, p)
            slices = jax.tree.map(lambda x, at=(i, j): x[at], (contractions, inverses))
            # The same float32 operations in another order.
            chex.assert_trees_all_close((c, p), slices, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(direction[:, j, :, i].T, expected, rtol=1e-4, atol=1e-4)


def test_the_inverse_can_be_differentiated_and_vmapped():
    rng = np.random.default_rng(4)
    u = jnp.asarray([covariance(rng, 4) for _ in range(3)], jnp.float32)
    tangent = jnp.asarray(rng.normal(size=(3, 4, 4)), jnp.float32)

    def trace_of_inverse(u):
        return jnp.sum(jax.vmap(lambda m: factors.damped_inverse(m, jnp.float32(0.1)))(u))

    inverses = np.linalg.inv(np.asarray(u, float) + 0.1 * np.eye(4))
    expected = -np.einsum("bij,bjk,bkl->", inverses, np.asarray(tangent, float), inverses)
    assert jnp.vdot(jax.grad(trace_of_inverse)(u), tangent) == pytest.approx(expected, rel=1e-3)
    assert jax.jvp(trace_of_inverse, (u,), (tangent,))[1] == pytest.approx(expected, rel=1e-3)
