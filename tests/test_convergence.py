"""The experiment of Theorem 1: each of its constants and its algorithm against independent float64 computations."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import contraction, normalize_factors
from scipy.special import softmax

convergence = pytest.importorskip("experiments.convergence", reason="the experiments need the extra `examples`")
DAMPING, SHAPE, RNG = 0.7, (4, 4, 3), np.random.default_rng(0)
INPUTS, LABELS = convergence.load(examples=6)
KNOWN = convergence.constants(INPUTS, DAMPING)
# Uniform to certain predictions, and one point where on one side of a plane there are two labels, alike.
POINTS = [np.zeros(SHAPE), *(scale * RNG.normal(size=SHAPE) for scale in (0.01, 0.1, 1, 10, 100))]
POINTS.append(1e4 * POINTS[1][..., :1] * np.array([1, 1, -1]))


def gradients(w):
    """Probabilities (n, 3) and gradients (n, 3, 4, 4, 3) of all images and labels, and the gradients of their own."""
    p = softmax(np.einsum("nij,ijk->nk", INPUTS.astype(float), w), axis=1)
    every = np.einsum("nij,nyk->nyijk", INPUTS.astype(float), p[:, None] - np.eye(3))
    return p / len(p), every, every[np.arange(len(LABELS)), LABELS]


def factors(w):
    """Eq. (5) from E[G^(i)], by the definition."""
    p, every, _ = gradients(w)
    pairs = [*zip(p.ravel(), every.reshape(-1, *SHAPE), strict=True)]
    return normalize_factors([sum(weight * contraction(g, mode) for weight, g in pairs) for mode in range(3)])


def dense_inverse(w):
    u1, u2, u3 = (u + DAMPING * np.eye(len(u)) for u in factors(w))
    return np.linalg.inv(np.kron(np.kron(u1, u2), u3))  # F_TNT^-1, (48, 48)


def test_the_constants_hold_and_are_not_wide():
    hessian = jax.jit(jax.hessian(lambda w: convergence.loss(w.reshape(SHAPE), INPUTS, LABELS)))
    curvatures = [np.linalg.eigvalsh(hessian(jnp.asarray(w.ravel(), jnp.float32))).max() for w in POINTS]
    # At W = 0 the largest eigenvalue of diag(p) - p p^T is 1/3, and 1/2 is its bound. Float32.
    np.testing.assert_allclose(curvatures[0], 2 / 3 * KNOWN.lipschitz, rtol=1e-4)
    assert max(curvatures) <= KNOWN.lipschitz
    # Large random weights are sure of a label, and wrong two times of three: |p - e_y|^2 = 2 for those.
    assert KNOWN.variance / 4 <= max(48 * np.var(gradients(w)[2], axis=0).mean() for w in POINTS) <= KNOWN.variance
    norms = np.array([[np.linalg.norm(u, 2) for u in factors(w)] for w in POINTS]).max(axis=0)
    bounds = np.array(convergence.factor_bounds(INPUTS))
    # Weights that cannot tell two of the labels apart come near to the last bound.
    assert np.all((norms <= bounds) & (norms >= bounds * [0.5, 0.5, 0.75]))
    eigenvalues = np.array([np.linalg.eigvalsh(dense_inverse(w)) for w in POINTS])
    assert KNOWN.kappa_low <= eigenvalues.min() <= 5 * KNOWN.kappa_low
    # Where the predictions are certain F_TNT^-1 = eps^-k I, up to rounding in float64.
    assert 0.99 * KNOWN.kappa_high <= eigenvalues.max() <= KNOWN.kappa_high * (1 + 1e-12)


@pytest.mark.parametrize("beta", [0.6, 0.9])
def test_the_bound_follows_from_the_inequality_of_one_step(beta):
    """f_(t+1) <= f_t - (t^-beta / r) n_t + (t^-2beta / r) sigma^2 / m, summed without integral or zeta function."""
    t, noise, r = np.arange(1, 3001.0), KNOWN.variance / 4, 2 / (KNOWN.step_size() * KNOWN.kappa_low)
    highest = np.log(3) + np.cumsum(np.append(0, t[:-1] ** (-2 * beta))) * noise / r
    exact = (r * np.cumsum((t**beta - (t - 1) ** beta) * highest) + noise * np.cumsum(t**-beta)) / t
    # The bound has M for the f_t and the integral for the sum: at most M / f_1. Rounding in float64.
    assert np.all((exact <= KNOWN.bound(t, beta, 4) * (1 + 1e-12)) & (KNOWN.bound(t, beta, 4) <= exact * 3))


def test_the_program_runs_algorithm_2(tmp_path):
    """Its squared gradient norms at the longest steps are those of the same batches and dense matrices."""
    convergence.main(steps=12, seeds=1, batch_size=3, damping=DAMPING, examples=6, out=tmp_path)
    rows = json.loads((tmp_path / "convergence.json").read_text())["rows"]
    w, norms = np.zeros(SHAPE), []
    for t in range(1, 13):
        own = gradients(w)[2]
        norms.append(np.sum(own.mean(axis=0) ** 2))
        batch = np.asarray(jax.random.randint(jax.random.fold_in(jax.random.key(0), t), (3,), 0, len(INPUTS)))
        direction = (dense_inverse(w) @ own[batch].mean(axis=0).ravel()).reshape(SHAPE)
        w = w - 100 * KNOWN.step_size() * t**-0.75 * direction
    assert norms[-1] < 0.6 * norms[0]  # The steps are long enough to tell.
    measured = np.array([row["measured"] for row in rows])
    np.testing.assert_allclose(measured[4], np.cumsum(norms) / np.arange(1, 13), rtol=1e-3)  # Float32, a dozen steps.
    # A smaller beta is faster, as in the theorem, and so are larger steps here.
    assert np.all(np.diff(measured[[4, 3, 0, 1, 2], -1]) > 0)
