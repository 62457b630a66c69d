"""Microbatches: the same numbers as the whole batch, in the memory of a part, and nothing that is not asked for."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import FixedSamples, Poisson, count, marked

from tnt_optax import Bernoulli, Categorical, Normal, adaptive_tnt, tnt, value_and_sampled_grad
from tnt_optax.microbatches import split

BATCH, FEATURES, CLASSES = 12, 4, 3


@dataclasses.dataclass(frozen=True)
class Unregistered(Poisson):
    def split(self, number):
        return self, jnp.full(number, 1 / number)


def forward(params, inputs):
    return jnp.tanh(inputs @ params["w"] + params["b"])


def problem(predictive):
    """In the widest dtype that there is."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(FEATURES, CLASSES))), "b": jnp.asarray(rng.normal(size=CLASSES))}
    inputs = jnp.asarray(rng.normal(size=(BATCH, FEATURES)))
    return params, inputs, predictive.sample(jax.random.key(7), forward(params, inputs))


def weights(kind):
    if kind == "mask":
        return jnp.arange(BATCH) % 3 != 1
    if kind == "empty part":
        return jnp.arange(BATCH) % 4 != 1
    if kind == "no weights":
        return jnp.zeros(BATCH)
    return jnp.linspace(0.1, 2.0, BATCH)


def sampled_labels(predictive, params, inputs, key, k):
    """Of the whole batch, in its order: what the parts draw."""
    labels = None
    for j, subkey in enumerate(jax.random.split(key, k)):
        drawn = np.asarray(predictive.sample(subkey, forward(params, inputs[j::k])))
        labels = np.zeros((BATCH, *drawn.shape[1:]), drawn.dtype) if labels is None else labels
        labels[j::k] = drawn
    return jnp.asarray(labels)


CASES = {
    "categorical": (Categorical, 12),
    "bernoulli": (Bernoulli, 2),
    "normal": (lambda: Normal(0.5), 3),
    "variances": (lambda: Normal(jnp.arange(1.0, 1 + CLASSES)), 4),
    "own": (Poisson, 4),
    **{
        kind: (lambda kind=kind: Categorical(weights(kind)), 4) for kind in ("mask", "empty part", "no weights", "real")
    },
}


SLOW = "bernoulli", "normal", "empty part"


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        *(pytest.param(name, "fisher", marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES),
        ("real", "mean"),
    ],
)
def test_microbatches_equal_one_batch(name, scale):
    make, k = CASES[name]
    with jax.enable_x64(True):
        predictive, key = make(), jax.random.key(3)
        params, inputs, targets = problem(predictive)
        value_and_grads = jax.jit(value_and_sampled_grad(forward, predictive, scale=scale, microbatches=k))
        loss, grads, sampled_grads = value_and_grads(params, inputs, targets, key)

        def whole(targets):
            return jax.value_and_grad(lambda p: predictive.loss(forward(p, inputs), targets))(params)

        # Sums in another order, in float64.
        chex.assert_trees_all_close((loss, grads), whole(targets), rtol=1e-12, atol=1e-14)
        _, expected = whole(sampled_labels(predictive, params, inputs, key, k))
        if scale == "fisher":
            size = BATCH
            if (w := getattr(predictive, "weights", None)) is not None:
                w = np.asarray(w, float)
                size = np.sum(w) ** 2 / max(np.sum(w**2), 1e-300)
            expected = jax.tree.map(lambda g: np.sqrt(size) * g, expected)
        chex.assert_trees_all_close(sampled_grads(), expected, rtol=1e-12, atol=1e-14)
        chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)


