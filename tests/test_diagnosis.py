"""Diagnostics: against eigenvalues, ages and counts that float64 NumPy finds from the same gradients."""

import re
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx

from tnt_optax import (
    Categorical,
    TensorView,
    adaptive_tnt,
    diagnostics,
    draw_diagnostics,
    scale_by_quadratic_model,
    scale_by_tnt,
    tnt,
    value_and_sampled_grad,
    warm_start,
)

# The shapes, and those in which they are preconditioned.
SHAPES = {
    "scalar": ((), (1,)),
    "bias": ((5,), (5,)),
    "dense": ((4, 6), (4, 6)),
    "conv": ((3, 2, 4, 3), (6, 4, 3)),
}
EPS = 0.2
OF_A_MODE = {
    "trace",
    "mean_eigenvalue",
    "smallest_eigenvalue",
    "largest_eigenvalue",
    "condition",
    "damped_condition",
    "share_below_damping",
}


def random_trees(seed, steps, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [{k: jnp.asarray(rng.normal(size=s), dtype) for k, (s, _) in SHAPES.items()} for _ in range(steps)]


def views(tree):
    return [np.asarray(tree[k], np.float64).reshape(view) for k, (_, view) in SHAPES.items()]


def expected_of_a_mode(u, eps):
    """In float64; `u` may be diagonal."""
    values = np.linalg.eigvalsh(u)
    return {
        "trace": np.trace(u),
        "mean_eigenvalue": values.mean(),
        "smallest_eigenvalue": values[0],
        "largest_eigenvalue": values[-1],
        "condition": np.linalg.cond(u),
        "damped_condition": np.linalg.cond(u + eps * np.eye(len(u))),
        "share_below_damping": np.mean(values < eps),
    }


def trained(tx, steps=14, dtype=jnp.float32):
    """The state after steps with random gradients, and the factors by the reference."""
    grads, sampled = random_trees(0, steps, dtype), random_trees(1, steps, dtype)
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    for g, s in zip(grads, sampled, strict=True):
        updates, state = update(g, state, g, sampled_grads=s)
    return state, grads[-1], updates, sampled


@pytest.mark.parametrize(
    ("max_dim", "dtype"), [pytest.param(1000, jnp.float32, marks=pytest.mark.slow), (4, jnp.float64)]
)
def test_the_factors_equal_numpy_s(max_dim, dtype):
    eps = 0.9  # Close to the mean of all eigenvalues.
    with jax.enable_x64(dtype == jnp.float64):
        tx = tnt(0.1, damping=eps, statistics_decay=0.8, statistics_period=1, inverse_period=5, max_dim=max_dim)
        state, _, _, sampled = trained(tx, dtype=dtype)
        truth = reference.TNT([v for _, v in SHAPES.values()], learning_rate=0.1, damping=eps, max_dim=max_dim)
        for tree in sampled:
            truth.absorb(views(tree), max(1 - 0.8, 1 / (truth.n + 1)))
        values = diagnostics(state)
        jitted = jax.jit(lambda s: diagnostics(s))(state)
        # An eigenvalue is off by a few times epsilon * the largest one, the smallest thus by the condition number times
        # as much, relatively: 200 * 6e-8, or 200 * 1e-16.
        rtol = 5e-5 if dtype == jnp.float32 else 1e-12
        for name, contractions in zip(SHAPES, truth.contractions, strict=True):
            for mode, u in enumerate(reference.normalize_factors(contractions)):
                expected = expected_of_a_mode(u, eps)
                assert expected["condition"] < 200
                # No eigenvalue is so close to the damping that rounding could put it on the other side.
                assert np.min(np.abs(np.linalg.eigvalsh(u) / eps - 1)) > 1e-3
                for what, value in expected.items():
                    key = f"{name}/mode_{mode}/{what}"
                    assert values[key].dtype == dtype
                    for ours in (values, jitted):
                        np.testing.assert_allclose(ours[key], value, rtol=rtol, err_msg=key)
        shares = [v for k, v in values.items() if "share_below" in k]
        assert any(0 < share < 1 for share in shares)
        assert set(values) == set(jitted)


def test_the_modes_make_up_the_fisher_matrix_of_the_parameter():
    """U_1 x U_2 of all elements: its trace is E|G|^2, and its condition number the product."""
    state, _, _, sampled = trained(tnt(0.1, statistics_period=1), steps=9)
    values = diagnostics(state)
    contractions = [
        np.mean([reference.contraction(views(tree)[2], mode) for tree in sampled], axis=0) for mode in range(2)
    ]
    kronecker = np.kron(*reference.normalize_factors(contractions))
    traces, conditions = ([values[f"dense/mode_{i}/{what}"] for i in range(2)] for what in ("trace", "condition"))
    # float32 as above. The first ten statistics are a plain mean.
    np.testing.assert_allclose(np.prod(traces), np.trace(kronecker), rtol=1e-5)
    np.testing.assert_allclose(np.prod(traces), np.mean([np.sum(views(tree)[2] ** 2) for tree in sampled]), rtol=1e-5)
    np.testing.assert_allclose(np.prod(conditions), np.linalg.cond(kronecker), rtol=1e-3)


@pytest.mark.parametrize("max_dim", [pytest.param(1000, marks=pytest.mark.slow), 3])
def test_a_stack_has_arrays_of_its_shape(max_dim):
    """The same numbers as each layer has alone; with modes as long as the stack, and of length 1."""
    rng = np.random.default_rng(0)
    sampled = [rng.normal(size=(2, 4, 3, 4, 1)).astype(np.float32) for _ in range(6)]
    stacked = tnt(0.1, views=lambda path, shape: TensorView(((1,), (3,), (4,)), batch_axes=(0, 2)), max_dim=max_dim)
    alone = tnt(0.1, max_dim=max_dim)
    zeros = jnp.zeros_like(sampled[0])
    values = diagnostics(warm_start(stacked, stacked.init(zeros), zeros, map(jnp.asarray, sampled)))
    for i in range(2):
        for j in range(3):
            slices = [jnp.asarray(x[i, :, j]) for x in sampled]
            state = warm_start(alone, alone.init(slices[0]), slices[0], slices)
            of_one = diagnostics(state)
            for mode in range(3):
                for what in OF_A_MODE:
                    key = f"mode_{mode}/{what}"
                    assert values[key].shape == (2, 3)
                    # The same operations in float32, batched; condition numbers of up to 1e2.
                    np.testing.assert_allclose(values[key][i, j], of_one[key], rtol=1e-4, err_msg=key)
    assert values["age"].shape == ()
    assert len({float(x) for x in values["mode_0/trace"].ravel()}) == 6


# After each of the steps t = 0, 1, ...: how many were made with the inverses that were computed last.
AGES = {
    # Refreshed at t = 0, 2, 4 (with every statistics, before T2), 5 and 10.
    (2, 5): [1, 2, 1, 2, 1, 1, 2, 3, 4, 5, 1, 2],
    # Refreshed at t = 0 (the only statistics before T2), 3, 6 and 9.
    (10, 3): [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3],
    (1, 1): [1] * 12,
}


@pytest.mark.parametrize("periods", AGES)
def test_ages(periods):
    tx = tnt(0.1, statistics_period=periods[0], inverse_period=periods[1])
    grads = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    update, read = jax.jit(tx.update), jax.jit(diagnostics)
    state, ages = tx.init(grads), []
    assert int(read(state)["w/age"]) == -1
    for _ in AGES[periods]:
        _, state = update(grads, state, sampled_grads=grads)
        values = read(state)
        assert int(values["b/age"]) == int(values["w/age"])
        ages.append(int(values["w/age"]))
    assert ages == AGES[periods]


@pytest.mark.parametrize(("parts", "injected"), [(2, False), (3, True), (100, False)])
def test_ages_of_parts(parts, injected):
    """Of each parameter: the steps since its inverses were seen to change."""
    hyperparams = {"learning_rate": 0.1, "statistics_period": 1, "inverse_period": 6, "inverse_parts": parts}
    if injected:
        factory = optax.inject_hyperparams(tnt, static_args=("inverse_parts", "max_dim", "views"))
        tx = factory(**hyperparams)
    else:
        tx = tnt(**hyperparams)
    sampled = random_trees(1, 16)
    state, update, changed, seen = tx.init(sampled[0]), jax.jit(tx.update), {}, set()
    read = jax.jit(lambda state: diagnostics(state))
    for t, tree in enumerate(sampled):
        before = optax.tree.get(state, "inverses", filtering=lambda path, _: "TNTState" in str(path))
        _, state = update(tree, state, tree, sampled_grads=tree)
        after = optax.tree.get(state, "inverses", filtering=lambda path, _: "TNTState" in str(path))
        changed |= {name: t for name in SHAPES if not np.array_equal(before[name][0], after[name][0])}
        values = read(state)
        ages = {name: int(values[f"{name}/age"]) for name in SHAPES}
        assert ages == {name: t + 1 - changed[name] for name in SHAPES}
        seen.add(tuple(ages.values()))
    assert any(len(set(ages)) > 1 for ages in seen)


def test_rejected_refreshes_do_not_count():
    grads, nan = {"w": jnp.ones((2, 3))}, jnp.float32(jnp.nan)
    for first_bad, expected in ((3, [1, 1, 1, 2, 3]), (0, [-1] * 5)):
        tx = tnt(
            0.1,
            damping=lambda t, first=first_bad: jnp.where(t < first, jnp.float32(0.1), nan),
            statistics_period=1,
            inverse_period=1,
        )
        state, ages = tx.init(grads), []
        for _ in range(5):
            _, state = tx.update(grads, state, sampled_grads=grads)
            values = diagnostics(state)
            ages.append(int(values["w/age"]))
        assert ages == expected
        assert int(values["tnt/rejected_inverses"]) == 5 - first_bad


def test_a_warm_start_is_a_refresh():
    grads = random_trees(0, 5)
    tx = tnt(0.1, statistics_period=1, inverse_period=100)
    state = warm_start(tx, tx.init(grads[0]), grads[0], grads)
    assert int(diagnostics(state)["dense/age"]) == 0
    assert int(diagnostics(state)["tnt/absorbed"]) == 5
    late = tnt(0.1, statistics_period=100, inverse_period=100)
    update = jax.jit(late.update)
    for age in (1, 2, 3):
        _, state = update(grads[0], state, sampled_grads=grads[0])
        assert int(diagnostics(state)["dense/age"]) == age
    state = warm_start(late, state, grads[0], grads[:2])
    values = diagnostics(state)
    assert int(values["dense/age"]) == 0
    assert int(values["tnt/steps"]) == 3
    _, state = update(grads[0], state, sampled_grads=grads[0])
    assert int(diagnostics(state)["dense/age"]) == 1


@pytest.mark.slow
def test_bounded_steps_are_those_whose_norm_exceeds_the_radius():
    """lr^2 <p, m> by the reference. A rejected step was not shortened."""
    lr, steps = 0.1, 12
    hyperparams = {"damping": EPS, "statistics_period": 1, "inverse_period": 4}
    grads, sampled = random_trees(0, steps), random_trees(1, steps)
    truth, norms = reference.TNT([v for _, v in SHAPES.values()], learning_rate=lr, **hyperparams), []
    for g, s in zip(grads, sampled, strict=True):
        directions = truth.direction(views(g), views(s))
        norms.append(lr * np.sqrt(sum(np.vdot(p, m) for p, m in zip(directions, truth.momentum, strict=True))))
    radius = float(np.mean(np.sort(norms)[4:6]))  # Between the fifth and the sixth: seven are longer.
    tx = tnt(lr, trust_radius=radius, **hyperparams)
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    assert float(diagnostics(state)["tnt/bounded_share"]) == 0
    for t, (g, s) in enumerate(zip(grads, sampled, strict=True)):
        assert abs(norms[t] / radius - 1) > 1e-3  # float32 cannot see it otherwise.
        _, state = update(g, state, sampled_grads=s)
        values = diagnostics(state)
        assert int(values["tnt/bounded_steps"]) == np.sum(np.array(norms[: t + 1]) > radius)
    assert int(values["tnt/bounded_steps"]) == 7
    np.testing.assert_allclose(values["tnt/bounded_share"], 7 / 12, rtol=1e-6)  # float32
    bad = jax.tree.map(lambda x: x * jnp.nan, grads[0])
    huge = jax.tree.map(lambda x: jnp.full_like(x, 1e30), grads[0])  # Too long for a norm in float32: not shortened.
    for gradient in (bad, huge):
        _, state = update(gradient, state, sampled_grads=sampled[0])
    values = diagnostics(state)
    assert int(values["tnt/bounded_steps"]) == 7
    assert int(values["tnt/rejected_gradients"]) == 2
    free, _, _, _ = trained(tnt(lr))
    assert int(diagnostics(free)["tnt/bounded_steps"]) == 0


def test_updates_beside_gradients():
    state, grads, updates, _ = trained(tnt(0.1, damping=EPS, weight_decay=0.1))
    values = jax.jit(lambda *x: diagnostics(x[0], grads=x[1], updates=x[2]))(state, grads, updates)
    for name in SHAPES:
        u, g = np.ravel(updates[name]).astype(float), np.ravel(grads[name]).astype(float)
        # Sums of 72 terms in float32.
        np.testing.assert_allclose(
            values[f"{name}/update_to_gradient"], np.linalg.norm(u) / np.linalg.norm(g), rtol=1e-5
        )
        cosine = u @ g / np.linalg.norm(u) / np.linalg.norm(g)
        np.testing.assert_allclose(values[f"{name}/cosine"], cosine, rtol=1e-4, atol=1e-5)
    assert "dense/cosine" not in diagnostics(state)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])  # Whose squares are no float32.
