"""The sampled gradient: its covariance against exact Fisher matrices, and what is computed when."""

import dataclasses
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxprs import count

import tnt_optax
from tnt_optax import Bernoulli, Categorical, Normal, tnt, value_and_sampled_grad

BATCH, FEATURES, OUTPUTS = 5, 3, 2


@dataclasses.dataclass(frozen=True)
class Poisson:
    """A distribution of a user's own, with the logarithms of the rates as outputs; no pytree, no batch_size."""

    def loss(self, outputs, targets):
        return jnp.sum(jnp.exp(outputs) - targets * outputs) / len(outputs)

    def sample(self, key, outputs):
        return jax.random.poisson(key, jnp.exp(outputs)).astype(outputs.dtype)


def forward(params, inputs):
    return jnp.tanh(inputs @ params["w"] + params["b"])


def problem(seed=0):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(FEATURES, OUTPUTS)), "b": rng.normal(size=OUTPUTS)}
    inputs = rng.normal(size=(BATCH, FEATURES))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, inputs))


def outcomes(predictive, outputs):
    """All values that one example's targets can take, with their probabilities, by enumeration (float64)."""
    z = np.asarray(outputs, float)
    if isinstance(predictive, Categorical):
        p = np.exp(z) / np.exp(z).sum()
        return [(np.int32(label), p[label]) for label in range(len(z))]
    if isinstance(predictive, Bernoulli):
        p = 1 / (1 + np.exp(-z))
        bits = itertools.product((0.0, 1.0), repeat=len(z))
        return [(np.float32(y), math.prod(np.where(np.array(y) == 1, p, 1 - p))) for y in bits]
    if isinstance(predictive, Poisson):
        rates = np.exp(z)  # At most e, because of tanh: 25 counts leave out less than 1e-15.
        return [
            (np.float32(y), math.prod(r**n * math.exp(-r) / math.factorial(n) for r, n in zip(rates, y, strict=True)))
            for y in itertools.product(range(25), repeat=len(z))
        ]
    # Gauss-Hermite quadrature with three nodes is exact for the squares of gradients, which are linear in the target.
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    deviation = math.sqrt(predictive.variance)
    return [
        (np.float32(z + deviation * nodes[list(i)]), math.prod(weights[list(i)] / weights.sum()))
        for i in itertools.product(range(3), repeat=len(z))
    ]


def exact_fisher(predictive, params, inputs):
    """Eq. (1), enumerated over the targets of every example."""

    @jax.jit
    def gradient(x, y):
        tree = jax.grad(lambda p: predictive.loss(forward(p, x[None]), y[None]))(params)
        return jax.flatten_util.ravel_pytree(tree)[0]

    fisher = 0.0
    for x in inputs:
        for y, probability in outcomes(predictive, forward(params, x[None])[0]):
            g = np.asarray(gradient(x, y), float)
            fisher += probability * np.outer(g, g) / len(inputs)
    return fisher


@pytest.mark.parametrize("scale", ["mean", "fisher"])
@pytest.mark.parametrize(
    "predictive", [Categorical(), Bernoulli(), Normal(0.5), Poisson()], ids=lambda p: type(p).__name__
)
def test_covariance_of_sampled_gradients_converges_to_the_exact_fisher_matrix(predictive, scale):
    params, inputs = problem()
    fisher = exact_fisher(predictive, params, inputs) / (BATCH if scale == "mean" else 1)
    value_and_grads = value_and_sampled_grad(forward, predictive, scale=scale)
    targets = predictive.sample(jax.random.key(1), forward(params, inputs))

    @jax.jit
    def moments(key):
        def sampled(key):
            tree = value_and_grads(params, inputs, targets, key)[2]()
            return jax.flatten_util.ravel_pytree(tree)[0]

        g = jax.vmap(sampled)(jax.random.split(key, 40_000))
        return jnp.mean(g, axis=0), g.T @ g / len(g)

    means, seconds = zip(*(moments(key) for key in jax.random.split(jax.random.key(0), 5)), strict=True)
    mean, covariance = np.mean(means, axis=0), np.mean(seconds, axis=0)
    size = np.linalg.norm(fisher)
    # 200,000 draws: the standard error of an element of the covariance is some 2/sqrt(200,000) = 0.5% of its scale.
    assert np.linalg.norm(covariance - fisher) < 0.015 * size
    # The first moment is zero (Section 2): five standard errors.
    assert np.linalg.norm(mean) < 5 * math.sqrt(np.trace(fisher) / 200_000)


