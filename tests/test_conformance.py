"""What Optax asks of an optimizer, for every way to use this one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import linear_model, random_trees, sampled_grad_of, tnt_state

import tnt_optax
from tnt_optax import adaptive_tnt, scale_by_tnt, tnt


@dataclasses.dataclass(frozen=True)
class Variant:
    """An optimizer with a learning rate, and the extra arguments that its `update` takes."""

    factory: Callable[..., Any]
    way: str  # in which it gets its statistics: "tree", "function", "empirical" or "model"

    def __call__(self, learning_rate=0.1, **hyperparams):
        if self.way == "model":
            return self.factory(learning_rate, **hyperparams)
        fisher = "empirical" if self.way == "empirical" else "sampled"
        return self.factory(learning_rate, fisher=fisher, **hyperparams)

    def extra(self, sampled):
        if self.way == "model":
            return {"sampled_grads": sampled_grad_of(sampled)}
        ways = {"tree": {"sampled_grads": sampled}, "function": {"sampled_grads": lambda: sampled}, "empirical": {}}
        return ways[self.way]


def chained(learning_rate, **hyperparams):
    return optax.chain(scale_by_tnt(**hyperparams), optax.scale_by_learning_rate(learning_rate))


FACTORIES = {"tnt": tnt, "scale_by_tnt": chained}
VARIANTS = {
    f"{name}-{way}": Variant(f, way) for name, f in FACTORIES.items() for way in ("tree", "function", "empirical")
}


VARIANTS["adaptive_tnt"] = Variant(adaptive_tnt, "model")

# Both factories share the step and the guard, and `update` looks at the way in one place: the other pairs are left to
# `make test-all`.
QUICK = ("tnt-function",)


@pytest.fixture(params=[pytest.param(v, marks=[pytest.mark.slow] * (v not in QUICK)) for v in VARIANTS])
def variant(request):
    return VARIANTS[request.param]


SHAPES = {"scalar": (), "bias": (3,), "dense": (3, 2), "conv": (2, 1, 2, 3)}
SHORT = {"statistics_period": 2, "inverse_period": 3, "damping": 0.2}
# The same float32 operations, which XLA may fuse or fold in another way, with inverses of condition number up to 1e2.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def trees(seed, steps, dtype=jnp.float32):
    return random_trees(seed, steps, dtype, shapes=SHAPES)


def run(variant, tx, steps=4, jit=True, **extra):
    """Parameters and state after a few steps."""
    (params,) = trees(0, 1)
    state = tx.init(params)

    def step(grads, state, params, sampled):
        updates, state = tx.update(grads, state, params, **variant.extra(sampled), **extra)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    for grads, sampled in zip(trees(1, steps), trees(2, steps), strict=True):
        params, state = step(grads, state, params, sampled)
    return params, state


def reference_with_a_model(views, as_views, learning_rate):
    """`adaptive_tnt`: TNT without momentum, then the quadratic model of the batches of `sampled_grad_of`."""
    tnt, model = reference.TNT(views, learning_rate=1.0, momentum=0.0, statistics_decay=0.95, **SHORT), None

    def flat(tree):
        return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])

    def step(params, grads, sampled):
        nonlocal model
        inputs = np.asarray(linear_model(sampled)[1], np.float64)
        direction = flat(tnt.direction(as_views(grads), as_views(sampled_grad_of(sampled)())))
        model = model or reference.QuadraticModel(len(direction))

        def loss(u):
            return np.mean((inputs @ u + 1) ** 2) / 2

        u = model.step(direction, flat(grads), inputs.T @ inputs / len(inputs), loss, -np.mean(inputs, axis=0))
        ends = np.cumsum([np.size(x) for x in params])[:-1]
        return [w - learning_rate * x.reshape(w.shape) for w, x in zip(params, np.split(u, ends), strict=True)]

    return step


@pytest.mark.parametrize("jit", [True, False])
def test_eager_and_jitted_equal_the_reference(variant, jit):
    params, _ = run(variant, variant(0.1, **SHORT), steps=7, jit=jit)
    # In the order in which JAX flattens a mapping.
    views = {"bias": (3,), "conv": (2, 2, 3), "dense": (3, 2), "scalar": (1,)}

    def as_views(tree):
        return [np.asarray(tree[k], np.float64).reshape(view) for k, view in views.items()]

    expected = as_views(trees(0, 1)[0])
    if variant.way == "model":
        step = reference_with_a_model(list(views.values()), as_views, 0.1)
    else:
        truth = reference.TNT(list(views.values()), learning_rate=0.1, **SHORT)
        step = lambda params, grads, sampled: truth.step(params, as_views(grads), as_views(sampled))  # noqa: E731
    for grads, sampled in zip(trees(1, 7), trees(2, 7), strict=True):
        expected = step(expected, grads, grads if variant.way == "empirical" else sampled)
    for ours, theirs in zip(as_views(params), expected, strict=True):
        # float32 against float64, three inverses of condition number up to 1e2 in a row.
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_adaptive_tnt_in_short():
    """The rest of it is left to `make test-all`."""
    variant = VARIANTS["adaptive_tnt"]
    test_eager_and_jitted_equal_the_reference(variant, True)
    test_inject_hyperparams_equals_plain(variant)
    test_none_and_empty_and_scalar_leaves(variant)


def test_unknown_extra_arguments_are_accepted(variant):
    tx = variant(0.1)
    chex.assert_trees_all_equal(run(variant, tx)[0], run(variant, tx, value=1.0, loss_fn=3, key=None)[0])


def test_no_recompilation_on_the_second_call(variant):
    chex.clear_trace_counter()
    tx = variant(0.1, **SHORT)
    (params,) = trees(0, 1)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(grads, state, params):
        return tx.update(grads, state, params, **variant.extra(grads))

    state = tx.init(params)
    for _ in range(3):
        _, state = step(params, state, params)


# Problems of least squares: the residuals are the outputs of a model, Normal(0.5) makes the loss their sum of squares,
# and the sampled gradient is that of the same model for sampled targets.
PROBLEMS = {
    "parabola": (lambda w: w - jnp.array([1.0, -2.0, 3.0]), jnp.array([-1.0, 10.0, 1.0])),
    "Rosenbrock": (lambda w: jnp.stack([1 - w[0], 10 * (w[1] - w[0] ** 2)]), jnp.array([-1.2, 1.0])),
    "a parabola of matrices": (lambda w: w["a"] @ w["b"] - jnp.eye(2), {"a": jnp.ones((2, 3)), "b": -jnp.eye(3, 2)}),
    "mixed ranks": (
        lambda w: jnp.concatenate([jnp.ravel(x) - i for i, x in enumerate(w)]),
        [jnp.ones(shape) for shape in [(), (3,), (2, 2), (2, 3, 2), (1, 2, 2, 2)]],
    ),
}
# The empirical factors vanish with the gradient, and then P = I/damping for every mode: its learning rate has to be
# stable for that.
SETTINGS = {
    "parabola": {"sampled": (0.1, 0.1), "empirical": (0.1, 1.0)},
    "Rosenbrock": {"sampled": (0.03, 1e-3), "empirical": (0.01, 10.0)},
    "a parabola of matrices": {"sampled": (0.03, 0.1), "empirical": (0.1, 1.0)},
    "mixed ranks": {"sampled": (0.03, 0.1), "empirical": (0.1, 1.0)},
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_it_converges(variant, problem):
    residuals, start = PROBLEMS[problem]
    learning_rate, damping = SETTINGS[problem]["empirical" if variant.way == "empirical" else "sampled"]
    if variant.way == "model":
        tx = adaptive_tnt()
    else:
        tx = variant(learning_rate, damping=damping, momentum=0.5, statistics_period=1, inverse_period=5)
    value_and_grads = tnt_optax.value_and_sampled_grad(
        lambda w, _: jnp.ravel(residuals(w))[None], tnt_optax.Normal(0.5), scale="fisher"
    )

    def step(carry, key):
        params, state = carry
        loss, grads, sampled = value_and_grads(params, None, jnp.zeros((1, jnp.size(residuals(params)))), key)
        extra = {"sampled_grads": sampled} if variant.way == "model" else variant.extra(sampled())
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), loss

    keys = jax.random.split(jax.random.key(0), 10_000)
    _, losses = jax.jit(lambda start, keys: jax.lax.scan(step, (start, tx.init(start)), keys))(start, keys)
    assert losses[0] > 1
    assert losses[-1] < 1e-4  # All minima are 0.


def test_map_params_that_does_nothing_and_that_does(variant):
    tx = variant(0.1)
    _, state = run(variant, tx)
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: x, state), state)
    before, after = tnt_state(state), tnt_state(optax.tree.map_params(tx, jnp.zeros_like, state))
    zeros = jax.tree.map(jnp.zeros_like, before)
    # All that is not of a single parameter stays.
    scalars = [name for name in before._fields if isinstance(getattr(before, name), jax.Array)]
    chex.assert_trees_all_equal(after, zeros._replace(**{name: getattr(before, name) for name in scalars}))
    assert int(before.count) == 4
    assert "momentum" not in scalars


def test_inject_hyperparams_equals_plain(variant):
    fisher = "empirical" if variant.way == "empirical" else "sampled"
    hyperparams = {**SHORT, "statistics_decay": 0.8, "momentum": 0.7, "trust_radius": 0.3}
    if variant.way == "model":
        del hyperparams["momentum"]
        hyperparams |= {"learning_rate": 0.1, "weight_decay": 0.1, "initial_model_damping": 0.2}
        injected, plain = optax.inject_hyperparams(adaptive_tnt)(**hyperparams), adaptive_tnt(**hyperparams)
    elif variant.factory is tnt:
        hyperparams |= {"learning_rate": 0.1, "weight_decay": 0.1}
        injected = optax.inject_hyperparams(tnt, static_args=("views", "max_dim"))(fisher=fisher, **hyperparams)
        plain = tnt(fisher=fisher, **hyperparams)
    else:
        injected = optax.inject_hyperparams(scale_by_tnt)(fisher=fisher, **hyperparams)
        plain = scale_by_tnt(fisher=fisher, **hyperparams)
    expected, _ = run(variant, plain)
    ours, state = run(variant, injected)
    chex.assert_trees_all_close(ours, expected, **CLOSE)
    assert set(hyperparams) <= set(state.hyperparams)


@pytest.mark.parametrize("factory", [tnt, scale_by_tnt])
@pytest.mark.parametrize("way", [jax.jit, lambda f: lambda *args: jax.eval_shape(f, *args)], ids=["jit", "eval_shape"])
def test_inject_hyperparams_with_all_defaults_under_tracing(factory, way):
    """It makes arrays of all numbers, which are traced here: no default may be looked at as a Python number."""
    (params,) = trees(0, 1)
    tx = optax.inject_hyperparams(factory)()
    state = way(tx.init)(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        tnt_state(state), factory().init(params)[0] if factory is tnt else factory().init(params)
    )
    update = way(lambda g, s: tx.update(g, s, g, sampled_grads=g))
    if way is jax.jit:
        updates, _ = update(params, state)
        plain = factory()
        expected, _ = jax.jit(lambda g: plain.update(g, plain.init(g), g, sampled_grads=g))(params)
        chex.assert_trees_all_close(updates, expected, **CLOSE)


@pytest.mark.parametrize("factory", [tnt, scale_by_tnt])
def test_a_donated_state(factory):
    """The caller's own arrays survive, and no array is in the state twice."""
    (params,), damping = trees(0, 1), jnp.float32(0.2)
    injected = optax.inject_hyperparams(factory, hyperparam_dtype=jnp.float32)(damping=0.2)
    for tx in (factory(damping=damping), injected):
        step = jax.jit(lambda g, s, tx=tx: tx.update(g, s, g, sampled_grads=g), donate_argnums=1)
        _, state = step(params, tx.init(params))
        jax.block_until_ready(step(params, state))
    assert float(damping) == pytest.approx(0.2)