def test_norms_of_extreme_and_zero_updates(size):
    state = tnt().init({"w": jnp.zeros(2)})

    def compare(u, g):
        trees = ({"w": jnp.asarray(x, jnp.float32)} for x in (g, u))
        values = diagnostics(state, **dict(zip(("grads", "updates"), trees, strict=True)))
        return [float(values[f"w/{what}"]) for what in ("update_to_gradient", "cosine")]

    # float32
    np.testing.assert_allclose(compare([0.0, -3 * size], [4 * size, 4 * size]), [3 / 32**0.5, -(0.5**0.5)], rtol=1e-6)
    assert compare([0.0, 0.0], [size, 0.0]) == [0, 0]
    assert compare([size, 0.0], [0.0, 0.0]) == [np.inf, 0]
    assert compare([0.0, 0.0], [0.0, 0.0]) == [0, 0]
    assert np.isnan(compare([size, 0.0], [np.nan, 0.0])).all()
    assert np.isnan(compare([0.0, 0.0], [np.nan, 0.0])[1])
    assert np.isnan(compare([np.nan, 0.0], [size, 0.0])).all()


def labels(tree):
    return {k: "matrices" if k in ("dense", "conv") else "rest" for k in tree}


SETTINGS = {"damping": EPS, "statistics_period": 2, "inverse_period": 3}
WRAPPERS = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1e6), tnt(**SETTINGS), optax.scale(-0.1)),
    "masked": lambda: optax.masked(tnt(0.1, **SETTINGS), lambda tree: {k: k == "dense" for k in tree}),
    "partition": lambda: optax.partition({"matrices": tnt(0.1, **SETTINGS), "rest": optax.sgd(0.1)}, labels),
    "inject": lambda: optax.inject_hyperparams(tnt)(0.1, **SETTINGS),
    "apply_if_finite": lambda: optax.apply_if_finite(tnt(0.1, **SETTINGS), 3),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_states(name):
    plain, *_ = trained(tnt(0.1, **SETTINGS), steps=5)
    state, grads, updates, _ = trained(WRAPPERS[name](), steps=5)
    expected = diagnostics(plain)
    values = diagnostics(state, grads=grads, updates=updates)
    inside = {"masked": {"dense"}, "partition": {"dense", "conv"}}.get(name, set(SHAPES))
    assert {key.split("/")[0] for key in values} == {"tnt", *inside}
    for key, value in values.items():
        if not key.endswith(("cosine", "update_to_gradient")):
            # Another program of the same float32 operations; condition numbers up to 1e5 after three statistics.
            np.testing.assert_allclose(value, expected[key], rtol=1e-2 if "condition" in key else 1e-4, atol=1e-5)
    assert all(f"{k}/cosine" in values for k in inside)
    if name == "inject":
        chex.assert_trees_all_equal(diagnostics(state)["tnt/damping"], jnp.float32(EPS))


