"""The baselines of the examples, against float64."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common.baselines import (
    LayerFactors,
    inverse_root,
    kfac,
    shampoo,
    tensor_normal_mle,
    value_and_layer_factors,
    warm_start,
)

import tnt_optax


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


def test_inverse_root_of_an_ill_conditioned_matrix():
    # One large eigenvalue beside many tiny ones, as the statistics of a few gradients with a small damping have.
    rng = np.random.default_rng(0)
    vectors, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    matrix = (vectors * np.where(np.arange(40) < 2, 1e3, 1e-5)) @ vectors.T
    ours = np.asarray(inverse_root(jnp.asarray(matrix, jnp.float32), 4), float)
    assert np.all(np.isfinite(ours))
    # No better than that in float32; without the stop the iteration ends in NaN or with huge elements.
    largest = np.linalg.norm(ours, 2)
    assert largest < 10 * (1e-5) ** -0.25


def test_steps_against_numpy():
    rng = np.random.default_rng(1)
    gradients = [rng.normal(size=(4, 3)) for _ in range(5)]
    tx = shampoo(0.1, damping=0.01, statistics_decay=0.8, momentum=0.5, statistics_period=1, inverse_period=3)
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


def test_maximum_likelihood_factors_against_numpy():
    rng = np.random.default_rng(7)
    eps, shape = 0.05, (4, 3, 2)
    tx = tensor_normal_mle(0.1, damping=eps, statistics_decay=0.8, momentum=0.5, statistics_period=1, inverse_period=3)
    params = {"a": jnp.zeros(shape), "b": jnp.zeros(3)}
    state, update = tx.init(params), jax.jit(tx.update)
    averages, factors, inverses = [np.zeros((d, d)) for d in shape], [], []
    vector, velocity = np.zeros((3, 3)), np.zeros(shape)
    for t in range(6):
        gradient, sampled, of_vector = rng.normal(size=shape), rng.normal(size=shape), rng.normal(size=3)
        if t == 0:  # U_j = c0 I, without damping.
            factors = [np.eye(d) * np.mean(sampled**2) ** (1 / 3) for d in shape]
            inverses = [np.linalg.inv(u) for u in factors]
        p1, p2, p3 = inverses
        e1, e2, e3 = (np.trace(p @ u) for p, u in zip(inverses, factors, strict=True))
        new = (
            np.einsum("ajk,bmn,jm,kn->ab", sampled, sampled, p2, p3) / (e2 * e3),
            np.einsum("jak,mbn,jm,kn->ab", sampled, sampled, p1, p3) / (e1 * e3),
            np.einsum("jka,mnb,jm,kn->ab", sampled, sampled, p1, p2) / (e1 * e2),
        )
        weight = max(0.2, 1 / (t + 1))
        averages = [(1 - weight) * u + weight * x for u, x in zip(averages, new, strict=True)]
        vector = (1 - weight) * vector + weight * np.outer(of_vector, of_vector)
        if t < 3 or t % 3 == 0:
            means = [np.trace(u) / len(u) for u in averages]
            factors = [u * np.prod(means) ** (1 / 3) / mean for u, mean in zip(averages, means, strict=True)]
            inverses = [np.linalg.inv(u + eps * np.eye(len(u))) for u in factors]
            inverse_of_vector = np.linalg.inv(vector + eps * np.eye(3))
        velocity = 0.5 * velocity + gradient
        grads = {"a": jnp.asarray(gradient, jnp.float32), "b": jnp.ones(3)}
        shown = {"a": jnp.asarray(sampled, jnp.float32), "b": jnp.asarray(of_vector, jnp.float32)}
        updates, state = update(grads, state, sampled_grads=shown)
        expected = -0.1 * np.einsum("ijk,ai,bj,ck->abc", velocity, *inverses)
        # Rank-one factors at first: condition numbers of some 100 each, in float32.
        np.testing.assert_allclose(updates["a"], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        of_ones = -0.1 * inverse_of_vector @ np.full(3, sum(0.5**s for s in range(t + 1)))
        np.testing.assert_allclose(updates["b"], of_ones, rtol=1e-3, atol=1e-4 * np.abs(of_ones).max())


def test_maximum_likelihood_factors_find_a_covariance():
    rng = np.random.default_rng(8)
    truth = [covariance(rng, 4), covariance(rng, 3)]
    roots = [np.linalg.cholesky(u) for u in truth]
    tx = tensor_normal_mle(
        1.0, damping=1e-4, statistics_decay=0.998, momentum=0.0, statistics_period=1, inverse_period=1
    )
    gradient = rng.normal(size=(4, 3))
    state = tx.init(jnp.zeros((4, 3)))
    draws = np.einsum("ai,nij,bj->nab", roots[0], rng.normal(size=(8000, 4, 3)), roots[1])
    state, updates = jax.lax.scan(
        lambda state, g: tx.update(jnp.asarray(gradient, jnp.float32), state, sampled_grads=g)[::-1],
        state,
        jnp.asarray(draws, jnp.float32),
    )
    expected = -np.linalg.solve(truth[0], gradient) @ np.linalg.inv(truth[1])
    # Averages of some 500 draws, each of which shows a factor 3 or 4 times: 3% of error; its condition is 10.
    error = np.linalg.norm(updates[-1] - expected) / np.linalg.norm(expected)
    assert error < 0.15


def test_maximum_likelihood_factors_of_zeros():
    tx = tensor_normal_mle(1.0, damping=0.1)
    zeros = jnp.zeros((3, 2))
    state = tx.init(zeros)
    for _ in range(3):
        updates, state = tx.update(jnp.ones((3, 2)), state, sampled_grads=zeros)
    # P = I / eps for each mode; momentum 0.9 of three steps.
    np.testing.assert_allclose(updates, np.full((3, 2), -2.71 / 0.1**2), rtol=1e-5)


def two_layers(params, inputs, tap=lambda x, y: y):
    hidden = tap(inputs, inputs @ params[0]["kernel"] + params[0]["bias"])
    hidden = jnp.maximum(hidden, 0)
    return tap(hidden, hidden @ params[1]["kernel"] + params[1]["bias"])


def layers(rng, sizes):
    return [
        {
            "kernel": jnp.asarray(rng.normal(size=(n, m)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=m), jnp.float32),
        }
        for n, m in itertools.pairwise(sizes)
    ]


def test_layer_factors_against_numpy():
    rng = np.random.default_rng(2)
    params, predictive = layers(rng, (3, 4, 2)), tnt_optax.Normal()
    inputs, targets = rng.normal(size=(5, 3)).astype(np.float32), rng.normal(size=(5, 2)).astype(np.float32)
    key = jax.random.key(3)
    loss, grads, factors = value_and_layer_factors(two_layers, predictive)(params, inputs, targets, key)
    # By hand, example by example.
    w1, b1, w2, b2 = (np.asarray(params[i][name], np.float64) for i in (0, 1) for name in ("kernel", "bias"))
    before = inputs.astype(np.float64) @ w1 + b1
    hidden = np.maximum(before, 0)
    outputs = hidden @ w2 + b2
    sampled = np.asarray(predictive.sample(key, jnp.asarray(outputs, jnp.float32)), np.float64)
    expected = []
    for x, of_outputs in (
        (inputs, (outputs - sampled) @ w2.T * (before > 0)),
        (hidden, outputs - sampled),
    ):
        x = np.concatenate([x, np.ones((5, 1))], axis=1)
        a = sum(np.outer(row, row) for row in x) / 5
        b = sum(np.outer(row, row) for row in of_outputs) / 5
        expected.append(LayerFactors(a, b))
    # float32 sums of a few products.
    chex.assert_trees_all_close(factors(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, np.sum((outputs - targets) ** 2) / 2 / 5, rtol=1e-5)
    np.testing.assert_allclose(grads[1]["kernel"], hidden.T @ (outputs - targets) / 5, rtol=1e-4, atol=1e-5)


def test_kfac_against_dense_kronecker_products():
    rng = np.random.default_rng(4)
    params = layers(rng, (3, 2))
    tx = kfac(0.1, damping=0.04, statistics_decay=0.8, momentum=0.5, statistics_period=1, inverse_period=3)
    state, update = tx.init(params), jax.jit(tx.update)
    a, b, velocity = np.zeros((4, 4)), np.zeros((2, 2)), np.zeros((4, 2))
    for t in range(5):
        gradient, new = rng.normal(size=(4, 2)), LayerFactors(covariance(rng, 4), 9 * covariance(rng, 2))
        weight = max(0.2, 1 / (t + 1))
        a, b = (1 - weight) * a + weight * new.inputs, (1 - weight) * b + weight * new.outputs
        if t < 3 or t % 3 == 0:
            fisher = np.kron(a + 0.2 * np.eye(4), b + 0.2 * np.eye(2))
        velocity = 0.5 * velocity + gradient
        expected = -0.1 * np.linalg.solve(fisher, velocity.ravel()).reshape(4, 2)
        tree = [{"kernel": jnp.asarray(gradient[:-1], jnp.float32), "bias": jnp.asarray(gradient[-1], jnp.float32)}]
        sampled = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), new)]
        updates, state = update(tree, state, sampled_grads=sampled)
        ours = np.concatenate([updates[0]["kernel"], updates[0]["bias"][None]])
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)  # Condition numbers below 100, in float32.


@pytest.mark.parametrize("optimizer", [shampoo, kfac])
def test_warm_start_is_the_mean_of_the_observations(optimizer):
    rng = np.random.default_rng(5)
    params = layers(rng, (3, 2))
    if optimizer is shampoo:
        observations = [layers(rng, (3, 2)) for _ in range(4)]
        contractions = [np.asarray(o[0]["kernel"], np.float64) for o in observations]
        expected = np.mean([g @ g.T for g in contractions], axis=0)
    else:
        observations = [[LayerFactors(covariance(rng, 4), covariance(rng, 2))] for _ in range(4)]
        expected = np.mean([o[0].inputs for o in observations], axis=0)
    tx = optax.inject_hyperparams(lambda learning_rate, damping: optimizer(learning_rate, damping=damping))(0.1, 0.1)
    before = tx.init(params)
    after = warm_start(tx, before, params, iter(observations))
    assert after.count == before.count
    state = after.inner_state[0]
    assert (state.count, state.statistics_count) == (0, 4)
    statistics, inverses = (
        tree[0]["kernel"][0] if optimizer is shampoo else tree[0].inputs for tree in (state.statistics, state.inverses)
    )
    np.testing.assert_allclose(statistics, expected, rtol=1e-5, atol=1e-6)  # float32
    assert np.all(np.linalg.eigvalsh(inverses) > 0)


@pytest.mark.parametrize("optimizer", [shampoo, kfac, tensor_normal_mle])
def test_the_first_state_can_be_donated(optimizer):
    params = layers(np.random.default_rng(6), (3, 2))
    tx = optimizer(0.1)
    observation = [LayerFactors(jnp.eye(4), jnp.eye(2))] if optimizer is kfac else params
    step = jax.jit(lambda state: tx.update(params, state, sampled_grads=observation), donate_argnums=0)
    updates, _ = step(tx.init(params))
    chex.assert_tree_all_finite(updates)