def test_a_constant_schedule_equals_a_number(variant):
    numbers = {"damping": 0.2, "trust_radius": 0.3}
    schedules = {name: optax.constant_schedule(value) for name, value in numbers.items()}
    expected, _ = run(variant, variant(0.1, **numbers))
    chex.assert_trees_all_close(run(variant, variant(optax.constant_schedule(0.1), **schedules))[0], expected, **CLOSE)
    if variant.factory is tnt:
        schedules |= {"learning_rate": optax.constant_schedule(0.1)}
        fisher = "empirical" if variant.way == "empirical" else "sampled"
        injected = optax.inject_hyperparams(tnt)(fisher=fisher, **schedules)
        chex.assert_trees_all_close(run(variant, injected)[0], expected, **CLOSE)


def test_an_injected_schedule_equals_a_schedule():
    def rate(t):
        return 0.1 / jnp.float32(t + 1)

    variant = VARIANTS["tnt-tree"]
    injected = optax.inject_hyperparams(tnt)(learning_rate=rate, damping=0.2)
    expected, _ = run(variant, tnt(rate, damping=0.2))
    chex.assert_trees_all_close(run(variant, injected)[0], expected, **CLOSE)


MIXED = [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64]


@pytest.mark.parametrize(
    "dtypes", [[jnp.bfloat16] * 4, [jnp.float64] * 4, MIXED], ids=lambda d: "-".join(x.__name__ for x in d)
)
def test_dtypes_through_a_conditional(variant, dtypes):
    with jax.enable_x64(jnp.float64 in dtypes):

        def cast(tree):
            return {k: x.astype(dtype) for (k, x), dtype in zip(tree.items(), dtypes, strict=True)}

        grads, sampled = cast(trees(0, 1)[0]), cast(trees(1, 1)[0])
        tx = variant(0.1, **SHORT)

        @jax.jit
        def step(due, grads, state):
            def take():
                return tx.update(grads, state, grads, **variant.extra(sampled))

            return jax.lax.cond(due, take, lambda: (jax.tree.map(jnp.zeros_like, grads), state))

        state = tx.init(grads)
        updates, new_state = step(True, grads, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        for name, dtype in zip(SHAPES, dtypes, strict=True):
            wide = jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
            found = tnt_state(new_state)
            # Of `adaptive_tnt`, the step before takes the place of the momentum.
            like = new_state[1].step if found.momentum is None else found.momentum
            assert {x.dtype for x in (like[name], *found.contractions[name], *found.inverses[name])} == {wide}
        # Only the cast to the gradients' dtype separates the result from that of float32.
        wide_grads, wide_sampled = optax.tree.cast((grads, sampled), jnp.float32)
        expected, _ = jax.jit(lambda g, s: tx.update(g, tx.init(g), g, **variant.extra(s)))(wide_grads, wide_sampled)
        for name, dtype in zip(SHAPES, dtypes, strict=True):
            # Rounded once to `dtype`, and for `scale_by_tnt` once more after multiplication by the learning rate.
            # The model pushes directions forward in the parameters' dtype, with as much rounding again.
            rtol = (4 if variant.way == "model" else 2) * float(jnp.finfo(dtype).eps) + 1e-5
            ours, theirs = (np.asarray(tree[name], np.float64) for tree in (updates, expected))
            np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("momentum", [0.9, None])
def test_gradients_wider_than_the_parameters_leave_the_state_as_it_is(momentum):
    with jax.enable_x64(True):
        (params,), (grads,) = trees(0, 1), trees(1, 1, jnp.float64)
        tx = tnt(0.1, momentum=momentum, **SHORT)
        state, step = tx.init(params), jax.jit(lambda g, s: tx.update(g, s, params, sampled_grads=g))
        for _ in range(2):
            updates, new_state = step(grads, state)
            chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)


