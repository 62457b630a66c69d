"""bfloat16 parameters and gradients: what they lose is the last rounding, and nothing before it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from tnt_optax import Categorical, scale_by_tnt, tnt, value_and_sampled_grad

SHAPES = [(24,), (16, 24), (4, 6, 8)]
HYPERPARAMS = {"damping": 0.1, "statistics_decay": 0.8, "momentum": 0.9, "statistics_period": 2, "inverse_period": 3}
ROUNDING = 2.0**-8  # Half a unit in the last of bfloat16's 8 bits, relative to the number.
EPSILON = float(np.finfo(np.float32).eps)


def wide(tree):
    """The numbers that the library gets, in float64."""
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def noise(truth, direction, index):
    """What float32 may do to a direction, relative to its largest element.

    An inverse has the relative error of its matrix's rounding errors, epsilon, times its condition number; a product
    with it in every mode adds those of its sums, epsilon times the square root of their length.
    """
    inverses = truth.inverses[index]
    relative = sum(np.linalg.cond(p) + np.sqrt(len(p)) for p in inverses) * EPSILON
    return relative * max(np.abs(direction).max(), 1e-30)


def assert_one_rounding(updates, truth, directions, factor=1.0):
    for index, (ours, theirs) in enumerate(zip(jax.tree.leaves(updates), directions, strict=True)):
        assert ours.dtype == jnp.bfloat16
        atol = abs(factor) * noise(truth, theirs, index)
        # The noise is small, so that a second rounding would be seen.
        assert atol < 0.1 * ROUNDING * abs(factor) * np.abs(theirs).max()
        np.testing.assert_allclose(np.asarray(ours, np.float64), factor * theirs, rtol=ROUNDING, atol=atol)


def assert_float32(state):
    arrays = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in arrays} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(("make", "factor"), [(scale_by_tnt, 1.0), (lambda **kw: tnt(0.03, **kw), -0.03)])
def test_the_direction_is_rounded_once(make, factor):
    tx = make(**HYPERPARAMS)
    truth = reference.TNT(SHAPES, learning_rate=1.0, **HYPERPARAMS)
    rng = np.random.default_rng(0)

    def random_tree(*sizes):
        return [jnp.asarray(c * rng.normal(size=s), jnp.bfloat16) for s, c in zip(SHAPES, sizes, strict=True)]

    params = random_tree(1, 1, 1)
    state, update = tx.init(params), jax.jit(tx.update)
    assert_float32(state)
    for _ in range(20):
        grads, sampled = random_tree(1, 1, 1), random_tree(0.3, 1, 3)
        updates, state = update(grads, state, params, sampled_grads=sampled)
        assert_one_rounding(updates, truth, truth.direction(wide(grads), wide(sampled)), factor)
        params = optax.apply_updates(params, updates)
    assert_float32(state)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_model_in_bfloat16(microbatches):
    """Losses and sampling in float32, gradients in bfloat16, and one rounding behind them."""
    rng = np.random.default_rng(1)
    params = [jnp.asarray(rng.normal(size=s) / 3, jnp.bfloat16) for s in ((12, 16), (16,), (16, 5))]
    inputs, labels = jnp.asarray(rng.normal(size=(32, 12)), jnp.bfloat16), jnp.asarray(rng.integers(0, 5, 32))
    tx = tnt(0.03, **HYPERPARAMS)
    truth = reference.TNT([x.shape for x in params], learning_rate=1.0, **HYPERPARAMS)

    def forward(params, x):
        return jnp.tanh(x @ params[0] + params[1]) @ params[2]

    @jax.jit
    def step(params, state, key):
        value_and_grads = value_and_sampled_grad(forward, Categorical(), microbatches=microbatches)
        loss, grads, sampled_grads = value_and_grads(params, inputs, labels, key)
        sampled = sampled_grads()
        updates, state = tx.update(grads, state, params, sampled_grads=sampled)
        return optax.apply_updates(params, updates), state, updates, loss, grads, sampled, forward(params, inputs)

    state = tx.init(params)
    for t in range(8):
        params, state, updates, loss, grads, sampled, outputs = step(params, state, jax.random.key(t))
        assert outputs.dtype == jnp.bfloat16
        assert {x.dtype for x in (*grads, *sampled)} == {jnp.dtype(jnp.bfloat16)}
        logits = np.asarray(outputs, np.float64)
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(32), labels]
        assert loss.dtype == jnp.float32
        # XLA may keep the logits inside a program in float32, where they are those of bfloat16 but for its rounding.
        np.testing.assert_allclose(loss, losses.mean(), rtol=ROUNDING)
        assert_one_rounding(updates, truth, truth.direction(wide(grads), wide(sampled)), -0.03)
    assert_float32(state)


def test_loss_and_samples_are_those_of_the_logits_in_float32():
    """Outside jit, where every operation is rounded as it says."""
    rng = np.random.default_rng(2)
    logits, key = jnp.asarray(rng.normal(size=(64, 5)), jnp.bfloat16), jax.random.key(0)
    labels = jnp.asarray(rng.integers(0, 5, 64))
    value_and_grads = value_and_sampled_grad(lambda shift, x: x + shift, Categorical(), scale="mean")
    loss, _, sampled_grads = value_and_grads(jnp.zeros(5, jnp.bfloat16), logits, labels, key)
    z = np.asarray(logits, np.float64)
    exact = np.log(np.exp(z).sum(axis=1)) - z[np.arange(64), labels]
    np.testing.assert_allclose(loss, exact.mean(), rtol=1e-6)
    drawn = np.asarray(jax.random.categorical(key, logits.astype(jnp.float32)))
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    per_example = (p - np.eye(5)[drawn]) / 64  # Each is rounded to bfloat16 once; a sum of them, once more.
    atol = ROUNDING * np.abs(per_example).sum(axis=0)
    np.testing.assert_array_less(np.abs(wide(sampled_grads())[0] - per_example.sum(axis=0)), 2 * atol)