def test_loss_and_gradient_are_those_of_the_targets():
    params, inputs = problem()
    targets = jnp.array([0, 1, 1, 0, 1])
    loss, grads, _ = value_and_sampled_grad(forward, Categorical())(params, inputs, targets, jax.random.key(0))
    expected = jax.value_and_grad(lambda p: Categorical().loss(forward(p, inputs), targets))(params)
    chex.assert_trees_all_close((loss, grads), expected, rtol=1e-6)


def test_sampled_gradient_is_the_gradient_of_the_sampled_targets():
    params, inputs = problem()
    key = jax.random.key(3)
    _, _, sampled_grads = value_and_sampled_grad(forward, Categorical())(params, inputs, jnp.zeros(5, int), key)
    labels = Categorical().sample(key, forward(params, inputs))
    expected = jax.grad(lambda p: Categorical().loss(forward(p, inputs), labels))(params)
    chex.assert_trees_all_close(sampled_grads(), expected, rtol=1e-6)


def test_aux_is_returned_beside_the_loss():
    params, inputs = problem()

    def with_aux(params, inputs):
        outputs = forward(params, inputs)
        return outputs, {"mean": jnp.mean(outputs)}

    targets, key = jnp.zeros(5, int), jax.random.key(0)
    (loss, aux), grads, sampled = value_and_sampled_grad(with_aux, Categorical(), has_aux=True)(
        params, inputs, targets, key
    )
    plain = value_and_sampled_grad(forward, Categorical())(params, inputs, targets, key)
    chex.assert_trees_all_close((loss, grads, sampled()), (plain[0], plain[1], plain[2]()), rtol=1e-6)
    assert aux["mean"] == pytest.approx(float(jnp.mean(forward(params, inputs))), rel=1e-6)


@pytest.mark.parametrize("microbatches", [1, 5])
@pytest.mark.parametrize(
    "predictive",
    [Categorical(), Categorical(jnp.ones(5)), Poisson(), Normal(jnp.float32(0.5)), Normal(0.5)],
    ids=["Categorical", "weighted", "Poisson", "Normal", "Normal of a number"],
)
def test_the_function_crosses_a_jit_boundary_without_recompiling(predictive, microbatches):
    params, inputs = problem()
    targets = predictive.sample(jax.random.key(0), forward(params, inputs))
    value_and_grads = jax.jit(value_and_sampled_grad(forward, predictive, microbatches=microbatches))
    traces = []

    @jax.jit
    def call(sampled_grads):
        traces.append(1)
        return sampled_grads()

    for seed in range(3):
        _, _, sampled_grads = value_and_grads(params, inputs, targets, jax.random.key(seed))
        assert isinstance(sampled_grads, jax.tree_util.Partial)
        chex.assert_trees_all_close(call(sampled_grads), sampled_grads(), rtol=1e-5, atol=1e-7)
    assert len(traces) == 1


def test_a_mask_made_inside_the_step_crosses_a_jit_boundary():
    params, inputs = problem()
    targets = jnp.array([0, 1, 1, 0, 1])

    @jax.jit
    def step(mask, key):
        value_and_grads = value_and_sampled_grad(forward, Categorical(weights=mask), scale="fisher")
        return value_and_grads(params, inputs, targets, key)

    loss, grads, sampled = step(jnp.array([True, True, False, False, False]), jax.random.key(0))
    short = value_and_sampled_grad(forward, Categorical())(params, inputs[:2], targets[:2], jax.random.key(0))
    chex.assert_trees_all_close((loss, grads), short[:2], rtol=1e-5)
    # The masked batch has two examples, sampled as the first two of five.
    labels = Categorical().sample(jax.random.key(0), forward(params, inputs))[:2]
    expected = jax.grad(lambda p: math.sqrt(2) * Categorical().loss(forward(p, inputs[:2]), labels))(params)
    chex.assert_trees_all_close(sampled(), expected, rtol=1e-5)