def test_none_and_empty_and_scalar_leaves(variant):
    grads = {"matrix": jnp.ones((3, 2)), "none": None, "empty": jnp.zeros((0, 3)), "scalar": jnp.float32(2), "()": ()}
    tx = variant(0.1, trust_radius=0.5)
    updates, state = jax.jit(lambda g, s: tx.update(g, s, g, **variant.extra(g)))(grads, tx.init(grads))
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    chex.assert_tree_all_finite((updates, state))


def test_no_parameters_at_all(variant):
    tx, params = variant(0.1, trust_radius=0.1), {"w": jnp.ones(3)}
    updates, _ = tx.update({}, tx.init({}), {}, **variant.extra({}))
    assert updates == {}
    masked = optax.masked(tx, {"w": False})
    updates, _ = masked.update(params, masked.init(params), params, **variant.extra(params))
    chex.assert_trees_all_equal(updates, params)


def test_init_reads_only_shapes_and_dtypes(variant):
    tx, (params,) = variant(0.1), trees(0, 1)
    state = tx.init(params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    chex.assert_trees_all_equal(tx.init(shapes), state)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, shapes), state)


def test_masked_and_partition_with_full_sampled_gradients(variant):
    if variant.way == "model":
        pytest.skip("its model sees a part of the parameters: see test_quadratic_model")

    def labels(tree):
        return {k: "tnt" if k in ("dense", "conv") else "sgd" for k in tree}

    (start,) = trees(0, 1)
    expected, _ = run(variant, variant(0.1, **SHORT))
    partitioned, _ = run(variant, optax.partition({"tnt": variant(0.1, **SHORT), "sgd": optax.sgd(0.1)}, labels))
    masked, _ = run(variant, optax.masked(variant(0.1, **SHORT), {k: v == "tnt" for k, v in labels(start).items()}))
    for name, label in labels(start).items():
        sums = sum(np.asarray(grads[name]) for grads in trees(1, 4))
        for tree, rate in ((partitioned, -0.1), (masked, 1.0)):  # `masked` forwards what it does not change.
            truth = expected[name] if label == "tnt" else start[name] + rate * sums
            np.testing.assert_allclose(tree[name], truth, **CLOSE, err_msg=name)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.named_chain(("a", optax.identity()), ("b", tx)),
        lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0),
        lambda tx: optax.chain(optax.clip_by_global_norm(1e6), tx, optax.scale(1.0)),
    ],
    ids=["apply_if_finite", "named_chain", "conditionally_transform", "chain"],
)
def test_wrappers(variant, wrap):
    expected, _ = run(variant, variant(0.1, **SHORT))
    chex.assert_trees_all_close(run(variant, wrap(variant(0.1, **SHORT)))[0], expected, **CLOSE)


