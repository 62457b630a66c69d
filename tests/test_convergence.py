"""The example of Theorem 1: each of its constants and its algorithm against independent float64 computations."""

import argparse
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import contraction, normalize_factors
from test_examples import program

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")
pytest.importorskip("matplotlib", reason="the examples need the extra `examples`")
pytest.importorskip("rich", reason="the examples need the extra `examples`")
pytest.importorskip("flax", reason="the examples need the extra `examples`")
import convergence

ROOT = Path(__file__).parent.parent
DAMPING = 0.7
DATA = convergence.load(examples=6)
KNOWN = convergence.constants(DATA.inputs, DAMPING)
SHAPE = (4, 4, 3)
EXACT_CONTRACTIONS, DIRECTION = jax.jit(convergence.exact_contractions), jax.jit(convergence.direction)


def weights():
    """Points between uniform predictions, where the Fisher matrix is large, and certain ones, where it vanishes."""
    rng = np.random.default_rng(0)
    points = [scale * rng.normal(size=SHAPE) for scale in (0.01, 0.1, 1, 10, 100)]
    line = 100 * points[0][..., 0]
    confused = 100 * np.stack([line, line, -line], axis=-1)  # On one side of it there are two labels, alike.
    return [np.zeros(SHAPE), *points, confused]


def probabilities(w, x):
    logits = np.einsum("ij,ijk->k", x.astype(float), w)
    p = np.exp(logits - logits.max())
    return p / p.sum()


def gradients(w):
    """(probability, gradient) for every image and every label, and the index of both."""
    for n, x in enumerate(DATA.inputs):
        p = probabilities(w, x)
        for y in range(3):
            yield n, y, p[y] / len(DATA.inputs), np.multiply.outer(x.astype(float), p - np.eye(3)[y])


def enumerated(w):
    """E[G^(i)], by the definition."""
    return [sum(weight * contraction(g, mode) for _, _, weight, g in gradients(w)) for mode in range(3)]


def dense_inverse(w):
    """F_TNT^-1, (48, 48)."""
    matrix = np.ones((1, 1))
    for u in normalize_factors(enumerated(w)):
        matrix = np.kron(matrix, u + DAMPING * np.eye(len(u)))
    return np.linalg.inv(matrix)


def full_gradient(w):
    return sum(g for n, y, _, g in gradients(w) if y == DATA.labels[n]) / len(DATA.inputs)


@pytest.mark.parametrize("w", weights())
def test_the_statistics_are_exact(w):
    expected = enumerated(w)
    actual = EXACT_CONTRACTIONS(jnp.asarray(w, jnp.float32), jnp.asarray(DATA.inputs))
    for a, e in zip(actual, expected, strict=True):
        # Logits up to some 1000 in float32 have errors of 1e-4, and so have the probabilities, relative to their size.
        np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-3 * np.abs(e).max() + 1e-12)


def test_the_direction_is_that_of_the_dense_matrix():
    w = weights()[2]
    gradient = np.random.default_rng(1).normal(size=SHAPE)
    actual = DIRECTION(
        jnp.asarray(w, jnp.float32), jnp.asarray(gradient, jnp.float32), jnp.asarray(DATA.inputs), DAMPING
    )
    # Float32; the condition number is below 100.
    np.testing.assert_allclose(actual, (dense_inverse(w) @ gradient.ravel()).reshape(SHAPE), rtol=1e-3, atol=1e-5)


def test_the_lipschitz_constant():
    inputs, labels = jnp.asarray(DATA.inputs), jnp.asarray(DATA.labels)
    hessian = jax.jit(jax.hessian(lambda w: convergence.loss(w.reshape(SHAPE), inputs, labels)))
    largest = [
        np.linalg.eigvalsh(np.asarray(hessian(jnp.asarray(w.ravel(), jnp.float32)), float)).max() for w in weights()
    ]
    assert max(largest) <= KNOWN.lipschitz
    # At W = 0, diag(p) - p p^T has the largest eigenvalue 1/3: the constant is no larger than it has to be. (Float32.)
    np.testing.assert_allclose(largest[0], 2 / 3 * KNOWN.lipschitz, rtol=1e-4)


def test_the_variance():
    variances = []
    for w in weights():
        own = [g for n, y, _, g in gradients(w) if y == DATA.labels[n]]
        variances.append(np.mean([np.sum((g - full_gradient(w)) ** 2) for g in own]))
    assert max(variances) <= KNOWN.variance
    # Large random weights are sure of a label, and wrong two times of three: |p - e_y|^2 = 2 for those.
    assert max(variances) >= KNOWN.variance / 4


def test_the_bounds_of_the_factors():
    eigenvalues = np.array([[np.linalg.eigvalsh(u).max() for u in normalize_factors(enumerated(w))] for w in weights()])
    bounds = np.array(convergence.factor_bounds(DATA.inputs))
    assert np.all(eigenvalues <= bounds)
    # None is so wide that it says nothing. Weights that cannot tell two of the labels apart come near to the last.
    assert np.all(eigenvalues.max(axis=0) >= [bounds[0] / 2, bounds[1] / 2, 0.75 * bounds[2]])