def test_two_states_have_their_places_in_the_names():
    two = optax.partition({"matrices": tnt(0.1, **SETTINGS), "rest": scale_by_tnt(**SETTINGS)}, labels)
    values = diagnostics(trained(two, steps=5)[0])
    matrices, rest = "inner_states/matrices/inner_state/0/", "inner_states/rest/inner_state/"
    assert int(values[matrices + "tnt/steps"]) == int(values[rest + "tnt/steps"]) == 5
    assert matrices + "dense/mode_0/trace" in values
    assert rest + "bias/mode_0/trace" in values
    assert matrices + "dense/age" in values
    assert rest + "bias/age" in values
    assert all(key.startswith((matrices, rest)) for key in values)


def test_scale_by_tnt_counts_as_tnt_does():
    """Faults included."""
    settings = {"statistics_period": 1, "inverse_period": 2, "trust_radius": 0.5}
    bad = jax.tree.map(lambda x: x * jnp.nan, random_trees(3, 1)[0])
    values = []
    # With a learning rate of 1, the bound of the step is that of the direction.
    for tx in (tnt(1.0, **settings), scale_by_tnt(**settings)):
        state, *_ = trained(tx, steps=5)
        update = jax.jit(tx.update)
        _, state = update(bad, state, bad, sampled_grads=bad)
        values.append(diagnostics(state))
    assert set(values[0]) == set(values[1])
    for name in (key for key in values[0] if key.startswith("tnt/") or key.endswith("age")):
        assert float(values[0][name]) == float(values[1][name]), name
    assert int(values[1]["tnt/rejected_gradients"]) == int(values[1]["tnt/rejected_sampled_gradients"]) == 1
    assert int(values[1]["tnt/bounded_steps"]) > 0


