"""Fisher products, losses and `adaptive_tnt`: on several devices the numbers of one."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import FixedSamples
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tnt_optax
from tnt_optax import Categorical, Joint, value_and_sampled_grad

DEVICES, BATCH, FEATURES, HIDDEN, OUTPUTS = 2, 8, 3, 4, 3


def normals(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def make_params(seed=0):
    w, layers, out, bias = normals(seed, (FEATURES, HIDDEN), (2, HIDDEN, HIDDEN), (HIDDEN, OUTPUTS), (OUTPUTS,))
    return {"w": w, "layers": layers / 2, "out": out, "bias": bias}


def forward(params, inputs, gather=lambda w: w):
    x = jnp.tanh(inputs @ gather(params["w"]))
    x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ gather(w)), None), x, params["layers"])
    return x @ gather(params["out"]) + gather(params["bias"])


def two_heads(params, inputs):
    outputs = forward(params, inputs)
    return {"labels": outputs, "rates": jnp.tanh(outputs)}


def penalty(params):
    return 0.01 * jnp.square(jnp.sum(jnp.square(params["w"])) + jnp.sum(jnp.square(params["out"])))


def problem(name):
    (inputs,) = normals(5, (BATCH, FEATURES))
    labels, rates = np.arange(BATCH) % OUTPUTS, np.abs(inputs)
    if name == "joint":
        predictive = lambda weights: Joint({"labels": Categorical(weights), "rates": FixedSamples()})  # noqa: E731
        return two_heads, predictive, inputs, {"labels": labels, "rates": rates}
    return forward, Categorical, inputs, labels


def numbers_of(sampled_grads, directions, others):
    return {
        "fisher": sampled_grads.fisher_products(directions),
        "regularizer": sampled_grads.regularizer_products(directions),
        "loss": sampled_grads.loss_at(others),
        "same": sampled_grads.loss_at(sampled_grads.params),
        "left out": sampled_grads.loss_at({**others, "layers": None}),
    }


def two_devices(kind=AxisType.Auto):
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,), devices=jax.devices()[:DEVICES])


@pytest.mark.parametrize(
    ("name", "check_vma", "microbatches", "crossing"),
    [
        pytest.param(*case, crossing, marks=[] if crossing == quick else pytest.mark.slow)
        for case, quick in {
            ("categorical", True, 1): True,
            ("joint", False, 1): False,
            ("joint", True, 2): True,
            ("categorical", False, 2): None,
            ("joint", True, 1): None,
        }.items()
        for crossing in (False, True)
    ],
)
def test_the_numbers_of_a_divided_batch(name, check_vma, microbatches, crossing):
    """With weights of which every device has the same sum, because each divides by its own."""
    model, predictive, inputs, targets = problem(name)
    weights = np.float32([1, 2, 0, 1, 2, 1, 1, 0])
    params, others, directions = make_params(), make_params(9), [make_params(1), make_params(2)]

    def numbers(axis_name, params, inputs, targets, weights):
        options = {"regularizer": penalty, "axis_name": axis_name, "microbatches": microbatches if axis_name else 1}
        value_and_grads = value_and_sampled_grad(model, predictive(weights), **options)
        *_, sampled_grads = value_and_grads(params, inputs, targets, jax.random.key(0))
        use = functools.partial(numbers_of, directions=directions, others=others)
        return (jax.jit(use) if crossing else use)(sampled_grads), sampled_grads.loss

    def of_a_device(*args):
        ours = numbers("data", *args)
        return ours, jax.tree.map(lambda x: x[None], ours)

    specs = {"in_specs": (P(), P("data"), P("data"), P("data")), "out_specs": (P(), P("data"))}
    together = jax.jit(jax.shard_map(of_a_device, mesh=two_devices(), check_vma=check_vma, **specs))
    # With check_vma, out_specs=P() is an error for what may differ between devices.
    ours, per_device = together(params, inputs, targets, weights)
    for x in jax.tree.leaves(per_device):
        assert x.shape[0] == DEVICES
        np.testing.assert_array_equal(x[0], x[1])
    expected = jax.jit(functools.partial(numbers, None))(params, inputs, targets, weights)
    # The same sums in float32, in another order. Products are between 0.05 and 10.
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[0]["same"], ours[1], rtol=1e-6)
    assert float(ours[0]["fisher"][0, 0]) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_training_under_shard_map_equals_one_device(check_vma):
    params, (inputs,) = make_params(), normals(5, (BATCH, FEATURES))
    targets, steps = np.abs(inputs), 7  # Of which the steps 0 and 5 adapt the damping.
    tx = tnt_optax.adaptive_tnt(damping=0.1, inverse_period=3)

    def train(axis_name, params, inputs, targets):
        value_and_grads = value_and_sampled_grad(
            lambda p, x: jnp.tanh(forward(p, x)), FixedSamples(), axis_name=axis_name, regularizer=penalty
        )

        def step(carry, key):
            params, state = carry
            loss, grads, sampled_grads = value_and_grads(params, inputs, targets, key)
            updates, state = tx.update(grads, state, params, sampled_grads=sampled_grads)
            return (optax.apply_updates(params, updates), state), loss

        keys = jax.random.split(jax.random.key(0), steps)
        (params, state), losses = jax.lax.scan(step, (params, tx.init(params)), keys)
        return params, state[1]._asdict(), losses

    def of_a_device(*args):
        ours = train("data", *args)
        return ours, jax.tree.map(lambda x: x[None], ours)

    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": (P(), P("data"))}
    together = jax.jit(jax.shard_map(of_a_device, mesh=two_devices(), check_vma=check_vma, **specs))
    ours, per_device = together(params, inputs, targets)
    for x in jax.tree.leaves(per_device):
        np.testing.assert_array_equal(x[0], x[1])
    expected = jax.jit(functools.partial(train, None))(params, inputs, targets)
    # 7 steps in float32 with inverses of condition number up to 1e2.
    chex.assert_trees_all_close(ours[0], expected[0], rtol=1e-3, atol=1e-3)
    chex.assert_trees_all_close(ours[2], expected[2], rtol=1e-3)
    for name in ("count", "rejected_steps", "bounded_steps"):
        assert int(ours[1][name]) == int(expected[1][name])
    np.testing.assert_allclose(ours[1]["damping"], expected[1]["damping"], rtol=1e-6)
    assert int(ours[1]["rejected_steps"]) == 0
    assert float(ours[2][-1]) < float(ours[2][0])


# A mesh whose arrays the compiler (Auto) or the types (Explicit) divide among the devices.

SPECS = {
    "data parallel": {"w": P(), "layers": P(), "out": P(), "bias": P()},
    "FSDP": {"w": P(None, "data"), "layers": P(None, "data"), "out": P("data"), "bias": P()},
    "tensor parallel": {"w": P(None, "model"), "layers": P(None, "data", "model"), "out": P("data"), "bias": P()},
}
# The last divides everything.
WAYS = [
    pytest.param("data parallel", marks=pytest.mark.slow),
    pytest.param("FSDP", marks=pytest.mark.slow),
    "tensor parallel",
]
KINDS = [pytest.param(AxisType.Auto, id="Auto"), pytest.param(AxisType.Explicit, id="Explicit")]


@pytest.fixture(params=KINDS)
def mesh(request):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(request.param, request.param))
    with jax.set_mesh(mesh):
        yield mesh


def gather_on(mesh):
    """With Explicit axes it is the model that says that a layer's weights are gathered for its product."""
    return (lambda w: jax.sharding.reshard(w, P())) if mesh.axis_types[0] == AxisType.Explicit else lambda w: w