def test_apply_if_finite_skips_a_step_that_is_not(variant):
    """It sees the zero update of a rejected gradient, which is finite: nothing changes, and both go on counting."""
    (params,) = trees(0, 1)
    tx = optax.apply_if_finite(variant(0.1, **SHORT), 3)
    bad = jax.tree.map(lambda x: x * jnp.nan, params)
    updates, state = tx.update(bad, tx.init(params), params, **variant.extra(params))
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    chex.assert_tree_all_finite(tnt_state(state))


@jax.numpy_dtype_promotion("standard")  # MultiSteps itself promotes.
def test_multi_steps_sees_the_mean_gradient_and_the_last_sampled_one(variant):
    """Docs: recipes. MultiSteps calls the optimizer at every mini-step, and keeps what comes of each k-th call."""
    (params,) = trees(0, 1)
    tx, plain = variant(0.1, **SHORT), variant(0.1, **SHORT)
    multi = optax.MultiSteps(tx, 3)
    all_grads, all_sampled = trees(1, 9), trees(2, 9)
    ours, state = params, multi.init(params)
    step = jax.jit(lambda g, s, p, sampled: multi.update(g, s, p, **variant.extra(sampled)))
    for grads, sampled in zip(all_grads, all_sampled, strict=True):
        updates, state = step(grads, state, ours, sampled)
        ours = optax.apply_updates(ours, updates)
    expected, plain_state = params, plain.init(params)
    for i in range(0, 9, 3):
        mean = jax.tree.map(lambda *g: sum(g) / 3, *all_grads[i : i + 3])
        updates, plain_state = plain.update(mean, plain_state, expected, **variant.extra(all_sampled[i + 2]))
        expected = optax.apply_updates(expected, updates)
    chex.assert_trees_all_close(ours, expected, **CLOSE)
    assert int(tnt_state(state).count) == 3
    assert int(tnt_state(state).statistics_count) == 2