def test_without_momentum():
    tx = scale_by_tnt(momentum=None, statistics_period=1)
    state, grads, updates, _ = trained(tx, steps=3)
    with_momentum = trained(scale_by_tnt(momentum=0.0, statistics_period=1), steps=3)[0]
    expected = diagnostics(with_momentum, grads=grads, updates=updates)
    chex.assert_trees_all_equal(diagnostics(state, grads=grads, updates=updates), expected)
    with pytest.raises(ValueError, match=r"updates: expected"):
        diagnostics(state, grads=grads, updates={"dense": updates["dense"]})
    masked = optax.masked(tx, lambda tree: {k: k == "dense" for k in tree})
    inside = diagnostics(trained(masked, steps=3)[0], grads=grads, updates=updates)
    assert {key.split("/")[0] for key in inside if key.endswith("cosine")} == {"dense"}


def test_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden, self.out = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

    model = Model(nnx.Rngs(0))
    tx = tnt(0.1, **SETTINGS)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    boxes = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    params = nnx.as_pure(boxes)
    plain = tx.init(params)
    for t in range(3):
        grads = jax.tree.map(lambda x, t=t: jnp.cos(x + t), boxes)
        optimizer.update(model, grads, sampled_grads=grads)
        grads = nnx.as_pure(grads)
        updates, plain = tx.update(grads, plain, params, sampled_grads=grads)
    expected = diagnostics(plain, grads=grads, updates=updates)
    pure = diagnostics(nnx.as_pure(optimizer.opt_state), grads=grads, updates=updates)
    assert "hidden/kernel/mode_1/trace" in pure
    assert int(pure["hidden/kernel/age"]) == 1
    # The same operations, compiled or not.
    chex.assert_trees_all_close(pure, dict(expected), rtol=1e-4, atol=1e-4)
    boxed = diagnostics(optimizer.opt_state)
    chex.assert_trees_all_equal(boxed, {key: pure[key] for key in boxed})
    assert set(pure) - set(boxed) == {key for key in pure if key.endswith(("cosine", "update_to_gradient"))}


