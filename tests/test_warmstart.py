"""The warm start: a plain mean of contractions, found inside whatever state it lies in."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import tnt_state, without_tnt_state

from tnt_optax import Categorical, scale_by_tnt, tnt, value_and_sampled_grad, warm_start

SHAPE = (3, 4)


def trees(seed, steps):
    rng = np.random.default_rng(seed)
    return [{"w": jnp.asarray(rng.normal(size=SHAPE), jnp.float32), "b": jnp.ones(2) * i} for i in range(1, steps + 1)]


WRAPPERS = {
    "tnt": lambda: tnt(0.1, damping=0.2),
    "scale_by_tnt": lambda: scale_by_tnt(damping=0.2),
    "empirical": lambda: tnt(0.1, damping=0.2, fisher="empirical"),
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), tnt(damping=0.2), optax.scale_by_schedule(lambda t: -0.1)
    ),
    "masked": lambda: optax.masked(tnt(0.1, damping=0.2), lambda p: {"w": True, "b": False}),
    "partition": lambda: optax.partition(
        {"tnt": tnt(0.1, damping=0.2), "sgd": optax.sgd(0.1)}, lambda p: {"w": "tnt", "b": "sgd"}
    ),
    "inject": lambda: optax.inject_hyperparams(tnt)(learning_rate=lambda t: 0.1, damping=0.2),
    "apply_if_finite": lambda: optax.apply_if_finite(tnt(0.1, damping=0.2), 3),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_it_is_the_plain_mean_and_refreshes_and_leaves_all_else_alone(name):
    tx, params = WRAPPERS[name](), trees(0, 1)[0]
    before, batches = tx.init(params), trees(1, 14)
    after = warm_start(tx, before, params, iter(batches))
    contractions = [
        np.mean([reference.contraction(np.asarray(tree["w"], float), mode) for tree in batches], axis=0)
        for mode in range(2)
    ]
    state = tnt_state(after)
    assert int(state.statistics_count) == 14
    assert int(state.count) == 0
    chex.assert_trees_all_equal(state.momentum, tnt_state(before).momentum)
    # Sums of 14 terms in float32, and inverses of condition number about 10.
    chex.assert_trees_all_close(list(state.contractions["w"]), contractions, rtol=1e-5, atol=1e-5)
    inverses = [np.linalg.inv(u + 0.2 * np.eye(len(u))) for u in reference.normalize_factors(contractions)]
    chex.assert_trees_all_close(list(state.inverses["w"]), inverses, rtol=1e-4, atol=1e-5)
    assert int(state.refreshed_at["w"]) == 0
    assert float(state.damping) == pytest.approx(0.2)
    # All other states are as they were.
    chex.assert_trees_all_equal(without_tnt_state(before), without_tnt_state(after))


def test_the_functions_of_value_and_sampled_grad():
    params = {"w": jnp.ones((4, 3))}
    inputs = jax.random.normal(jax.random.key(0), (8, 4))
    value_and_grads = value_and_sampled_grad(lambda p, x: x @ p["w"], Categorical())
    sampled = [value_and_grads(params, inputs, jnp.zeros(8, int), jax.random.key(t))[2] for t in range(3)]
    tx = tnt(0.1)
    trees = [function() for function in sampled]
    expected = warm_start(tx, tx.init(params), params, trees)
    for iterable in (sampled, (lambda tree=tree: tree for tree in trees)):
        chex.assert_trees_all_close(warm_start(tx, tx.init(params), params, iterable), expected, rtol=1e-5)


def test_a_second_warm_start_goes_on_with_the_mean():
    tx, batches = tnt(0.1), trees(1, 4)
    whole = warm_start(tx, tx.init(batches[0]), batches[0], batches)
    half = warm_start(tx, tx.init(batches[0]), batches[0], batches[:2])
    chex.assert_trees_all_close(warm_start(tx, half, batches[0], batches[2:]), whole, rtol=1e-5)


def test_inside_jit():
    tx, batches = tnt(0.1), trees(1, 4)
    expected = warm_start(tx, tx.init(batches[0]), batches[0], batches)
    ours = jax.jit(lambda p, b: warm_start(tx, tx.init(p), p, b))(batches[0], batches)
    chex.assert_trees_all_close(ours, expected, rtol=1e-5)


def test_empty():
    tx, params = tnt(0.1), trees(0, 1)[0]
    with pytest.raises(ValueError, match=r"sampled_grads: expected at least one.*empty"):
        warm_start(tx, tx.init(params), params, [])


def test_no_state_of_ours():
    tx, params = optax.adam(0.1), trees(0, 1)[0]
    with pytest.raises(ValueError, match="opt_state: expected a TNTState"):
        warm_start(tx, tx.init(params), params, [params])


def test_gradients_that_do_not_fit():
    tx, params = tnt(0.1), trees(0, 1)[0]
    with pytest.raises(ValueError, match=r"sampled_grads\['w'\]: .*\(3, 4\) of the gradients, got \(4, 3\)"):
        warm_start(tx, tx.init(params), params, [{"w": jnp.ones((4, 3)), "b": jnp.ones(2)}])


def test_multi_steps_is_warm_started_inside():
    params, batches = trees(0, 1)[0], trees(1, 3)
    inner = tnt(0.1)
    tx = optax.MultiSteps(inner, 2).gradient_transformation()
    opt_state = tx.init(params)
    with pytest.raises(ValueError, match="MultiSteps"):
        warm_start(tx, opt_state, params, batches)
    opt_state = opt_state._replace(inner_opt_state=warm_start(inner, opt_state.inner_opt_state, params, batches))
    assert int(tnt_state(opt_state).statistics_count) == 3


def test_a_wrapper_that_does_not_update_the_state_it_holds():
    params = trees(0, 1)[0]
    tx = optax.conditionally_transform(tnt(0.1), lambda step, **extra: step > 5, forward_extra_args=True)
    with pytest.raises(ValueError, match=r"tx: .*absorbed none"):
        warm_start(tx, tx.init(params), params, [params])


@pytest.mark.parametrize("not_many", [{"w": jnp.ones(SHAPE)}, jax.tree_util.Partial(lambda: None), lambda: None, 3])
def test_one_gradient_instead_of_many(not_many):
    tx, params = tnt(0.1), trees(0, 1)[0]
    with pytest.raises(TypeError, match="sampled_grads: expected an iterable"):
        warm_start(tx, tx.init(params), params, not_many)


def test_another_start_of_the_same_optimizer_compiles_nothing():
    inner = tnt(0.1, damping=0.2)
    traced = []

    def update(updates, state, params=None, **extra_args):
        traced.append(1)
        return inner.update(updates, state, params, **extra_args)

    tx = optax.GradientTransformationExtraArgs(inner.init, update)
    for seed in (1, 2):
        params = trees(seed, 1)[0]
        warm_start(tx, tx.init(params), params, trees(seed, 3))
        assert len(traced) == 2  # To absorb, and to refresh.