def put(tree, mesh, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def on_mesh(mesh, way, *, directions=0):
    """Parameters, directions and data as they lie on the mesh."""
    (inputs,) = normals(5, (BATCH, FEATURES))
    trees = [put(make_params(seed), mesh, SPECS[way]) for seed in (0, 9, *range(1, 1 + directions))]
    return (*trees[:2], trees[2:], *put((inputs, np.arange(BATCH) % OUTPUTS), mesh, (P("data"), P("data"))))


def sampled_on(gather, microbatches, params, inputs, labels):
    options = {"regularizer": penalty, "microbatches": microbatches}
    value_and_grads = value_and_sampled_grad(functools.partial(forward, gather=gather), Categorical(), **options)
    return value_and_grads(params, inputs, labels, jax.random.key(0))[2]


@functools.cache
def numbers_on_one_device():
    (inputs,) = normals(5, (BATCH, FEATURES))
    create = jax.jit(functools.partial(sampled_on, lambda w: w, 1))
    with jax.set_mesh(None):
        sampled_grads = create(make_params(), inputs, np.arange(BATCH) % OUTPUTS)
        return jax.device_get(numbers_of(sampled_grads, [make_params(1), make_params(2)], make_params(9)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("crossing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_numbers_on_a_mesh(mesh, way, microbatches, crossing):
    params, others, directions, inputs, labels = on_mesh(mesh, way, directions=2)
    create = functools.partial(sampled_on, gather_on(mesh), microbatches)
    if crossing:
        ours = jax.jit(numbers_of)(jax.jit(create)(params, inputs, labels), directions, others)
    else:
        ours = jax.jit(lambda *args: numbers_of(create(*args), directions, others))(params, inputs, labels)
    # The same sums in float32, in another order. Products are between 0.05 and 10.
    chex.assert_trees_all_close(jax.device_get(ours), numbers_on_one_device(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("left_out", [None, pytest.param(optax.MaskedNode(), id="MaskedNode", marks=pytest.mark.slow)])
def test_directions_that_lie_elsewhere(mesh, left_out):
    """On every device, though the parameters are divided; and partly left out."""
    params, _, _, inputs, labels = on_mesh(mesh, "FSDP")
    directions = [{**make_params(1), "layers": left_out}, {**make_params(2), "w": left_out, "out": left_out}]
    zeros = jax.tree.map(np.zeros_like, make_params())
    same = [jax.tree.map(lambda z, x: z if x is left_out else x, zeros, d) for d in directions]

    def products(gather, params, inputs, labels, directions):
        return sampled_on(gather, 1, params, inputs, labels).fisher_products(directions)

    ours = jax.device_get(jax.jit(functools.partial(products, gather_on(mesh)))(params, inputs, labels, directions))
    with jax.set_mesh(None):
        arguments = (make_params(), *jax.device_get((inputs, labels)), same)
        expected = jax.jit(functools.partial(products, lambda w: w))(*arguments)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)  # See above.


def trained(gather, params, inputs, targets, *, steps=7):
    model = lambda p, x: jnp.tanh(forward(p, x, gather))  # noqa: E731
    value_and_grads = value_and_sampled_grad(model, FixedSamples(), regularizer=penalty)
    tx = tnt_optax.adaptive_tnt(damping=0.1, inverse_period=3)
    state, losses = tx.init(params), []

    @jax.jit
    def step(params, state, key):
        loss, grads, sampled_grads = value_and_grads(params, inputs, targets, key)
        updates, state = tx.update(grads, state, params, sampled_grads=sampled_grads)
        return optax.apply_updates(params, updates), state, loss

    for t in range(steps):
        params, state, loss = step(params, state, jax.random.key(t))
        losses.append(loss)
    return params, state[1], losses


@functools.cache
def trained_on_one_device():
    (inputs,) = normals(5, (BATCH, FEATURES))
    with jax.set_mesh(None):
        return jax.device_get(trained(lambda w: w, jax.tree.map(jnp.asarray, make_params()), inputs, np.abs(inputs)))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_training_on_a_mesh(mesh, way):
    params, _, _, inputs, _ = on_mesh(mesh, way)
    new_params, state, losses = trained(gather_on(mesh), params, inputs, jnp.abs(inputs))
    # The step is divided as its parameter is, to take as much memory.
    for step, param in zip(jax.tree.leaves(state.step), jax.tree.leaves(params), strict=True):
        assert step.addressable_shards[0].data.size <= param.addressable_shards[0].data.size
    expected_params, expected_state, expected_losses = trained_on_one_device()
    # 7 steps in float32 with inverses of condition number up to 1e2.
    chex.assert_trees_all_close(jax.device_get(new_params), expected_params, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-3)
    np.testing.assert_allclose(state.damping, expected_state.damping, rtol=1e-6)
    assert int(state.rejected_steps) == 0