@jax.custom_vjp
def marked(x):
    """The identity, with one `sin` in its forward pass and one `erf` in its backward pass."""
    return x + 0 * jnp.sin(x)


marked.defvjp(lambda x: (marked(x), None), lambda _, g: (g + 0 * jax.lax.erf(g),))


def marked_step(tx, record=lambda: None):
    def forward_with_marks(params, inputs):
        @jax.custom_vjp
        def recorded(x):
            return x

        def backward(_, g):
            jax.debug.callback(record)
            return (g,)

        recorded.defvjp(lambda x: (x, None), backward)
        return recorded(marked(forward(params, inputs)))

    value_and_grads = value_and_sampled_grad(forward_with_marks, Categorical())

    def step(params, opt_state, inputs, targets, key):
        _, grads, sampled_grads = value_and_grads(params, inputs, targets, key)
        return tx.update(grads, opt_state, params, sampled_grads=sampled_grads)[1]

    return step


@pytest.mark.parametrize("wrap", [lambda step: step, jax.jit], ids=["plain", "jit"])
def test_one_forward_pass_and_the_sampled_backward_pass_inside_the_conditional(wrap):
    params, inputs = problem()
    tx = tnt(0.1)
    arguments = (params, tx.init(params), inputs, jnp.zeros(5, int), jax.random.key(0))
    jaxpr = jax.make_jaxpr(wrap(marked_step(tx)))(*arguments)
    assert count(jaxpr, "sin", inside_cond=False) == 1
    assert count(jaxpr, "sin", inside_cond=True) == 0
    assert count(jaxpr, "erf", inside_cond=False) == 1
    assert count(jaxpr, "erf", inside_cond=True) == 1


def test_the_sampled_backward_pass_runs_only_every_statistics_period():
    params, inputs = problem()
    runs = []
    tx = tnt(0.1, statistics_period=3, inverse_period=2)
    step = jax.jit(marked_step(tx, record=lambda: runs.append(1)))
    opt_state = tx.init(params)
    per_step = []
    for t in range(7):
        runs.clear()
        opt_state = jax.block_until_ready(step(params, opt_state, inputs, jnp.zeros(5, int), jax.random.key(t)))
        jax.effects_barrier()
        per_step.append(len(runs))
    assert per_step == [2, 1, 1, 2, 1, 1, 2]


def test_first_order_optimizers_never_run_the_sampled_backward_pass():
    params, inputs = problem()
    tx = optax.with_extra_args_support(optax.sgd(0.1))
    jaxpr = jax.make_jaxpr(marked_step(tx))(params, tx.init(params), inputs, jnp.zeros(5, int), jax.random.key(0))
    assert count(jaxpr, "erf", inside_cond=False) == 1
    assert count(jaxpr, "erf", inside_cond=True) == 0


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((forward, Categorical()), {"scale": "sum"}, ValueError, "scale: expected 'mean' or 'fisher', got 'sum'"),
        ((forward, object()), {}, TypeError, "predictive: .*loss.*sample"),
        ((forward, Categorical), {}, TypeError, r"predictive: .*class.*Categorical\(\)"),
        (("forward", Categorical()), {}, TypeError, "forward: .*str"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        value_and_sampled_grad(*arguments, **options)


def test_targets_that_do_not_fit_raise_at_trace_time():
    params, inputs = problem()
    value_and_grads = jax.jit(tnt_optax.value_and_sampled_grad(forward, Categorical()))
    with pytest.raises(ValueError, match=r"targets: expected shape \(5,\).*got shape \(4,\)"):
        value_and_grads(params, inputs, jnp.zeros(4, int), jax.random.key(0))
