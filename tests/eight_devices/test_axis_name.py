"""`axis_name=`: under `shard_map` and `pmap`, the devices together compute what one device would of the whole batch."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import FixedSamples
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import tnt_optax
from tnt_optax import Categorical, Joint, Normal, value_and_sampled_grad

DEVICES, FEATURES = 4, 3


def mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])


def forward(params, inputs):
    return jnp.tanh(inputs @ params["w"] + params["b"])


def problem(batch=16):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(FEATURES, 2)), "b": rng.normal(size=2)}
    params, inputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, rng.normal(size=(batch, FEATURES))))
    return params, inputs, FixedSamples().sample(jax.random.key(0), forward(params, inputs)) ** 2


def under_shard_map(function, *, check_vma=True):
    """`function` of the parameters and of the device's part of inputs and targets."""
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P()}
    return jax.jit(jax.shard_map(function, mesh=mesh(), check_vma=check_vma, **specs))


def all_of(value_and_grads, params, inputs, targets, key=0):
    loss, grads, sampled_grads = value_and_grads(params, inputs, targets, jax.random.key(key))
    return loss, grads, sampled_grads()


def assert_equal(ours, expected):
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)  # The same sums in float32, in another order.


@pytest.mark.parametrize(
    ("check_vma", "scale", "microbatches"),
    [
        pytest.param(*case, marks=[] if case in ((True, "mean", 2), (False, "fisher", 1)) else pytest.mark.slow)
        for case in itertools.product([True, False], ["mean", "fisher"], [1, 2])
    ],
)
def test_shard_map(check_vma, scale, microbatches):
    """With a regularizer, which counts once, and with the sampled gradient inside a conditional."""
    options = {"scale": scale, "regularizer": lambda p: jnp.sum(jnp.square(p["w"]))}
    of_a_device = value_and_sampled_grad(
        forward, FixedSamples(), axis_name="data", microbatches=microbatches, **options
    )
    ours = under_shard_map(functools.partial(all_of, of_a_device), check_vma=check_vma)(*problem())
    assert_equal(ours, all_of(value_and_sampled_grad(forward, FixedSamples(), **options), *problem()))


def test_pmap():
    params, inputs, targets = problem()
    of_a_device = value_and_sampled_grad(forward, FixedSamples(), axis_name="data")
    together = jax.pmap(functools.partial(all_of, of_a_device), "data", in_axes=(None, 0, 0))
    parts = [x.reshape(DEVICES, -1, *x.shape[1:]) for x in (inputs, targets)]
    ours = jax.tree.map(lambda x: x[0], together(params, *parts))
    assert_equal(ours, all_of(value_and_sampled_grad(forward, FixedSamples()), params, inputs, targets))


def test_a_loss_and_a_joint_distribution():
    params, inputs, targets = problem()

    def two_heads(params, inputs):
        outputs = forward(params, inputs)
        return {"rates": outputs, "means": outputs[:, :1]}

    predictive = Joint({"rates": FixedSamples(), "means": Fixed()})

    def loss(outputs, targets):
        return jnp.mean(jnp.abs(outputs["rates"] - targets["rates"])) + jnp.mean(outputs["means"])

    def arguments(inputs, targets):
        return inputs, {"rates": targets, "means": targets[:, :1]}

    of_a_device = value_and_sampled_grad(two_heads, predictive, loss=loss, axis_name="data")
    ours = under_shard_map(lambda p, x, y: all_of(of_a_device, p, *arguments(x, y)))(params, inputs, targets)
    whole = value_and_sampled_grad(two_heads, predictive, loss=loss)
    assert_equal(ours, all_of(whole, params, *arguments(inputs, targets)))


class Fixed(Normal):
    def sample(self, key, outputs):
        return jnp.sin(5 * outputs)


def test_a_device_without_weights_does_not_stop_the_others():
    """The batch that pads the data to a multiple of the devices."""
    params, inputs, _ = problem(batch=8)
    weights = jnp.array([1.0, 1, 1, 1, 1, 1, 0, 0])

    def size(microbatches):
        def run(params, inputs, weights):
            value_and_grads = value_and_sampled_grad(
                forward, Categorical(weights), axis_name="data", microbatches=microbatches
            )
            return all_of(value_and_grads, params, inputs, jnp.zeros(2, int))[2]

        return optax.tree.norm(under_shard_map(run)(params, inputs, weights))

    # The gradient of six labels, of size sqrt(6) * |mean|; one of 0 would shrink the statistics.
    assert float(size(1)) > 0.1
    assert float(size(2)) > 0.1


def test_every_device_samples_labels_of_its_own():
    """Of the same examples; a mean over devices that draw the same labels would not have the covariance F/m."""
    params, inputs, _ = problem(batch=2)
    same, labels = jnp.tile(inputs, (DEVICES, 1)), jnp.zeros(2 * DEVICES, int)
    of_a_device = value_and_sampled_grad(forward, Categorical(), axis_name="data", scale="mean")
    step = under_shard_map(lambda p, x, y: all_of(of_a_device, p, x, y)[2])
    drawn = []
    for device in range(DEVICES):
        key = jax.random.fold_in(jax.random.key(0), device)
        targets = Categorical().sample(key, forward(params, inputs))
        drawn.append(jax.grad(lambda p, y=targets: Categorical().loss(forward(p, inputs), y))(params))
    assert len({float(g["b"][0]) for g in drawn}) > 1
    assert_equal(step(params, same, labels), jax.tree.map(lambda *g: sum(g) / DEVICES, *drawn))


@pytest.mark.slow
def test_a_training_keeps_the_parameters_identical_and_equals_one_device():
    tx = tnt_optax.tnt(0.1, damping=0.1, statistics_period=2, inverse_period=3, trust_radius=0.3)

    def train(value_and_grads, params, inputs, targets):
        state = tx.init(params)
        for t in range(4):
            _, grads, sampled_grads = value_and_grads(params, inputs, targets, jax.random.key(t))
            updates, state = tx.update(grads, state, params, sampled_grads=sampled_grads)
            params = optax.apply_updates(params, updates)
        return params, state

    of_a_device = value_and_sampled_grad(forward, FixedSamples(), axis_name="data")
    # With check_vma, out_specs=P() is an error for what may differ between devices.
    ours = under_shard_map(functools.partial(train, of_a_device))(*problem())
    expected = jax.jit(functools.partial(train, value_and_sampled_grad(forward, FixedSamples())))(*problem())
    # Inverses of condition number up to 1e2 in float32.
    chex.assert_trees_all_close(ours, expected, rtol=1e-3, atol=1e-4)
