"""TNT on a mesh of eight devices (virtual ones, see conftest.py) is TNT on one, and what was divided stays divided."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tnt_optax
from tnt_optax import TensorView, phases, sharding
from tnt_optax.blocks import describe

BOTH = ("data", "model")
SPECS = {
    "data parallel": {"layers": P(), "out": P(), "bias": P()},
    "FSDP": {"layers": P(None, "data"), "out": P("data"), "bias": P("data")},
    "tensor parallel": {"layers": P(None, "data", "model"), "out": P("model", "data"), "bias": P()},
}


def mesh_of(kind):
    return jax.make_mesh((4, 2), BOTH, axis_types=(kind, kind))


# Most of what is tested holds for both kinds of axes; those that differ more are quick.
KINDS = [pytest.param(AxisType.Auto, id="Auto"), pytest.param(AxisType.Explicit, id="Explicit")]
ONE_QUICK = [pytest.param(AxisType.Auto, id="Auto", marks=pytest.mark.slow), KINDS[1]]


@pytest.fixture(params=KINDS)
def mesh(request):
    mesh = mesh_of(request.param)
    with jax.set_mesh(mesh):
        yield mesh


def stacked(path, shape):
    return TensorView(((1,), (2,)), batch_axes=(0,)) if len(shape) == 3 else None


def data_and_params():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    params = {"layers": normal(3, 16, 16) / 4, "out": normal(16, 8) / 4, "bias": normal(8)}
    return params, normal(64, 16), rng.integers(0, 8, 64)


def trained(
    params, inputs, labels, *, steps=6, gather=lambda w: w, inverse_axis=None, warm_start=False, keep=True, parts=1
):
    """Parameters, state and updates after some steps, and the initial state."""

    def forward(params, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ gather(w)), None), x, params["layers"])
        return x @ gather(params["out"]) + gather(params["bias"])

    value_and_grads = tnt_optax.value_and_sampled_grad(forward, tnt_optax.Categorical(), microbatches=parts)
    tx = tnt_optax.tnt(
        0.1,
        damping=0.1,
        statistics_period=2,
        inverse_period=4,
        trust_radius=0.3,
        views=stacked,
        inverse_axis=inverse_axis,
    )
    initial = state = tx.init(params)
    if warm_start:
        sampled = jax.jit(lambda key: value_and_grads(params, inputs, labels, key)[2]())
        state = tnt_optax.warm_start(tx, state, params, (sampled(jax.random.key(100 + i)) for i in range(2)))
    shardings = jax.tree.map(lambda x: x.sharding, (params, initial)) if keep else (None, None)

    @functools.partial(jax.jit, out_shardings=(*shardings, None))
    def step(params, state, key):
        _, grads, sampled_grads = value_and_grads(params, inputs, labels, key)
        updates, state = tx.update(grads, state, params, sampled_grads=sampled_grads)
        return optax.apply_updates(params, updates), state, updates

    updates = None
    for i in range(steps):
        params, state, updates = step(params, state, jax.random.key(i))
    return params, state, updates, initial


def gather_on(mesh):
    """With Explicit axes it is the model that says that a layer's weights are gathered for its product."""
    return (lambda w: jax.sharding.reshard(w, P())) if mesh.axis_types[0] == AxisType.Explicit else lambda w: w


@functools.cache
def on_one_device(**options):
    params, inputs, labels = data_and_params()
    with jax.default_device(jax.devices()[0]):
        return jax.device_get(trained(jax.tree.map(jnp.asarray, params), inputs, labels, keep=False, **options))


def put(tree, mesh, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


# The devices divide the inverses in every way; that each computes all of them is a special case.
@pytest.mark.parametrize("inverse_axis", [pytest.param(None, marks=pytest.mark.slow), BOTH])
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] * (way == "data parallel")) for way in SPECS]
)
def test_equals_one_device_and_stays_divided(mesh, way, inverse_axis):
    params, inputs, labels = data_and_params()
    params = put(params, mesh, SPECS[way])
    new_params, state, updates, initial = trained(
        params,
        *put((inputs, labels), mesh, (P("data"), P("data"))),
        gather=gather_on(mesh),
        inverse_axis=inverse_axis,
        # Only with Auto axes and arrays that lie in several ways XLA has to be told, and then this can't fail.
        keep=mesh.axis_types[0] == AxisType.Auto and way == "tensor parallel",
    )
    # 6 steps in float32, whose sums have another order. Elements are of the order of 1, contractions of 10.
    for ours, expected in zip(jax.tree.leaves((new_params, state)), jax.tree.leaves(on_one_device()[:2]), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)

    def same_place(before, after):
        assert after.sharding.is_equivalent_to(before.sharding, before.ndim), (before.sharding, after.sharding)

    jax.tree.map(same_place, (params, initial), (new_params, state))
    for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        # Updates are not told how to lie: no device may hold more of them than it holds of the parameter.
        assert update.addressable_shards[0].data.size <= param.addressable_shards[0].data.size
    tnt_state = initial[0]
    spread = {"data parallel": (1, 1, 1), "FSDP": (4, 4, 4), "tensor parallel": (8, 8, 1)}[way]
    for name, parts in zip(("layers", "out", "bias"), spread, strict=True):
        arrays = [tnt_state.momentum[name], *tnt_state.contractions[name], *tnt_state.inverses[name]]
        assert all(array.size == parts * array.addressable_shards[0].data.size for array in arrays)


