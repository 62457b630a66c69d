"""The transformation: against Algorithm 3 in float64 NumPy, and what its arguments do."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from absl.testing import parameterized
from helpers import SHAPES, VIEWS, as_views, count, random_trees, sampled_grad_of, tnt_state

import tnt_optax
from tnt_optax import TensorView, TNTState, adaptive_tnt, scale_by_tnt, tnt


def assert_same_params(params, expected, rtol):
    for name, ours, theirs in zip(SHAPES, as_views(params), expected, strict=True):
        scale = max(np.abs(theirs).max(), 1.0)
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * scale, err_msg=name)


class AgainstTheReference(parameterized.TestCase):
    @parameterized.parameters(
        {"periods": (1, 1), "max_dim": 1000, "warm": False},
        {"periods": (2, 5), "max_dim": 1000, "warm": True},
        {"periods": (3, 4), "max_dim": 4, "warm": False},  # Longer modes are diagonal.
        {"periods": (3, 4), "max_dim": 4, "warm": True},
        {"periods": (10, 4), "max_dim": 1000, "warm": False},
    )
    def test_27_steps(self, periods, warm, max_dim):
        statistics_period, inverse_period = periods
        hyperparams = {
            "damping": 0.05,
            "statistics_decay": 0.8,
            "momentum": 0.7,
            "weight_decay": 0.1,
            "statistics_period": statistics_period,
            "inverse_period": inverse_period,
            "max_dim": max_dim,
        }
        tx = tnt(0.02, **hyperparams)
        truth = reference.TNT(VIEWS, learning_rate=0.02, **hyperparams)
        (params,) = random_trees(0, 1)
        expected = as_views(params)
        opt_state = tx.init(params)
        if warm:
            batches = random_trees(1, 14)  # More than 1/(1-decay): a plain mean, not a moving average.
            opt_state = tnt_optax.warm_start(tx, opt_state, params, batches)
            truth.warm_start([as_views(batch) for batch in batches])
        update = jax.jit(tx.update)
        for grads, sampled in zip(random_trees(2, 27), random_trees(3, 27), strict=True):
            updates, opt_state = update(grads, opt_state, params, sampled_grads=sampled)
            params = optax.apply_updates(params, updates)
            expected = truth.step(expected, as_views(grads), as_views(sampled))
        # Inverses of condition number up to 1e3 in float32, three of them in a row, summed over 27 steps.
        assert_same_params(params, expected, rtol=2e-4)
        state = opt_state[0]
        assert int(state.count) == 27
        assert int(state.statistics_count) == truth.n

    @parameterized.parameters("sampled_function", "empirical")
    def test_the_other_ways_to_give_the_statistics(self, way):
        fisher = "empirical" if way == "empirical" else "sampled"
        hyperparams = {"damping": 0.05, "statistics_period": 2, "inverse_period": 5}
        tx, truth = tnt(0.02, fisher=fisher, **hyperparams), reference.TNT(VIEWS, learning_rate=0.02, **hyperparams)
        (params,) = random_trees(0, 1)
        expected, opt_state = as_views(params), tx.init(params)

        @jax.jit
        def step(params, opt_state, grads, sampled):
            extra = {} if way == "empirical" else {"sampled_grads": lambda: sampled}
            updates, opt_state = tx.update(grads, opt_state, params, **extra)
            return optax.apply_updates(params, updates), opt_state

        for grads, sampled in zip(random_trees(2, 25), random_trees(3, 25), strict=True):
            params, opt_state = step(params, opt_state, grads, sampled)
            expected = truth.step(expected, as_views(grads), as_views(grads if way == "empirical" else sampled))
        assert_same_params(params, expected, rtol=2e-4)


def test_float64_agrees_to_float64_precision():
    with jax.enable_x64(True):
        hyperparams = {"damping": 0.05, "statistics_period": 2, "inverse_period": 5}
        tx, truth = tnt(0.02, **hyperparams), reference.TNT(VIEWS, learning_rate=0.02, **hyperparams)
        (params,) = random_trees(0, 1, jnp.float64)
        expected, opt_state, update = as_views(params), tx.init(params), jax.jit(tx.update)
        steps = zip(random_trees(2, 25, jnp.float64), random_trees(3, 25, jnp.float64), strict=True)
        for grads, sampled in steps:
            updates, opt_state = update(grads, opt_state, params, sampled_grads=sampled)
            params = optax.apply_updates(params, updates)
            expected = truth.step(expected, as_views(grads), as_views(sampled))
        trees = (opt_state[0].momentum, opt_state[0].contractions, opt_state[0].inverses)
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(trees))
        # Condition numbers of 1e3 times 2e-16, and room for 25 steps.
        assert_same_params(params, expected, rtol=1e-10)


def test_contractions_and_inverses_in_the_state():
    params = {"w": jnp.ones((3, 4)), "long": jnp.ones((2, 9))}
    tx = scale_by_tnt(damping=0.3, max_dim=8)
    state = tx.init(params)
    assert isinstance(state, TNTState)
    chex.assert_shape(state.contractions["w"], [(3, 3), (4, 4)])
    chex.assert_shape(state.inverses["long"], [(2, 2), (9,)])
    chex.assert_trees_all_equal_shapes(state.momentum, params)
    grads, sampled = jax.tree.map(jnp.cos, params), {"w": jnp.arange(12.0).reshape(3, 4), "long": jnp.ones((2, 9))}
    _, state = tx.update(grads, state, sampled_grads=sampled)
    expected = [reference.contraction(np.arange(12.0).reshape(3, 4), mode) for mode in range(2)]
    for c, p, c_expected, u in zip(
        state.contractions["w"], state.inverses["w"], expected, reference.normalize_factors(expected), strict=True
    ):
        np.testing.assert_allclose(c, c_expected, rtol=1e-6)
        np.testing.assert_allclose(p, np.linalg.inv(u + 0.3 * np.eye(len(u))), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.contractions["long"][1], np.full(9, 2.0), rtol=1e-6)


@pytest.mark.slow
def test_diagonal_modes_are_those_of_a_small_max_dim():
    (grads,), (sampled,) = random_trees(0, 1), random_trees(1, 1)
    views = {"dense": TensorView(((0,), (1,)), diagonal_modes=(-1,)), "bias": TensorView(((0,),), diagonal_modes=(0,))}
    chosen = scale_by_tnt(damping=0.1, views=lambda path, shape: views.get(path[-1].key))
    small = scale_by_tnt(damping=0.1, max_dim=4)
    expected, state = small.update(grads, small.init(grads), sampled_grads=sampled)
    ours, chosen_state = chosen.update(grads, chosen.init(grads), sampled_grads=sampled)
    for name in views:
        chex.assert_trees_all_equal(ours[name], expected[name])
        chex.assert_trees_all_equal(chosen_state.contractions[name], state.contractions[name])
    chex.assert_shape(chosen_state.contractions["dense"], [(4, 4), (6,)])


@pytest.mark.parametrize("make", [tnt, scale_by_tnt])
def test_without_momentum_the_gradient_is_preconditioned_and_no_momentum_is_kept(make):
    hyperparams = {"damping": 0.1, "statistics_period": 2, "inverse_period": 3, "trust_radius": 0.5}
    none, zero = make(momentum=None, **hyperparams), make(momentum=0.0, **hyperparams)
    (params,) = random_trees(0, 1)
    state, zero_state = none.init(params), zero.init(params)
    assert tnt_state(state).momentum is None
    updates, zero_updates = jax.jit(none.update), jax.jit(zero.update)
    for grads, sampled in zip(random_trees(1, 4), random_trees(2, 4), strict=True):
        u, state = updates(grads, state, params, sampled_grads=sampled)
        v, zero_state = zero_updates(grads, zero_state, params, sampled_grads=sampled)
        chex.assert_trees_all_equal(u, v)
    assert int(tnt_state(state).bounded_steps) == int(tnt_state(zero_state).bounded_steps) > 0
    other = params | {"dense": params["dense"].T}
    with pytest.raises(ValueError, match=r"state: .*\['dense'\] of shape \(6, 4\).*another model"):
        none.update(other, state, params, sampled_grads=other)
    with pytest.raises(ValueError, match="updates: expected the structure of the optimizer's state"):
        none.update({"dense": params["dense"]}, state, params, sampled_grads=params)


def test_what_is_due_at_every_step_needs_no_conditional():
    params = {"w": jnp.ones((3, 2))}
    # Diagonal factors, because inverses of matrices choose the platform by a conditional.
    tx = tnt(0.1, statistics_period=1, inverse_period=1, inverse_parts=2, max_dim=1)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params, sampled_grads=params)
    assert count(jaxpr, "cond", inside_cond=False) == 0


def test_schedules_of_learning_rate_damping_and_trust_radius():
    """A schedule is evaluated at the step, the damping at the steps that refresh the inverses."""
    grads, sampled = random_trees(0, 6), random_trees(1, 6)
    rates, dampings = jnp.array([0.1, 0.2, 0.05, 0.4, 0.3, 0.1]), jnp.array([1.0, 0.5, 9.0, 0.2, 9.0, 9.0])
    scheduled = tnt(lambda t: rates[t], damping=lambda t: dampings[t], statistics_period=2, inverse_period=3)
    by_hand = optax.inject_hyperparams(scale_by_tnt)(damping=1.0, statistics_period=2, inverse_period=3)
    state, hand_state = scheduled.init(grads[0]), by_hand.init(grads[0])
    update, hand_update = jax.jit(scheduled.update), jax.jit(by_hand.update)
    refresh_damping = [1.0, 1.0, 9.0, 0.2, 0.2, 0.2]  # Refreshed at t = 0, 2 (because 2 < T2) and 3.
    for t in range(6):
        u, state = update(grads[t], state, grads[t], sampled_grads=sampled[t])
        hand_state.hyperparams["damping"] = jnp.float32(refresh_damping[t])
        p, hand_state = hand_update(grads[t], hand_state, grads[t], sampled_grads=sampled[t])
        assert float(state[0].damping) == pytest.approx(refresh_damping[t])
        chex.assert_trees_all_close(u, jax.tree.map(lambda x, r=rates[t]: -r * x, p), rtol=1e-4, atol=1e-6)


def test_without_a_learning_rate_the_direction_is_neither_negated_nor_scaled():
    (grads,), (sampled,) = random_trees(0, 1), random_trees(1, 1)
    direction = tnt(weight_decay=0.1)
    step = tnt(0.5, weight_decay=0.1)
    u, _ = direction.update(grads, direction.init(grads), grads, sampled_grads=sampled)
    v, _ = step.update(grads, step.init(grads), grads, sampled_grads=sampled)
    chex.assert_trees_all_close(jax.tree.map(lambda x: -0.5 * x, u), v, rtol=1e-6)
    chained = optax.chain(tnt(weight_decay=0.1), optax.scale_by_schedule(lambda count: -0.5))
    w, _ = chained.update(grads, chained.init(grads), grads, sampled_grads=sampled)
    chex.assert_trees_all_close(w, v, rtol=1e-6)


def test_weight_decay_mask():
    (grads,), (sampled,), (params,) = (random_trees(seed, 1) for seed in range(3))
    plain, decayed = tnt(0.5), tnt(0.5, weight_decay=0.1, weight_decay_mask=lambda p: {k: k == "dense" for k in p})
    u, _ = plain.update(grads, plain.init(params), params, sampled_grads=sampled)
    v, _ = decayed.update(grads, decayed.init(params), params, sampled_grads=sampled)
    u["dense"] -= 0.5 * 0.1 * params["dense"]
    chex.assert_trees_all_close(u, v, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("learning_rate", "trust_radius"),
    [
        (None, 0.05),
        (0.2, lambda t: 0.03 * jnp.float32(t + 1)),
        (lambda t: 0.1 * jnp.float32(t + 1), 0.05),
    ],
)
def test_trust_radius_bounds_the_step_in_the_metric_of_the_factors(learning_rate, trust_radius):
    grads, sampled = random_trees(0, 4), random_trees(1, 4)
    free = scale_by_tnt(damping=0.1, statistics_period=1, inverse_period=2)
    bounded = tnt(learning_rate, damping=0.1, statistics_period=1, inverse_period=2, trust_radius=trust_radius)
    free_state, state = free.init(grads[0]), bounded.init(grads[0])
    free_update, bounded_update = jax.jit(free.update), jax.jit(bounded.update)
    for t in range(4):
        p, free_state = free_update(grads[t], free_state, sampled_grads=sampled[t])
        u, state = bounded_update(grads[t], state, sampled_grads=sampled[t])
        rate = learning_rate(t) if callable(learning_rate) else learning_rate or 1.0
        radius = trust_radius(t) if callable(trust_radius) else trust_radius
        # <u, F u> with the dense, damped factors, in float64.
        squared_norm = 0.0
        for name, leaf in zip(SHAPES, as_views(jax.tree.map(lambda x, r=rate: r * x, p)), strict=True):
            metric = leaf
            for mode, inverse in enumerate(free_state.inverses[name]):
                metric = reference.mode_product(metric, np.linalg.inv(np.asarray(inverse, float)), mode)
            squared_norm += np.vdot(leaf, metric)
        assert squared_norm > radius**2  # Else the bound would not be tested.
        scale = radius / np.sqrt(squared_norm) * rate * (1 if learning_rate is None else -1)
        # The metric is computed from float32 inverses of condition number up to 1e3.
        chex.assert_trees_all_close(u, jax.tree.map(lambda x, s=scale: jnp.float32(s) * x, p), rtol=2e-3, atol=1e-6)


def test_a_large_trust_radius_changes_nothing():
    (grads,), (sampled,) = random_trees(0, 1), random_trees(1, 1)
    free, bounded = tnt(0.1), tnt(0.1, trust_radius=1e6)
    u, _ = free.update(grads, free.init(grads), sampled_grads=sampled)
    v, _ = bounded.update(grads, bounded.init(grads), sampled_grads=sampled)
    chex.assert_trees_all_close(u, v, rtol=1e-6)


@pytest.mark.parametrize("parts", [None, 2, 100])
def test_refreshes_in_parts(parts):
    """Each part has its own steps, of which t = 0 and all early ones are those of every part."""
    period, steps = 6, 20
    sampled = random_trees(1, steps)
    tx = scale_by_tnt(damping=0.1, statistics_period=1, inverse_period=period, inverse_parts=parts)
    state, update = tx.init(sampled[0]), jax.jit(tx.update)
    refreshed = {name: [] for name in SHAPES}
    for t in range(steps):
        before = state.inverses
        _, state = update(sampled[t], state, sampled_grads=sampled[t])
        for name in SHAPES:
            if np.array_equal(state.inverses[name][0], before[name][0]):
                continue
            refreshed[name].append(t)
            contractions = [np.asarray(c, np.float64) for c in state.contractions[name]]
            for p, u in zip(state.inverses[name], reference.normalize_factors(contractions), strict=True):
                # Condition numbers up to 1e3 in float32.
                expected = np.linalg.inv(u + 0.1 * np.eye(len(u)))
                np.testing.assert_allclose(p, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    offsets = set()
    for found in refreshed.values():
        late = [t for t in found if t >= period]
        assert found[: len(found) - len(late)] == list(range(period))  # With every absorbed gradient.
        offset = late[0] - period
        assert late == list(range(period + offset, steps, period))
        offsets.add(offset)
    # "dense" and "conv2d" and "conv3d" cost more than half of all.
    assert len(offsets) == 1 if parts in (None, 1) else len(offsets) > 1
    assert offsets <= {0, 3} if parts == 2 else True


def test_parts_cost_about_the_same():
    """Equal layers, one part each: one refresh at each step."""
    grads = [jnp.ones((3, 3)) for _ in range(4)]
    tx = tnt(0.1, damping=lambda t: 1 + jnp.float32(t), statistics_period=1, inverse_period=4, inverse_parts=4)
    state = tx.init(grads)
    update = jax.jit(lambda state: tx.update(grads, state, sampled_grads=grads)[1])
    for t in range(8):
        before = state[0].inverses
        state = update(state)
        changed = [i for i in range(4) if not np.array_equal(before[i][0], state[0].inverses[i][0])]
        assert changed == ([0, 1, 2, 3] if t < 4 else [t - 4])


def test_zero_gradients_and_statistics_give_zero_updates_and_a_finite_state():
    """A dead layer: U = 0 and P = I/damping, and with a trust radius 0/0 is not computed."""
    zeros = jax.tree.map(jnp.zeros_like, random_trees(0, 1)[0])
    tx = tnt(0.1, damping=0.25, trust_radius=0.1)
    u, state = tx.update(zeros, tx.init(zeros), sampled_grads=zeros)
    chex.assert_trees_all_equal(u, jax.tree.map(lambda x: -x, zeros))
    chex.assert_tree_all_finite(state)
    np.testing.assert_allclose(state[0].inverses["bias"][0], 4 * np.eye(5), rtol=1e-6)


def test_the_derivative_through_an_update_is_finite_without_statistics():
    g = jnp.ones((2, 3))

    def norm(sampled):
        tx = tnt(0.1)
        return jnp.sum(tx.update(g, tx.init(g), sampled_grads=sampled)[0])

    assert np.isfinite(jax.jit(jax.grad(norm))(jnp.zeros((2, 3)))).all()


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("optimizer", ["tnt", "adaptive_tnt"])
def test_the_compiled_program_grows_in_proportion_to_the_parameters(optimizer):
    """XLA may put a number that concerns all parameters, and all that it is made of, into the code for each of them."""

    def operations(layers):
        grads = [jnp.ones((3, 2))] * layers
        if optimizer == "tnt":
            tx = tnt(0.1, trust_radius=0.1, statistics_period=1)
            update = jax.jit(lambda g, s: tx.update(g, s, sampled_grads=g))
        else:
            tx = adaptive_tnt(trust_radius=0.1)
            update = jax.jit(lambda g, s: tx.update(g, s, sampled_grads=sampled_grad_of(g)))
        return update.lower(grads, tx.init(grads)).compile().as_text().count(" = ")

    # In proportion: about eight times (the sums of a number for each parameter grow, too). Quadratic: up to 64 times.
    assert operations(64) < 10 * operations(8)