def test_gradients_against_numpy():
    """A linear model with a squared error, whose gradients are written down."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        w, x, y = rng.normal(size=(4, 3)), rng.normal(size=(6, 4)), rng.normal(size=(6, 3))
        key = jax.random.key(0)
        linear = value_and_sampled_grad(lambda w, x: x @ w, Normal(), scale="fisher", microbatches=3)
        loss, grads, sampled_grads = linear(jnp.asarray(w), jnp.asarray(x), jnp.asarray(y), key)
        np.testing.assert_allclose(loss, np.sum((x @ w - y) ** 2) / 2 / 6, rtol=1e-13)
        np.testing.assert_allclose(grads, x.T @ (x @ w - y) / 6, rtol=1e-12)
        noise = np.zeros((6, 3))
        for j, subkey in enumerate(jax.random.split(key, 3)):
            noise[j::3] = jax.random.normal(subkey, (2, 3), jnp.float64)
        np.testing.assert_allclose(sampled_grads(), -x.T @ noise / np.sqrt(6), rtol=1e-12)


def test_one_microbatch_is_the_program_without():
    predictive = Categorical(jnp.ones(BATCH))
    arguments = (*problem(predictive), jax.random.key(0))

    def jaxpr(**options):
        def both(*args):
            loss, grads, sampled_grads = value_and_sampled_grad(forward, predictive, scale="fisher", **options)(*args)
            return loss, grads, sampled_grads()

        return jax.make_jaxpr(both)(*arguments)

    # An object's address names a function of JAX.
    assert re.sub("0x[0-9a-f]+", "", str(jaxpr(microbatches=1))) == re.sub("0x[0-9a-f]+", "", str(jaxpr()))
    assert count(jaxpr(microbatches=1), "scan", inside_cond=False) == 0
    assert count(jaxpr(microbatches=2), "scan", inside_cond=False) == 2


def marked_step(tx, record=lambda: None):
    def forward_with_marks(params, inputs):
        jax.debug.callback(record)
        return marked(forward(params, inputs))

    value_and_grads = value_and_sampled_grad(forward_with_marks, Categorical(), microbatches=4)

    def step(params, opt_state, inputs, targets, key):
        _, grads, sampled_grads = value_and_grads(params, inputs, targets, key)
        return tx.update(grads, opt_state, params, sampled_grads=sampled_grads)[1]

    return step


def test_the_sampled_passes_stand_inside_the_conditional_only():
    params, inputs, targets = problem(Categorical())
    tx = tnt(0.1)
    jaxpr = jax.make_jaxpr(marked_step(tx))(params, tx.init(params), inputs, targets, jax.random.key(0))
    for primitive in ("sin", "erf"):
        assert count(jaxpr, primitive, inside_cond=False) == 1
        assert count(jaxpr, primitive, inside_cond=True) == 1


def test_the_sampled_passes_run_only_every_statistics_period():
    params, inputs, targets = problem(Categorical())
    runs = []
    tx = tnt(0.1, statistics_period=3, inverse_period=2)
    step = jax.jit(marked_step(tx, record=lambda: runs.append(1)))
    opt_state = tx.init(params)
    per_step = []
    for t in range(5):
        runs.clear()
        opt_state = jax.block_until_ready(step(params, opt_state, inputs, targets, jax.random.key(t)))
        jax.effects_barrier()
        per_step.append(len(runs))
    assert per_step == [8, 4, 4, 8, 4]


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(tnt(0.1, statistics_period=2), id="tnt"),
        pytest.param(adaptive_tnt(), id="adaptive_tnt"),
    ],
)
def test_memory_is_that_of_one_part(tx):
    """Five layers, whose activations are far larger than their parameters."""
    params = [0.1 * jnp.ones((32, 32)) for _ in range(5)]
    inputs, targets = jnp.ones((8192, 32)), jnp.zeros(8192, int)

    def deep(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    def temporaries(k):
        def step(params, opt_state, inputs, targets, key):
            value_and_grads = value_and_sampled_grad(deep, Categorical(), microbatches=k)
            _, grads, sampled_grads = value_and_grads(params, inputs, targets, key)
            return tx.update(grads, opt_state, params, sampled_grads=sampled_grads)

        lowered = jax.jit(step).lower(params, tx.init(params), inputs, targets, jax.random.key(0))
        # As users have it: tests/conftest.py leaves these out.
        compiled = lowered.compile({"xla_cpu_use_fusion_emitters": True})
        return compiled.memory_analysis().temp_size_in_bytes

    whole, quarter, sixteenth = (temporaries(k) for k in (1, 4, 16))
    activations = len(params) * inputs.nbytes
    assert whole > activations
    # What is saved are activations; the inputs in parts may be a copy.
    assert whole - quarter > 0.6 * activations
    assert whole - sixteenth > 0.75 * activations


@pytest.mark.parametrize("scale", ["mean", "fisher"])
def test_a_training_through_the_optimizer(scale):
    with jax.enable_x64(True):
        params, inputs, targets = problem(Bernoulli())
        tx = tnt(0.1, damping=0.1, statistics_period=2, inverse_period=3)

        @functools.partial(jax.jit, static_argnums=2)
        def step(params, opt_state, k):
            value_and_grads = value_and_sampled_grad(forward, FixedSamples(), scale=scale, microbatches=k)
            loss, grads, sampled_grads = value_and_grads(params, inputs, targets, jax.random.key(0))
            updates, opt_state = tx.update(grads, opt_state, params, sampled_grads=sampled_grads)
            return optax.apply_updates(params, updates), opt_state, loss

        whole = parts = (params, tx.init(params), 0.0)
        for _ in range(5):
            whole, parts = step(*whole[:2], 1), step(*parts[:2], 3)
        # Sums in another order, in float64.
        chex.assert_trees_all_close(whole, parts, rtol=1e-9, atol=1e-10)


def test_a_mask_made_inside_the_step():
    params, inputs, targets = problem(Categorical())
    mask = weights("mask")

    @jax.jit
    def step(mask, key):
        return value_and_sampled_grad(forward, Categorical(mask), microbatches=4)(params, inputs, targets, key)

    loss, grads, sampled_grads = step(mask, jax.random.key(0))
    short = value_and_sampled_grad(forward, Categorical())(params, inputs[mask], targets[mask], jax.random.key(0))
    chex.assert_trees_all_close((loss, grads), short[:2], rtol=1e-5, atol=1e-7)
    chex.assert_tree_all_finite(sampled_grads())


def test_aux_is_stacked():
    params, inputs, targets = problem(Categorical())

    def with_aux(params, inputs):
        outputs = forward(params, inputs)
        return outputs, {"mean": jnp.mean(outputs, axis=0), "steps": jnp.int32(1)}

    value_and_grads = value_and_sampled_grad(with_aux, Categorical(), has_aux=True, microbatches=3)
    (loss, aux), grads, sampled = value_and_grads(params, inputs, targets, jax.random.key(0))
    plain = value_and_sampled_grad(forward, Categorical(), microbatches=3)
    other = plain(params, inputs, targets, jax.random.key(0))
    chex.assert_trees_all_close((loss, grads, sampled()), (other[0], other[1], other[2]()), rtol=1e-6)
    assert aux["mean"].shape == (3, CLASSES)
    np.testing.assert_allclose(aux["mean"].mean(axis=0), forward(params, inputs).mean(axis=0), rtol=1e-5)
    assert aux["steps"].tolist() == [1, 1, 1]


def test_a_dropout_key_for_each_example():
    params, x, targets = problem(Categorical())
    keys = jax.random.split(jax.random.key(5), BATCH)
    seen = []

    def dropped(params, inputs):
        x, keys = inputs
        jax.debug.callback(lambda data: seen.append(tuple(data.tolist())), jax.random.key_data(keys[0]))
        return forward(params, jnp.where(jax.random.bernoulli(keys[0], 0.5, x.shape), x, 0))

    value_and_grads = value_and_sampled_grad(dropped, Categorical(), microbatches=4)
    loss, _, sampled_grads = jax.jit(value_and_grads)(params, (x, keys), targets, jax.random.key(0))
    jax.block_until_ready((loss, sampled_grads()))
    jax.effects_barrier()
    # A mask of its own for each part, and the same ones in the sampled passes.
    assert seen[:4] == seen[4:]
    assert seen[:4] == [tuple(data) for data in jax.random.key_data(keys[:4]).tolist()]


def test_the_examples_of_the_parts():
    assert split(3, inputs=jnp.arange(6))[0].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_gradients_in_bfloat16_are_summed_in_float32():
    """127 small gradients beside a large one, which bfloat16 would lose one by one."""
    inputs = jnp.ones((128, 1), jnp.bfloat16).at[0].set(256)
    value_and_grads = value_and_sampled_grad(lambda w, x: w * x, Normal(), microbatches=128)
    _, grads, _ = value_and_grads(jnp.bfloat16(0), inputs, -jnp.ones_like(inputs), jax.random.key(0))
    assert grads.dtype == jnp.bfloat16
    assert float(grads) == float(jnp.bfloat16((256 + 127) / 128))


@pytest.mark.parametrize(
    ("inputs", "targets", "predictive", "k", "error", "message"),
    [
        (
            jnp.ones((5, 4)),
            jnp.zeros(5, int),
            Categorical(),
            2,
            ValueError,
            r"inputs: unequal .*=2 divides, got shape \(5, 4\)",
        ),
        (
            jnp.ones((4, 4)),
            jnp.zeros(2, int),
            Categorical(),
            2,
            ValueError,
            r"targets: unequal .*inputs, 4, .*got shape \(2,\)",
        ),
        ((jnp.ones((4, 4)), 0.5), jnp.zeros(4, int), Categorical(), 2, ValueError, r"inputs\[1\]: .*got shape \(\)"),
        (
            {"x": jnp.ones((4, 4)), "key": jax.random.key(0)},
            jnp.zeros(4, int),
            Categorical(),
            2,
            ValueError,
            r"inputs\['key'\]: .*jax.random.split\(key, batch_size\)",
        ),
        (None, None, Categorical(), 2, ValueError, "inputs and targets: expected arrays"),
        (
            jnp.ones((4, 4)),
            jnp.zeros(4, int),
            Categorical(jnp.ones(3)),
            2,
            ValueError,
            r"weights: unequal .*got shape \(3,\)",
        ),
        (jnp.ones((4, 4)), jnp.zeros(4, int), Categorical(jnp.ones(2)), 2, ValueError, r"weights: expected shape"),
        (jnp.ones((4, 4)), jnp.ones((4, 3)), Normal(jnp.ones((4, 1))), 2, ValueError, "variance: .*microbatches"),
        (jnp.ones((4, 4)), jnp.ones((4, 3)), Normal(jnp.ones((4, 1))), 4, ValueError, "variance: .*microbatches"),
        (jnp.ones((4, 4)), jnp.ones((4, 3)), Unregistered(), 2, TypeError, "predictive: .*register"),
    ],
)
def test_batches_that_cannot_be_split(inputs, targets, predictive, k, error, message):
    def forward(params, inputs):
        return (inputs["x"] if isinstance(inputs, dict) else jax.tree.leaves(inputs)[0]) @ params

    value_and_grads = jax.jit(value_and_sampled_grad(forward, predictive, microbatches=k))
    with pytest.raises(error, match=message):
        value_and_grads(jnp.ones((4, 3)), inputs, targets, jax.random.key(0))


def test_a_distribution_with_arrays_has_to_say_whose_they_are():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Scaled:
        scales: jax.Array

        def loss(self, outputs, targets):
            return jnp.mean(self.scales * jnp.square(outputs - targets))

        def sample(self, key, outputs):
            return outputs

    arguments = (jnp.ones((4, 3)), jnp.ones((6, 4)), jnp.ones((6, 3)), jax.random.key(0))
    with pytest.raises(ValueError, match=r"predictive: .*split\(number\).*Scaled.*\(6, 1\) at \.scales"):
        value_and_sampled_grad(lambda w, x: x @ w, Scaled(jnp.ones((6, 1))), microbatches=2)(*arguments)
    value_and_sampled_grad(lambda w, x: x @ w, Scaled(jnp.float32(2)), microbatches=2)(*arguments)


@pytest.mark.parametrize(
    ("k", "error"), [(0, ValueError), (1.5, ValueError), ("2", TypeError), (True, TypeError), (jnp.int32(2), TypeError)]
)
def test_bad_numbers(k, error):
    with pytest.raises(error, match=r"^microbatches: expected "):
        value_and_sampled_grad(forward, Categorical(), microbatches=k)