@pytest.mark.slow
def test_warm_start_on_a_mesh(mesh):
    params, inputs, labels = data_and_params()
    params = put(params, mesh, SPECS["FSDP"])
    data = put((inputs, labels), mesh, (P("data"), P("data")))
    ours = trained(params, *data, gather=gather_on(mesh), inverse_axis="data", warm_start=True)
    expected = on_one_device(warm_start=True)
    for x, y in zip(jax.tree.leaves(ours[:2]), jax.tree.leaves(expected[:2]), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)  # See above.


@pytest.mark.parametrize("mesh", ONE_QUICK, indirect=True)
def test_diagnostics_on_a_mesh(mesh):
    params, inputs, labels = data_and_params()
    state = trained(
        put(params, mesh, SPECS["tensor parallel"]),
        *put((inputs, labels), mesh, (P("data"), P("data"))),
        gather=gather_on(mesh),
    )[1]
    grads = state[0].momentum
    read = jax.jit(lambda state, g: tnt_optax.diagnostics(state, grads=g, updates=g))
    ours, expected = read(state, grads), read(on_one_device()[1], on_one_device()[1][0].momentum)
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert value.sharding.is_fully_replicated
        if not name.endswith("condition"):  # Which is infinite, or rounding: a batch has fewer examples than U rows.
            # See above; the smallest eigenvalues are rounding errors of the largest.
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("jitted", [False, True])
def test_diagnostics_of_a_divided_stack_are_on_every_device(mesh, jitted):
    tx = tnt_optax.tnt(0.1, views=stacked)
    with jax.set_mesh(None):  # The counters are on no mesh.
        state = tx.init(jax.device_put(jnp.ones((8, 4, 6)), NamedSharding(mesh, P("data"))))
    assert not state[0].contractions[0].sharding.is_fully_replicated
    read = jax.jit(tnt_optax.diagnostics) if jitted else tnt_optax.diagnostics
    for name, value in read(state).items():
        assert value.sharding.is_fully_replicated, name


@pytest.mark.parametrize("mesh", ONE_QUICK, indirect=True)
def test_within_a_shard_map_over_some_of_the_axes(mesh):
    tx = tnt_optax.tnt(0.1, damping=1.0, fisher="empirical")
    params = {"w": jnp.sin(jnp.arange(16.0)).reshape(8, 2)}

    def updates(params):
        return tx.update(params, tx.init(params), params)[0]

    on_a_mesh = jax.shard_map(updates, in_specs=P(), out_specs=P(), axis_names={"data"})
    np.testing.assert_allclose(jax.jit(on_a_mesh)(params)["w"], updates(params)["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_microbatches_on_a_mesh(mesh):
    params, inputs, labels = data_and_params()
    params, data = put(params, mesh, SPECS["FSDP"]), put((inputs, labels), mesh, (P("data"), P("data")))
    ours = trained(params, *data, gather=gather_on(mesh), parts=4)
    for x, y in zip(jax.tree.leaves(ours[:2]), jax.tree.leaves(on_one_device(parts=4)[:2]), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)  # See above.


@pytest.mark.slow
def test_each_device_computes_its_share_of_the_inverses():
    # No two of one length, because XLA counts the body of a loop over equal ones once.
    dims = [(d, d + 8) for d in range(128, 256, 16)]
    blocks = [describe(jax.ShapeDtypeStruct(shape, jnp.float32), None, 1000) for shape in dims]
    matrices = [tuple(jax.ShapeDtypeStruct((d, d), jnp.float32) for d in shape) for shape in dims]
    damping = jax.ShapeDtypeStruct((), jnp.float32)

    def flops(axis):
        invert = functools.partial(phases.damped_inverses, blocks, axis=axis)
        return jax.jit(invert).lower(matrices, damping).compile().cost_analysis()["flops"]

    with jax.set_mesh(mesh_of(AxisType.Auto)):
        everything, share = flops(None), flops(BOTH)
    # Of an inverse so small XLA counts the product of two triangular matrices, the rest is LAPACK's.
    assert everything > sum(2.0 * d**3 for shape in dims for d in shape)
    assert everything / 8 <= share <= 1.3 * everything / 8


@pytest.mark.parametrize("number", [1, 2, 8, 64])
def test_shares_are_complete_and_balanced(number):
    # Twelve layers of a transformer of width 768: modes of 768, 3072 and 64; an embedding's.
    counts, costs = [12 * 6 + 2, 12 * 2, 12 * 4], [768.0**3, 3072.0**3, 64.0**3]
    shares = sharding.equal_shares(counts, costs, number)
    assert len(shares) == number
    for kind, count in enumerate(counts):
        assert sorted(task for share in shares for task in share[kind]) == list(range(count))
    loads = [sum(len(tasks) * cost for tasks, cost in zip(share, costs, strict=True)) for share in shares]
    mean = sum(loads) / number
    # Graham's bound for the longest task first: 4/3 of the best there can be, which is no less than the mean or a task.
    assert max(loads) <= 4 / 3 * max(mean, max(costs))


def test_errors():
    params, *_ = data_and_params()
    grads = jax.tree.map(jnp.zeros_like, params)
    for axis in ("layers", ("data", "layers")):
        tx = tnt_optax.tnt(0.1, inverse_axis=axis, fisher="empirical")
        with jax.set_mesh(mesh_of(AxisType.Auto)), pytest.raises(ValueError, match=r"inverse_axis: .*'layers'.*'data'"):
            tx.update(grads, tx.init(params), params)
    with pytest.raises(ValueError, match=r"inverse_axis: .*has none: call it under jax.set_mesh"):
        tx.update(grads, tx.init(params), params)
    for wrong in (0, ("data", 1), ()):
        with pytest.raises(TypeError, match="inverse_axis: expected None, the name of an axis"):
            tnt_optax.tnt(0.1, inverse_axis=wrong)
    with pytest.raises(ValueError, match=r"inverse_axis: expected each axis once, got \('data', 'data'\)"):
        tnt_optax.tnt(0.1, inverse_axis=("data", "data"))


@pytest.mark.parametrize("jitted", [False, True])
def test_explicit_axes_without_a_mesh_in_context_are_an_error(jitted):
    tx = tnt_optax.tnt(0.1, fisher="empirical")
    params = {"w": jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh_of(AxisType.Explicit), P("data")))}
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"Explicit axes \('data', 'model'\).*call it under jax.set_mesh"):
        (jax.jit(tx.update) if jitted else tx.update)(params, state, params)