@jax.numpy_dtype_promotion("standard")  # It itself promotes.
@pytest.mark.parametrize("factory", [tnt, chained])
def test_split_real_and_imaginary(factory):
    """It forwards no extra arguments: with the empirical Fisher matrix it works as it is."""
    params = {"w": jnp.array([[1 + 2j, 3 - 1j], [0.5j, -2 + 0j]], jnp.complex64), "b": jnp.ones(2)}
    split = optax.contrib.split_real_and_imaginary(factory(0.1, damping=0.2, fisher="empirical"))
    updates, _ = jax.jit(lambda g: split.update(g, split.init(g), g))(params)
    pairs = {"real": params["w"].real, "imaginary": params["w"].imag, "b": params["b"]}
    plain = factory(0.1, damping=0.2, fisher="empirical")
    expected, _ = plain.update(pairs, plain.init(pairs), pairs)
    np.testing.assert_allclose(updates["w"], expected["real"] + 1j * expected["imaginary"], **CLOSE)
    np.testing.assert_allclose(updates["b"], expected["b"], **CLOSE)
    split = optax.contrib.split_real_and_imaginary(factory(0.1))
    with pytest.raises(ValueError, match="sampled_grads"):
        split.update(params, split.init(params), params)


def test_vmapped_optimizers_equal_separate_ones(variant):
    """Three trainings at once, each with its own learning rate and damping."""
    grads, sampled = trees(0, 6), trees(1, 6)
    rates, dampings = jnp.array([0.1, 0.2, 0.3]), jnp.array([0.3, 0.2, 0.5])

    def train(rate, damping, grads, sampled):
        tx = variant(rate, damping=damping, statistics_period=1, inverse_period=1)
        params = jax.tree.map(jnp.zeros_like, grads[0])
        state = tx.init(params)
        for g, s in zip(grads, sampled, strict=True):
            updates, state = tx.update(g, state, params, **variant.extra(s))
            params = optax.apply_updates(params, updates)
        return params

    def stack(trees):
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    twice = [stack(trees[i : i + 3]) for trees in (grads, sampled) for i in (0, 3)]
    together = jax.jit(jax.vmap(train))(rates, dampings, twice[:2], twice[2:])
    alone = jax.jit(train)
    for i in range(3):
        expected = alone(rates[i], dampings[i], [grads[i], grads[i + 3]], [sampled[i], sampled[i + 3]])
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], together), expected, **CLOSE)