@pytest.mark.slow
def test_under_vmap():
    """Also of dense factors of several lengths, one by one."""
    grads = [jax.tree.map(lambda *x: jnp.stack(x), *random_trees(seed, 3)) for seed in range(4)]
    tx = tnt(0.1, **SETTINGS)

    def read(grads):
        state = tx.init(grads[0])
        for g in grads:
            _, state = tx.update(g, state, sampled_grads=g)
        return diagnostics(state)

    together = jax.jit(jax.vmap(read))(grads)
    alone = jax.jit(read)
    for i in range(3):
        expected = alone(jax.tree.map(lambda x, i=i: x[i], grads))
        for key, value in expected.items():
            if "condition" not in key:  # Two statistics: many factors are singular.
                np.testing.assert_allclose(together[key][i], value, rtol=1e-4, atol=1e-5, err_msg=key)
    states = jax.vmap(tx.init)(grads[0])
    with pytest.raises(TypeError, match=r"opt_state: .*a stack of shape \(3,\).*inside jax\.vmap"):
        diagnostics(states)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about the CPU backend")
def test_no_batched_call_of_lapack():
    """Several of different sizes in one program can deadlock XLA's CPU backend."""
    tx = tnt(views=lambda path, shape: TensorView(((1,), (2,)), batch_axes=(0,)))
    state = jax.vmap(tx.init)({"w": jnp.ones((2, 3, 4, 5)), "v": jnp.ones((2, 2, 4, 6))})
    program = jax.jit(jax.vmap(lambda s: diagnostics(s))).lower(state).as_text()
    calls = re.findall(r"@lapack_ssyevd_ffi\(.*?: \(tensor<([\dx]+)xf32>", program)
    assert sorted(set(calls)) == ["4x4", "5x5", "6x6"]