@pytest.mark.parametrize("traced", [False, True])
def test_a_sharded_axis_merged_behind_another_is_an_error(mesh, traced):
    tx = tnt_optax.tnt(0.1, views=lambda path, shape: TensorView(((0, 1), (2,))))

    def with_spec(*spec, shape=(8, 4, 16)):
        x = {"kernel": jax.device_put(jnp.zeros(shape), NamedSharding(mesh, P(*spec)))}
        return jax.jit(tx.init)(x) if traced else tx.init(x)

    if traced and mesh.axis_types[0] == AxisType.Auto:
        with_spec(None, "data")  # Not known while tracing, and so the compiler moves it.
    else:
        with pytest.raises(ValueError, match=r"views for params\['kernel'\]: .* merges axis 1.*'data'"):
            with_spec(None, "data")
    with_spec("data", None, "model")  # A block of the first axis is a block of the merged one.
    with_spec(None, "data", shape=(1, 4, 16))


@pytest.mark.parametrize("kind", [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit])
def test_an_axis_divided_into_one_part_may_be_merged(kind):
    tx = tnt_optax.tnt(0.1, damping=1.0, views=lambda path, shape: TensorView(((0, 1), (2,))), fisher="empirical")
    mesh, kernel = jax.make_mesh((8, 1), BOTH, axis_types=(kind, kind)), jnp.sin(jnp.arange(64.0)).reshape(8, 4, 2)
    expected, _ = tx.update(kernel, tx.init(kernel), kernel)
    with jax.set_mesh(mesh):
        divided = jax.device_put(kernel, NamedSharding(mesh, P("data", "model")))
        ours, _ = jax.jit(tx.update)(divided, tx.init(divided), divided)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)  # Two orders of the same float32 sums.


def test_a_state_of_other_modes_is_an_error():
    params = {"kernel": jnp.ones((3, 4, 5))}
    state = tnt_optax.tnt(0.1).init(params)
    for modes in (lambda *_: TensorView(((0, 1), (2,))), lambda *_: TensorView(((1,), (2,)), batch_axes=(0,))):
        tx = tnt_optax.tnt(0.1, views=modes, fisher="empirical")
        with pytest.raises(ValueError, match=r"state: .*\['kernel'\].*other `views`"):
            tx.update(params, state, params)


def test_devices_with_equal_shares_run_one_program():
    def run(x):
        return sharding.distribute([sharding.Task(jnp.tanh, (x,), 1.0)], BOTH)[0]

    x = jnp.linspace(0, 1, 24).reshape(12, 2)  # Four devices have two slices each, four have one.
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        np.testing.assert_allclose(jax.jit(run)(x), np.tanh(x), rtol=1e-6)  # Two float32 libraries.
        assert str(jax.make_jaxpr(run)(x)).count("= tanh") == 2