def test_vmap_keeps_the_periods():
    """`jax.lax.cond` becomes a selection under vmap, and would run both branches at every step."""
    runs = []

    def sampled(tree):
        def compute():
            jax.debug.callback(lambda: runs.append(1))
            return tree

        return compute

    (params,) = [jax.tree.map(lambda *x: jnp.stack(x), *trees(0, 3))]
    tx = tnt(0.1, statistics_period=3, inverse_period=5, damping=0.1)
    state, alone = jax.vmap(tx.init)(params), [tx.init(tree) for tree in trees(0, 3)]
    step = jax.jit(jax.vmap(lambda g, s: tx.update(g, s, g, sampled_grads=sampled(g))))
    step_alone = jax.jit(lambda g, s: tx.update(g, s, g, sampled_grads=g))
    per_step = []
    for _ in range(7):
        runs.clear()
        updates, state = jax.block_until_ready(step(params, state))
        jax.effects_barrier()
        per_step.append(len(runs))
        for i, grads in enumerate(trees(0, 3)):
            expected, alone[i] = step_alone(grads, alone[i])
            chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], updates), expected, **CLOSE)
    assert per_step == [1, 0, 0, 1, 0, 0, 1]


def test_vmapped_states_at_different_steps():
    """Each is updated in its own steps."""
    (grads,) = trees(0, 1)
    tx = tnt(0.1, statistics_period=2, inverse_period=3, damping=0.1)
    step = jax.jit(lambda g, s: tx.update(g, s, g, sampled_grads=g))
    states = [tx.init(grads)]
    for t in range(5):
        states.append(step(jax.tree.map(lambda x, t=t: x * (t + 1), grads), states[-1])[1])
    together = jax.tree.map(lambda *x: jnp.stack(x), *states)
    _, ours = jax.jit(jax.vmap(lambda s: tx.update(grads, s, grads, sampled_grads=grads)))(together)
    for i, state in enumerate(states):
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], ours), step(grads, state)[1], **CLOSE)


def test_optax_tree_get_and_set(variant):
    _, state = run(variant, variant(0.1, **SHORT))
    assert int(optax.tree.get(state, "statistics_count")) == 2
    chex.assert_trees_all_equal(optax.tree.get(state, "momentum"), tnt_state(state).momentum)
    # The states of wrappers and of schedules have a `count` too.
    assert int(optax.tree.get(state, "count", filtering=lambda path, _: "TNTState" in str(path))) == 4
    changed = optax.tree.set(state, statistics_count=jnp.int32(9))
    assert int(tnt_state(changed).statistics_count) == 9
    chex.assert_trees_all_equal_structs(changed, state)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class CallableTree:
    """Parameters that can be called, as a module of Equinox can."""

    w: jax.Array

    def __call__(self, x):
        return x @ self.w


def test_parameters_that_can_be_called_are_a_tree(variant):
    params = CallableTree(jnp.ones((3, 4)))
    tx = variant(0.1)
    plain, _ = tx.update(params.w, tx.init(params.w), params.w, **variant.extra(params.w))
    updates, _ = tx.update(params, tx.init(params), params, **variant.extra(params))
    chex.assert_trees_all_equal(updates.w, plain)
    warm = tnt_optax.warm_start(tx, tx.init(params), params, [params])
    assert int(tnt_state(warm).statistics_count) == 1