def test_hard_factors():
    """No statistics, a singular factor, and parameters that have no factors."""
    params = {
        "dead": jnp.zeros((3, 2)),
        "one": jnp.outer(jnp.arange(1.0, 4), jnp.array([1.0, -2.0])),
        "half": jnp.ones(5, jnp.bfloat16),
        "long": jnp.array([0.0, 1.0, 2.0, 0.0, 3.0, 0.0, 1.0]),
        "empty": jnp.zeros((0, 3)),
        "none": None,
        "nothing": (),
        "scalar": jnp.float32(3),
    }
    tx = tnt(0.1, damping=EPS, max_dim=6)
    _, state = tx.update(params, tx.init(params), sampled_grads=params)
    values = diagnostics(state, grads=params, updates=params)
    assert {key.split("/")[0] for key in values} == {"tnt", "dead", "one", "half", "long", "scalar"}
    for mode in range(2):
        dead = {what: float(values[f"dead/mode_{mode}/{what}"]) for what in OF_A_MODE}
        zeros = {"trace", "mean_eigenvalue", "smallest_eigenvalue", "largest_eigenvalue"}
        ones = {"damped_condition": 1.0, "share_below_damping": 1.0}
        assert dead == {**dict.fromkeys(zeros, 0.0), **ones, "condition": np.inf}
    # Of rank one: the eigenvalues are d * c0 and zeros, c0 = sqrt(|G|^2 / 6), |G|^2 = 14 * 5. In float32.
    c0 = np.sqrt(70 / 6)
    for mode, d in enumerate((3, 2)):
        one = {what: float(values[f"one/mode_{mode}/{what}"]) for what in OF_A_MODE}
        assert one["smallest_eigenvalue"] == 0
        assert one["condition"] == np.inf
        np.testing.assert_allclose(one["largest_eigenvalue"], d * c0, rtol=1e-5)
        np.testing.assert_allclose(one["damped_condition"], (d * c0 + EPS) / EPS, rtol=1e-5)
        np.testing.assert_allclose(one["share_below_damping"], (d - 1) / d, rtol=1e-6)
    # Only the diagonal is kept: its entries are the squares.
    np.testing.assert_allclose(values["long/mode_0/trace"], 15, rtol=1e-6)
    np.testing.assert_allclose(values["long/mode_0/share_below_damping"], 3 / 7, rtol=1e-6)
    assert values["half/mode_0/trace"].dtype == values["half/cosine"].dtype == jnp.float32
    assert float(values["scalar/mode_0/trace"]) == 9
    assert float(values["scalar/mode_0/condition"]) == 1


