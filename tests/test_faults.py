"""Numbers that cannot be trusted never enter the state; hard statistics give a finite direction."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tnt_optax import TNTState, factors, scale_by_tnt, tnt, warm_start

BAD = [jnp.nan, jnp.inf, -jnp.inf]
VARIANTS = {"tnt": lambda **kw: tnt(0.1, weight_decay=0.1, **kw), "scale_by_tnt": scale_by_tnt}


def random_tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * rng.normal(size=s), jnp.float32) for name, s in {"w": (3, 4), "b": (4,)}.items()}


def spoiled(tree, value):
    return {**tree, "w": tree["w"].at[1, 2].set(value)}


def inner(state):
    return state if isinstance(state, TNTState) else state[0]


def assert_rejected(state, **counts):
    """`tnt` counts what it rejects; `scale_by_tnt` only rejects."""
    if not isinstance(state, TNTState):
        expected = {"gradients": 0, "sampled_gradients": 0, "inverses": 0, **counts}
        assert {name: int(count) for name, count in state[1]._asdict().items()} == expected


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
    chex.assert_trees_all_equal(inner(after).momentum, inner(before).momentum)
    # The sampled gradient was good, and counts.
    assert int(inner(after).statistics_count) == 4
    assert int(inner(after).count) == 4
    assert_rejected(after, gradients=1)
    # Training goes on: the momentum is that of the good gradients.
    updates, last = update(random_tree(3), after, random_tree(4))
    expected = jax.tree.map(lambda m, g: 0.9 * m + g, inner(before).momentum, random_tree(3))
    chex.assert_trees_all_close(inner(last).momentum, expected, rtol=1e-6)
    assert all(np.any(u) for u in jax.tree.leaves(updates))
    chex.assert_tree_all_finite((updates, last))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [*BAD, 1e30])  # 1e30 squared is no float32.
@pytest.mark.parametrize("lazy", [False, True])
def test_a_sampled_gradient_that_is_not_finite_leaves_the_statistics(variant, value, lazy):
    update, before = started(variant, lazy)
    updates, after = update(random_tree(1), before, spoiled(random_tree(2), value))
    chex.assert_trees_all_equal(inner(after).contractions, inner(before).contractions)
    assert int(inner(after).statistics_count) == 3
    assert_rejected(after, sampled_gradients=1)
    assert all(np.any(u) for u in jax.tree.leaves(updates))
    chex.assert_tree_all_finite((updates, after))


@pytest.mark.parametrize("variant", VARIANTS)
def test_inverses_that_are_not_finite_are_not_taken(variant):
    # A schedule that is at fault from step 3 on.
    update, before = started(variant, damping=lambda t: jnp.where(t < 3, jnp.float32(0.1), jnp.float32(jnp.nan)))
    updates, after = update(random_tree(1), before, random_tree(2))
    chex.assert_trees_all_equal(inner(after).inverses, inner(before).inverses)
    assert_rejected(after, inverses=1)
    chex.assert_tree_all_finite((updates, after))


def test_faults_at_the_first_step():
    params = random_tree(0)
    tx = tnt(0.1, trust_radius=0.1)
    updates, state = tx.update(spoiled(params, jnp.nan), tx.init(params), sampled_grads=spoiled(params, jnp.inf))
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    chex.assert_tree_all_finite(state)
    # Without statistics, U = 0.
    np.testing.assert_allclose(state[0].inverses["b"][0], 100 * np.eye(4), rtol=1e-6)


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


def identify(contractions):
    size = math.prod(len(c) for c in contractions)
    return [factors.identify(c, len(contractions), size) for c in contractions]


@pytest.mark.parametrize("kind", ["rank one", "rank-deficient", "condition 1e12"])
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e30])
@pytest.mark.parametrize("relative_damping", [1e-1, 1e-4, 1e-12, 0.0])
def test_hard_statistics_give_a_finite_and_accurate_direction(kind, scale, relative_damping):
    """The error against float64 with the same damping, which has a floor (factors.damped_inverse)."""
    rng = np.random.default_rng(0)
    dims = (60, 90)
    statistics = [hard_statistics(kind, d, rng) for d in dims]
    statistics = [np.float32(scale / np.trace(c)) * c.astype(np.float32) for c in statistics]
    # A gradient of the size that has such statistics: else the exact direction itself is no float32.
    gradient = (np.sqrt(scale) * rng.normal(size=dims)).astype(np.float32)
    factors_ = identify([jnp.asarray(c) for c in statistics])
    mean_eigenvalue = np.sqrt(scale / 5400)  # c0: the trace of each statistic is `scale`.
    damping = max(relative_damping * mean_eigenvalue, 1e-37)
    inverses = [factors.damped_inverse(u, jnp.float32(damping)) for u in factors_]
    direction = np.asarray(factors.mode_products(jnp.asarray(gradient), inverses))
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
    inverse = factors.damped_inverse(jnp.asarray(root @ root.T, jnp.float32), jnp.float32(1e-30))
    assert np.isfinite(inverse).all()


def test_narrow_dtypes_do_not_overflow_before_the_learning_rate():
    """The direction, 1e5, is no float16; the update, -100, is."""
    params = jnp.full((2, 2), 0.1, jnp.float16)
    grads = jnp.full((2, 2), 10.0, jnp.float16)
    tx = tnt(1e-3, damping=0.01, momentum=0.0)
    updates, _ = tx.update(grads, tx.init(params), params, sampled_grads=jnp.zeros_like(params))
    np.testing.assert_allclose(updates, np.full((2, 2), -100.0), rtol=1e-3)  # float16's precision
    direction = scale_by_tnt(damping=0.01, momentum=0.0)
    updates, _ = direction.update(grads, direction.init(params), sampled_grads=jnp.zeros_like(params))
    assert not np.any(updates)  # A step that cannot be said is not taken.
    tx = tnt(1e3, damping=0.01, momentum=0.0)
    updates, state = tx.update(grads, tx.init(params), params, sampled_grads=jnp.zeros_like(params))
    assert not np.any(updates)
    assert_rejected(state, gradients=1)


def test_a_norm_that_overflows_is_not_taken_for_a_bounded_step():
    grads = {"w": jnp.full((3, 3), 1e25)}
    tx = tnt(1e-3, trust_radius=1.0)
    updates, state = tx.update(grads, tx.init(grads), sampled_grads=jax.tree.map(jnp.zeros_like, grads))
    assert not np.any(updates["w"])
    assert_rejected(state, gradients=1)
