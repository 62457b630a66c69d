"""Numbers that cannot be trusted never enter the state; hard statistics give a finite direction."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tnt_state

from tnt_optax import Categorical, TensorView, factors, scale_by_tnt, tnt, value_and_sampled_grad, warm_start
from tnt_optax.factors import Dense

BAD = [jnp.nan, jnp.inf, -jnp.inf]
VARIANTS = {"tnt": lambda **kw: tnt(0.1, weight_decay=0.1, **kw), "scale_by_tnt": scale_by_tnt}


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * rng.normal(size=s), jnp.float32) for name, s in {"w": (3, 4), "b": (4,)}.items()}


def spoiled(tree, value):
    return {**tree, "w": tree["w"].at[1, 2].set(value)}


def assert_rejected(opt_state, **counts):
    names = ("gradients", "sampled_gradients", "inverses")
    state = tnt_state(opt_state)
    found = {name: int(getattr(state, f"rejected_{name}")) for name in names}
    assert found == {**dict.fromkeys(names, 0), **counts}


def started(variant, lazy=False, **hyperparams):
    """An optimizer after three good steps, as a function (grads, state, sampled) -> (updates, state)."""
    tx = VARIANTS[variant](statistics_period=1, inverse_period=1, **hyperparams)
    params = random_tree(0)
    wrap = (lambda tree: lambda: tree) if lazy else lambda tree: tree
    update = jax.jit(lambda g, s, sampled: tx.update(g, s, params, sampled_grads=wrap(sampled)))
    state = tx.init(params)
    for t in range(3):
        _, state = update(random_tree(10 + t), state, random_tree(20 + t))
    return update, state


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("trust_radius", [None, 0.1])
def test_a_gradient_that_is_not_finite_gives_a_zero_update_and_leaves_the_momentum(variant, value, trust_radius):
    update, before = started(variant, trust_radius=trust_radius)
    updates, after = update(spoiled(random_tree(1), value), before, random_tree(2))
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    chex.assert_trees_all_equal(tnt_state(after).momentum, tnt_state(before).momentum)
    # The sampled gradient was good, and counts.
    assert int(tnt_state(after).statistics_count) == 4
    assert int(tnt_state(after).count) == 4
    assert_rejected(after, gradients=1)
    # Training goes on: the momentum is that of the good gradients.
    updates, last = update(random_tree(3), after, random_tree(4))
    expected = jax.tree.map(lambda m, g: 0.9 * m + g, tnt_state(before).momentum, random_tree(3))
    chex.assert_trees_all_close(tnt_state(last).momentum, expected, rtol=1e-6)
    assert all(np.any(u) for u in jax.tree.leaves(updates))
    chex.assert_tree_all_finite((updates, last))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [*BAD, 1e30])  # 1e30 squared is no float32.
@pytest.mark.parametrize("lazy", [False, True])
def test_a_sampled_gradient_that_is_not_finite_leaves_the_statistics(variant, value, lazy):
    update, before = started(variant, lazy)
    updates, after = update(random_tree(1), before, spoiled(random_tree(2), value))
    chex.assert_trees_all_equal(tnt_state(after).contractions, tnt_state(before).contractions)
    assert int(tnt_state(after).statistics_count) == 3
    assert_rejected(after, sampled_gradients=1)
    assert all(np.any(u) for u in jax.tree.leaves(updates))
    chex.assert_tree_all_finite((updates, after))


@pytest.mark.parametrize("variant", VARIANTS)
def test_inverses_that_are_not_finite_are_not_taken(variant):
    # A schedule that is at fault from step 3 on.
    update, before = started(variant, damping=lambda t: jnp.where(t < 3, jnp.float32(0.1), jnp.float32(jnp.nan)))
    updates, after = update(random_tree(1), before, random_tree(2))
    chex.assert_trees_all_equal(tnt_state(after).inverses, tnt_state(before).inverses)
    assert_rejected(after, inverses=2)  # Of two parameters.
    assert float(tnt_state(after).damping) == pytest.approx(0.1)  # That of the inverses.
    chex.assert_tree_all_finite((updates, after))


@pytest.mark.parametrize("damping", [0.0, -9.0])
def test_a_schedule_of_the_damping_that_is_not_positive_changes_no_inverse(damping):
    """Also of a diagonal factor, whose inverse would be finite, and negative."""
    views = {1: TensorView(((0,),), diagonal_modes=(0,))}
    update, before = started(
        "tnt",
        damping=lambda t: jnp.where(t < 3, jnp.float32(0.1), jnp.float32(damping)),
        views=lambda path, shape: views.get(len(shape)),
    )
    _, after = update(random_tree(1), before, random_tree(2))
    chex.assert_trees_all_equal(tnt_state(after).inverses, tnt_state(before).inverses)
    assert_rejected(after, inverses=2)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("trust_radius", [None, 0.1])
def test_nothing_moves_before_there_are_statistics(variant, trust_radius):
    """The inverse of U = 0 would be I/damping for each mode: a step that is 1e4 times the gradient."""
    params = random_tree(0)
    tx = VARIANTS[variant](statistics_period=2, inverse_period=4, trust_radius=trust_radius)
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(2):
        updates, state = update(random_tree(1), state, params, sampled_grads=spoiled(params, jnp.inf))
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
        assert not any(np.any(p) for p in jax.tree.leaves(tnt_state(state).inverses))
        assert int(tnt_state(state).count) == t + 1
    assert_rejected(state, sampled_gradients=1)
    updates, state = update(random_tree(1), state, params, sampled_grads=random_tree(2))
    assert all(np.any(u) for u in jax.tree.leaves(updates))
    # The momentum of all three gradients, with the inverses of the first statistics.
    expected = jax.tree.map(lambda g: (1 + 0.9 + 0.81) * g, random_tree(1))
    chex.assert_trees_all_close(tnt_state(state).momentum, expected, rtol=1e-6)
    assert_rejected(state, sampled_gradients=1)


def test_faults_at_the_first_step():
    params = random_tree(0)
    tx = tnt(0.1, trust_radius=0.1, weight_decay=0.1)
    bad = spoiled(params, jnp.nan), spoiled(params, jnp.inf)
    updates, state = tx.update(bad[0], tx.init(params), params, sampled_grads=bad[1])
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    chex.assert_tree_all_finite(state)
    assert_rejected(state, gradients=1, sampled_gradients=1)


@pytest.mark.parametrize("parts", [None, 2])
def test_a_factor_that_keeps_failing_does_not_stop_the_others(parts):
    """A dead layer with a damping that float32 takes for zero: its U + damping I is singular."""
    # Of full rank: the inverse of a singular statistic with such a damping is nothing but rounding errors.
    alive = jnp.asarray([[1.0, 2.0], [3.0, -1.0]])
    grads = {"alive": alive, "dead": jnp.ones((2, 3)), "stack": jnp.stack([alive, alive])}
    tx = scale_by_tnt(
        damping=1e-40,
        statistics_period=1,
        inverse_period=1,
        inverse_parts=parts,
        views=lambda path, shape: TensorView(((1,), (2,)), batch_axes=(0,)) if len(shape) == 3 else None,
    )
    state, update = tx.init(grads), jax.jit(tx.update)
    for t in range(3):
        before = state.inverses
        sampled = jax.tree.map(lambda g, t=t: (t + 1) * g, grads) | {
            "dead": jnp.zeros((2, 3)),
            "stack": jnp.stack([jnp.zeros_like(alive), alive]),  # Only one layer of it is dead.
        }
        updates, state = update(grads, state, sampled_grads=sampled)
        assert not np.array_equal(state.inverses["alive"][0], before["alive"][0])
        assert np.all(updates["alive"] != 0)
        assert not np.any(updates["dead"])
        assert not np.any(updates["stack"][0])
        assert np.all(updates["stack"][1] != 0)
        chex.assert_tree_all_finite((updates, state))
    assert_rejected(state, inverses=6)  # In three steps, a parameter and one layer of another.
    assert int(state.refreshed_at["dead"]) == -1
    assert state.refreshed_at["stack"].tolist() == [-1, 2]


def test_a_regularizer_that_is_not_finite_rejects_the_step():
    """Whether its gradient is finite or not."""
    params, inputs = {"w": jnp.ones((3, 2))}, jnp.eye(3)
    for regularizer in (lambda p: jnp.log(-jnp.sum(p["w"])), lambda p: 0 * jnp.sum(p["w"]) + jnp.inf):
        value_and_grads = value_and_sampled_grad(lambda p, x: x @ p["w"], Categorical(), regularizer=regularizer)
        tx = tnt(0.1)
        loss, grads, sampled_grads = value_and_grads(params, inputs, jnp.zeros(3, int), jax.random.key(0))
        updates, state = tx.update(grads, tx.init(params), params, sampled_grads=sampled_grads)
        assert not np.isfinite(loss)
        assert not np.any(updates["w"])
        assert int(tnt_state(state).statistics_count) == 1  # The sampled gradient has no part of it.
        assert_rejected(state, gradients=1)


def test_random_faults_during_a_training():
    """A tenth of all gradients and sampled gradients is spoiled, and a parabola is still minimized."""
    rng = np.random.default_rng(0)
    target, params = random_tree(1), random_tree(2)
    tx = tnt(0.02, damping=0.1, momentum=0.5, statistics_period=1, inverse_period=5, trust_radius=3.0)
    state, faults = tx.init(params), np.zeros(2, int)
    update = jax.jit(lambda g, s, p, sampled: tx.update(g, s, p, sampled_grads=lambda: sampled))
    for t in range(400):
        grads, sampled = jax.tree.map(jnp.subtract, params, target), random_tree(100 + t)
        spoil = rng.uniform(size=2) < 0.1
        faults += spoil
        grads = spoiled(grads, rng.choice(BAD)) if spoil[0] else grads
        sampled = spoiled(sampled, rng.choice(BAD)) if spoil[1] else sampled
        updates, state = update(grads, state, params, sampled)
        params = jax.tree.map(jnp.add, params, updates)
    chex.assert_trees_all_close(params, target, atol=1e-2)
    assert_rejected(state, gradients=faults[0], sampled_gradients=faults[1])


def test_a_warm_start_leaves_out_what_is_not_finite():
    params, tx = random_tree(0), tnt(0.1)
    good = [random_tree(t) for t in range(3)]
    state = warm_start(tx, tx.init(params), params, [good[0], spoiled(params, jnp.nan), *good[1:]])
    expected = warm_start(tx, tx.init(params), params, good)
    chex.assert_trees_all_equal(state[0].contractions, expected[0].contractions)
    assert int(state[0].statistics_count) == 3


def hard_statistics(kind, d, rng):
    basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
    if kind == "rank one":
        return np.outer(basis[0], basis[0])
    if kind == "rank-deficient":
        return basis[:, : d // 3] @ basis[:, : d // 3].T
    return (basis * np.logspace(0, -12, d)) @ basis.T  # condition number 1e12


@pytest.mark.parametrize("kind", ["rank one", "rank-deficient", "condition 1e12"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("relative_damping", [1e-1, 1e-4, 0.0])
def test_hard_statistics_give_a_finite_and_accurate_direction(kind, scale, relative_damping):
    """The error against float64 with the same damping, which has a floor (factors.Dense.inverse)."""
    rng = np.random.default_rng(0)
    dims = (60, 90)
    statistics = [hard_statistics(kind, d, rng) for d in dims]
    statistics = [np.float32(scale / np.trace(c)) * c.astype(np.float32) for c in statistics]
    # A gradient of the size that has such statistics: else the exact direction itself is no float32.
    gradient = (np.sqrt(scale) * rng.normal(size=dims)).astype(np.float32)
    normalized = [factors.normalize_factor(Dense(), jnp.asarray(c), 2, 5400) for c in statistics]
    mean_eigenvalue = np.sqrt(scale / 5400)  # c0: the trace of each statistic is `scale`.
    damping = max(relative_damping * mean_eigenvalue, 1e-37)
    inverses = [Dense().inverse(u, jnp.float32(damping)) for u in normalized]
    direction = np.asarray(factors.mode_products([Dense()] * 2, jnp.asarray(gradient), inverses))
    assert np.isfinite(direction).all()
    exact, conditions = gradient.astype(np.float64), 0.0
    for mode, (c, d) in enumerate(zip(statistics, dims, strict=True)):
        u = c.astype(np.float64) * mean_eigenvalue * d / np.trace(c.astype(np.float64))
        eps = max(damping, float(np.finfo(np.float32).eps) * np.abs(u).sum(axis=1).max())
        exact = np.moveaxis(np.tensordot(np.linalg.inv(u + eps * np.eye(d)), exact, axes=(1, mode)), 0, mode)
        conditions += np.linalg.norm(u, 2) / eps + 1
    error = np.linalg.norm(direction - exact) / np.linalg.norm(exact)
    # Backward stable: a small multiple of float32's 6e-8 times the condition numbers, which the floor keeps below 1e7.
    assert error < 2 * 6e-8 * conditions + 1e-5


def test_a_large_loss_and_a_large_network():
    """Gradients of 1e6 and factors of a thousand rows, at step 0, when the statistics have rank one."""
    rng = np.random.default_rng(0)
    grads = {"w": jnp.asarray(1e6 * np.outer(rng.normal(size=1000), rng.normal(size=300)), jnp.float32)}
    for damping in (1e-8, 0.1):
        tx = tnt(1e-3, damping=damping, trust_radius=0.1)
        updates, state = jax.jit(lambda g, s, tx=tx: tx.update(g, s, sampled_grads=g))(grads, tx.init(grads))
        chex.assert_tree_all_finite((updates, state))
        assert_rejected(state)
        assert np.any(updates["w"])


@pytest.mark.parametrize("fill", ["full", "third"])
def test_the_floor_of_the_damping_keeps_large_inverses_finite(fill):
    """Without damping of its own, a rank-deficient matrix of 1500 rows is inverted all the same."""
    rng = np.random.default_rng(0)
    d = 1500
    root = rng.normal(size=(d, d // 3 if fill == "third" else 1))
    inverse = Dense().inverse(jnp.asarray(root @ root.T, jnp.float32), jnp.float32(1e-30))
    assert np.isfinite(inverse).all()


def test_narrow_dtypes_do_not_overflow_before_the_learning_rate():
    """The direction, 1e5, is no float16; the update, -100, is."""
    params = jnp.full((2, 2), 0.1, jnp.float16)
    grads = jnp.full((2, 2), 10.0, jnp.float16)
    tx = tnt(1e-3, damping=0.01, momentum=0.0)
    updates, _ = tx.update(grads, tx.init(params), params, sampled_grads=jnp.zeros_like(params))
    np.testing.assert_allclose(updates, np.full((2, 2), -100.0), rtol=1e-3)  # float16's precision
    direction = scale_by_tnt(damping=0.01, momentum=0.0)
    updates, state = direction.update(grads, direction.init(params), sampled_grads=jnp.zeros_like(params))
    assert not np.any(updates)  # It has no value in float16.
    assert_rejected(state, gradients=1)
    tx = tnt(1e3, damping=0.01, momentum=0.0)
    updates, state = tx.update(grads, tx.init(params), params, sampled_grads=jnp.zeros_like(params))
    assert not np.any(updates)
    assert not np.any(tnt_state(state).momentum)
    assert_rejected(state, gradients=1)


def test_a_norm_that_overflows_is_not_taken_for_a_bounded_step():
    grads = {"w": jnp.full((3, 3), 1e25)}
    tx = tnt(1e-3, trust_radius=1.0)
    updates, state = tx.update(grads, tx.init(grads), sampled_grads=jax.tree.map(jnp.zeros_like, grads))
    assert not np.any(updates["w"])
    assert_rejected(state, gradients=1)