def test_a_condition_number_beyond_rounding_is_infinite():
    """Singular matrices: rounding makes their smallest eigenvalues positive about as often as negative."""
    rng = np.random.default_rng(0)
    g = jnp.asarray(rng.normal(size=(20, 10, 9)), jnp.float32)
    tx = scale_by_tnt(views=lambda path, shape: TensorView(((1,), (2,)), batch_axes=(0,)))
    values = jax.jit(lambda g: diagnostics(tx.update(g, tx.init(g), sampled_grads=g)[1]))(g)
    assert np.isinf(values["mode_0/condition"]).all()
    assert not np.any(values["mode_0/smallest_eigenvalue"])
    assert np.isfinite(values["mode_1/condition"]).all()


def test_the_damping_is_that_of_the_last_inverse_update():
    grads = {"w": jnp.ones(2)}
    tx = tnt(0.1, damping=lambda t: 0.5 / (jnp.float32(t) + 1), statistics_period=2, inverse_period=3)
    state, update, seen = tx.init(grads), jax.jit(tx.update), []
    for _ in range(5):
        seen.append(float(diagnostics(state)["tnt/damping"]))
        _, state = update(grads, state, sampled_grads=grads)
    values = jax.jit(diagnostics)(state)
    # Inverses are updated at t = 0, 2 and 3.
    np.testing.assert_allclose([*seen, values["tnt/damping"]], [0.5, 0.5, 0.5, 0.5 / 3, 0.125, 0.125], rtol=1e-6)
    # The eigenvalues are 0 and 2.
    np.testing.assert_allclose(values["w/mode_0/damped_condition"], 2.125 / 0.125, rtol=1e-6)  # float32


def test_names_that_would_be_the_same():
    params = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(3)}, "c": [jnp.ones(1)]}
    names = {key.rpartition("/mode_0/")[0] for key in diagnostics(scale_by_tnt().init(params))}
    assert names == {"", "['a/b']", "['a']['b']", "c/0"}


def test_errors():
    params = {"w": jnp.ones((2, 3))}
    state = tnt(0.1).init(params)
    with pytest.raises(ValueError, match=r"opt_state: expected a TNTState"):
        diagnostics(optax.adam(0.1).init(params))
    with pytest.raises(ValueError, match="updates: expected together with grads, got None"):
        diagnostics(state, grads=params)
    with pytest.raises(ValueError, match="grads: expected together with updates, got None"):
        diagnostics(state, updates=params)
    with pytest.raises(ValueError, match=r"updates\['w'\]: expected the shape \(2, 3\)"):
        diagnostics(state, grads=params, updates={"w": jnp.ones(2)})


def test_drawing():
    pytest.importorskip("matplotlib")
    stack = {"stack": jnp.ones((3, 4, 2)), "dead": jnp.zeros(3), "w": jnp.arange(12.0).reshape(3, 4) - 5}
    views = {3: TensorView(((1,), (2,)), batch_axes=(0,))}
    tx = tnt(damping=EPS, views=lambda path, shape: views.get(len(shape)))
    _, state = tx.update(stack, tx.init(stack), sampled_grads=stack)
    values = diagnostics(state)
    left, right = draw_diagnostics(values).axes
    rows = ["dead/mode_0", "stack/mode_0", "stack/mode_1", "w/mode_0", "w/mode_1"]
    assert [label.get_text() for label in left.get_yticklabels()] == rows
    widths = [float(np.mean(values[f"{row}/share_below_damping"])) for row in rows]
    np.testing.assert_allclose([bar.get_width() for bar in right.patches], widths)
    dots = next(line for line in left.lines if line.get_label() == "mean")
    means = np.concatenate([np.ravel(values[f"{row}/mean_eigenvalue"]) for row in rows])
    assert dots.get_ydata().tolist() == [0, 1, 1, 1, 2, 2, 2, 3, 4]
    np.testing.assert_allclose(dots.get_xdata()[1:], means[1:])  # The first is 0, on the left edge.
    (damping,) = (line for line in left.lines if line.get_label() == "damping")
    np.testing.assert_allclose(damping.get_xdata(), EPS, rtol=1e-6)  # float32
    for (start, end), row in zip(left.collections[0].get_segments()[3:], rows[3:], strict=True):
        assert end[0] == float(values[f"{row}/largest_eigenvalue"])
        assert start[0] == max(float(values[f"{row}/smallest_eigenvalue"]), left.get_xlim()[0])
    with pytest.raises(ValueError, match="values: expected what diagnostics returned"):
        draw_diagnostics({"loss": 1.0})