def test_the_bounds_of_the_preconditioner():
    eigenvalues = np.stack([np.linalg.eigvalsh(dense_inverse(w)) for w in weights()])
    # Where the predictions are certain H = eps^-k I up to rounding.
    assert eigenvalues.max() <= KNOWN.kappa_high * (1 + 1e-12)
    assert eigenvalues.min() >= KNOWN.kappa_low
    # Neither is so wide that it says nothing.
    assert eigenvalues.max() >= 0.99 * KNOWN.kappa_high
    assert eigenvalues.min() <= 5 * KNOWN.kappa_low


@pytest.mark.parametrize("beta", [0.6, 0.75, 0.9])
def test_the_bound_follows_from_the_inequality_of_one_step(beta):
    """f_(t+1) <= f_t - (t^-beta / r) n_t + (t^-2beta / r) sigma^2 / m, summed without integral or zeta function."""
    # The longest step for which kappa_low - L alpha kappa_high^2 / 2 is at least kappa_low / 2.
    assert KNOWN.lipschitz * KNOWN.step_size() * KNOWN.kappa_high**2 == pytest.approx(KNOWN.kappa_low)
    steps, batch = 3000, 4
    t = np.arange(1, steps + 1.0)
    r = 2 * KNOWN.lipschitz * KNOWN.kappa_high**2 / KNOWN.kappa_low**2
    noise = KNOWN.variance / batch
    highest = np.log(3) + np.concatenate([[0], np.cumsum(t ** (-2 * beta))])[:-1] * noise / r
    by_parts = np.cumsum((t**beta - (t - 1) ** beta) * highest)
    exact = (r * by_parts + noise * np.cumsum(t**-beta)) / t
    bound = KNOWN.bound(t, beta, batch)
    assert np.all(exact <= bound * (1 + 1e-12))
    # The bound is larger only by M in place of the f_t, and by the integral: at most M / f_1.
    assert np.all(bound <= exact * 3)


def test_a_run_is_algorithm_2():
    """The squared gradient norms of the first steps, with the same batches, in NumPy."""
    steps, batch_size, beta, step_size, key = 12, 3, 0.75, 0.4, jax.random.key(5)
    run = convergence.make_run(DATA, steps=steps, batch_size=batch_size, damping=DAMPING)
    actual = np.asarray(run(jnp.float32(step_size), jnp.float32(beta), key))
    w, expected = np.zeros(SHAPE), []
    for t in range(1, steps + 1):
        expected.append(np.sum(full_gradient(w) ** 2))
        batch = np.asarray(jax.random.randint(jax.random.fold_in(key, t), (batch_size,), 0, len(DATA.inputs)))
        of_image = {n: g for n, y, _, g in gradients(w) if y == DATA.labels[n]}
        gradient = np.mean([of_image[n] for n in batch], axis=0)
        w = w - step_size * t**-beta * (dense_inverse(w) @ gradient.ravel()).reshape(SHAPE)
    assert expected[-1] < expected[0] / 2  # The steps are long enough to tell.
    np.testing.assert_allclose(actual, expected, rtol=1e-3)  # Float32, a dozen steps.


def test_the_average_stays_below_the_bound_and_decreases():
    args = argparse.Namespace(steps=300, batch_size=8, damping=3.0, betas=[0.6, 0.75, 0.9], multiples=[], seeds=3)
    data = convergence.load(examples=10)
    rows = convergence.measure(data, convergence.constants(data.inputs, args.damping), args)
    assert [row["beta"] for row in rows] == args.betas
    for row in rows:
        measured, bound = np.array(row["measured"]), np.array(row["bound"])
        assert np.all(measured < bound)
        assert np.all(np.diff(measured) < 0)
        assert measured[-1] < 0.8 * measured[0]
    # A smaller beta is faster, as in the theorem.
    ends = [row["measured"][-1] for row in rows]
    assert ends == sorted(ends)


def test_program(tmp_path):
    options = ("--steps", 20, "--seeds", 2, "--examples", 5, "--betas", 0.6, 0.9, "--multiples", 10)
    result = program("convergence", *options, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "below the bound for every N" in result.stdout
    written = json.loads((tmp_path / "convergence.json").read_text())
    assert [(row["beta"], row["multiple"]) for row in written["rows"]] == [(0.6, 1), (0.9, 1), (0.9, 10)]
    assert written["rows"][0]["N"][-1] == written["arguments"]["steps"] == 20
    assert written["rows"][2]["measured"][-1] < written["rows"][1]["measured"][-1]
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")


def test_program_says_what_is_wrong():
    result = program("convergence", "--betas", 0.4)
    assert result.returncode == 2
    assert "between 0.5 and 1" in result.stderr


def test_the_page_has_the_numbers_of_the_program():
    page = (ROOT / "docs/theory.md").read_text()
    written = json.loads((ROOT / "docs/convergence.json").read_text())
    assert written["below_the_bound"]
    theorem = [row for row in written["rows"] if row["multiple"] == 1]
    for n in (1, 10, 100, 1000, 5000):
        i = theorem[0]["N"].index(n)
        cells = [f"{row[key][i]:.3g}" for row in theorem for key in ("measured", "bound")]
        assert re.search(rf"^\| {n:,} \| {re.escape(' | '.join(cells))} \|$", page, re.MULTILINE)
    slopes = " | ".join(f"{x:.2f}" for row in theorem for x in (row["slope"], row["beta"] - 1))
    assert f"| slope | {slopes} |" in page
    larger = " | ".join(f"{row['measured'][-1]:.3g}" for row in written["rows"] if row["multiple"] != 1)
    assert f"| {larger} |" in page