def adaptive_steps(tx, steps):
    """States after each of some steps."""
    params = {"w": jnp.linspace(-1, 1, 6).reshape(3, 2), "b": jnp.ones(2)}
    forward = lambda p, x: x @ p["w"] + p["b"]  # noqa: E731
    value_and_grads = value_and_sampled_grad(forward, Categorical())
    inputs, labels = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32), jnp.arange(8) % 2

    @jax.jit
    def step(params, state, key):
        loss, grads, sampled_grads = value_and_grads(params, inputs, labels, key)
        updates, state = tx.update(grads, state, params, sampled_grads=sampled_grads)
        return optax.apply_updates(params, updates), state, loss

    state, states, losses = tx.init(params), [], []
    for key in jax.random.split(jax.random.key(0), steps):
        params, state, loss = step(params, state, key)
        states.append(state)
        losses.append(float(loss))
    return states, losses


def test_the_quadratic_model():
    states, losses = adaptive_steps(adaptive_tnt(), 23)
    assert float(diagnostics(adaptive_tnt().init({"w": jnp.ones(2)}))["quadratic_model/momentum"]) == 0
    for t, state in enumerate(states):
        values, model = diagnostics(state), state[1]
        assert int(values["quadratic_model/steps"]) == int(values["tnt/steps"]) == t + 1
        for index, name in enumerate(("learning_rate", "momentum")):
            assert float(values[f"quadratic_model/{name}"]) == float(model.coefficients[index])
        measured = t if t < 20 else 5 * (t // 5)
        if measured + 1 < len(losses):
            # The reduction is what the next step sees, up to float32 rounding of the losses.
            reduction = losses[measured] - losses[measured + 1]
            assert float(values["quadratic_model/true_reduction"]) == pytest.approx(reduction, rel=1e-3, abs=1e-6)
        if t == measured:
            ratio = values["quadratic_model/true_reduction"] / values["quadratic_model/predicted_reduction"]
            assert float(values["quadratic_model/reduction_ratio"]) == pytest.approx(float(ratio), rel=1e-6)
        assert "w/mode_0/trace" in values
    assert float(diagnostics(states[-1])["quadratic_model/damping"]) == float(states[-1][1].damping) < 0.1


def test_a_quadratic_model_alone_and_several():
    adam = optax.chain(optax.identity(), scale_by_quadratic_model(), optax.scale_by_learning_rate(1.0))
    states, _ = adaptive_steps(adam, 2)
    values = jax.jit(diagnostics)(states[-1])
    assert {name.partition("/")[0] for name in values} == {"quadratic_model"}
    assert int(values["quadratic_model/steps"]) == 2
    partition = optax.partition({"a": adaptive_tnt(), "b": adaptive_tnt()}, {"w": "a", "b": "b"})
    states, _ = adaptive_steps(partition, 2)
    values = diagnostics(states[-1])
    steps = [name for name in values if name.endswith("quadratic_model/steps")]
    assert len(steps) == 2
    assert len({name.removesuffix("quadratic_model/steps") for name in steps} - {""}) == 2
    assert draw_diagnostics(values).subfigs


def test_drawing_the_quadratic_model():
    states, _ = adaptive_steps(adaptive_tnt(), 6)
    history = [diagnostics(state) for state in states]
    figure = draw_diagnostics(history)
    spectra, model = figure.subfigs
    assert len(spectra.axes) == 2
    lines = {line.get_label(): line for axis in model.axes for line in axis.get_lines()}
    for name in ("learning rate", "momentum", "predicted reduction", "true reduction", "damping"):
        expected = [float(values[f"quadratic_model/{name.replace(' ', '_')}"]) for values in history]
        np.testing.assert_allclose(np.ravel(lines[name].get_ydata()), expected)
        np.testing.assert_array_equal(np.ravel(lines[name].get_xdata()), np.arange(1, 7))
    assert len(draw_diagnostics(history[-1]).subfigs) == 2
    with pytest.raises(ValueError, match="values"):
        draw_diagnostics([])


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="draw_diagnostics needs matplotlib: pip install"):
        draw_diagnostics({})
