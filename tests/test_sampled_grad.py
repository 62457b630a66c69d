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
from helpers import FixedSamples, Poisson, count, marked

import tnt_optax
from tnt_optax import Bernoulli, Categorical, Joint, Normal, SampledGrad, tnt, value_and_sampled_grad

BATCH, FEATURES, OUTPUTS = 5, 3, 2


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


def exact_fisher(predictive, params, inputs, forward=forward):
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


def sample_moments(sampled_gradient):
    """Mean and covariance about zero of many draws, and their number."""

    @jax.jit
    def moments(key):
        g = jax.vmap(lambda k: jax.flatten_util.ravel_pytree(sampled_gradient(k))[0])(jax.random.split(key, 40_000))
        return jnp.mean(g, axis=0), g.T @ g / len(g)

    means, seconds = zip(*(moments(key) for key in jax.random.split(jax.random.key(0), 5)), strict=True)
    return np.mean(means, axis=0), np.mean(seconds, axis=0), 200_000


@pytest.mark.parametrize(
    ("predictive", "scale"),
    [
        *((p, "fisher") for p in (Categorical(), Bernoulli(), Normal(0.5))),
        (Categorical(), "mean"),
        *(pytest.param(p, "mean", marks=pytest.mark.slow) for p in (Bernoulli(), Normal(0.5), Poisson())),
        pytest.param(Poisson(), "fisher", marks=pytest.mark.slow),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_covariance_of_sampled_gradients_converges_to_the_exact_fisher_matrix(predictive, scale):
    params, inputs = problem()
    fisher = exact_fisher(predictive, params, inputs) / (BATCH if scale == "mean" else 1)
    value_and_grads = value_and_sampled_grad(forward, predictive, scale=scale)
    targets = predictive.sample(jax.random.key(1), forward(params, inputs))
    mean, covariance, draws = sample_moments(lambda key: value_and_grads(params, inputs, targets, key)[2]())
    size = np.linalg.norm(fisher)
    # 200,000 draws: the standard error of an element of the covariance is some 2/sqrt(200,000) = 0.5% of its scale.
    assert np.linalg.norm(covariance - fisher) < 0.015 * size
    # The first moment is zero (Section 2): five standard errors.
    assert np.linalg.norm(mean) < 5 * math.sqrt(np.trace(fisher) / draws)


def test_loss_and_gradient_are_those_of_the_targets():
    params, inputs = problem()
    targets = jnp.array([0, 1, 1, 0, 1])
    loss, grads, _ = value_and_sampled_grad(forward, Categorical())(params, inputs, targets, jax.random.key(0))
    expected = jax.value_and_grad(lambda p: Categorical().loss(forward(p, inputs), targets))(params)
    chex.assert_trees_all_close((loss, grads), expected, rtol=1e-6)


def test_sampled_gradient_is_the_gradient_of_the_sampled_targets():
    params, inputs = problem()
    key = jax.random.key(3)
    value_and_grads = value_and_sampled_grad(forward, Categorical(), scale="mean")
    _, _, sampled_grads = value_and_grads(params, inputs, jnp.zeros(5, int), key)
    labels = Categorical().sample(key, forward(params, inputs))
    expected = jax.grad(lambda p: Categorical().loss(forward(p, inputs), labels))(params)
    chex.assert_trees_all_close(sampled_grads(), expected, rtol=1e-6)


def test_the_attributes_are_what_was_returned():
    params, inputs = problem()
    loss, grads, sampled_grads = value_and_sampled_grad(forward, Categorical())(
        params, inputs, jnp.zeros(5, int), jax.random.key(0)
    )
    chex.assert_trees_all_equal((sampled_grads.loss, sampled_grads.grads), (loss, grads))


def smoothed(outputs, one_hot):
    """A loss that is not the likelihood, with targets of another form."""
    return jnp.mean(optax.softmax_cross_entropy(outputs, 0.9 * one_hot + 0.1 / OUTPUTS))


@pytest.mark.parametrize("microbatches", [1, 5])
def test_a_loss_of_its_own_changes_loss_and_gradient_only(microbatches):
    """The predictive distribution, which takes integers, never sees its targets."""
    params, inputs = problem()
    labels, key = jnp.array([0, 1, 1, 0, 1]), jax.random.key(3)
    value_and_grads = value_and_sampled_grad(forward, Categorical(), loss=smoothed, microbatches=microbatches)
    loss, grads, sampled_grads = value_and_grads(params, inputs, jax.nn.one_hot(labels, OUTPUTS), key)
    expected = jax.value_and_grad(lambda p: smoothed(forward(p, inputs), jax.nn.one_hot(labels, OUTPUTS)))(params)
    chex.assert_trees_all_close((loss, grads), expected, rtol=1e-5)  # float32, summed in another order
    plain = value_and_sampled_grad(forward, Categorical(), microbatches=microbatches)(params, inputs, labels, key)
    chex.assert_trees_all_equal(sampled_grads(), plain[2]())


def test_a_microbatch_without_weights_has_no_part_in_a_loss_of_its_own():
    """The mean over no examples is 0/0, in the loss and in its gradient."""
    params, inputs = problem()
    mask, labels, key = jnp.array([1.0, 0.0, 1.0, 0.0]), jnp.zeros(4, int), jax.random.key(0)

    def masked(outputs, targets):
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, targets["labels"])
        return jnp.sum(targets["mask"] * losses) / jnp.sum(targets["mask"])

    def run(microbatches):
        options = {"loss": masked, "microbatches": microbatches}
        value_and_grads = value_and_sampled_grad(forward, Categorical(weights=mask), **options)
        return value_and_grads(params, inputs[:4], {"labels": labels, "mask": mask}, key)[:2]

    chex.assert_trees_all_close(run(2), run(1), rtol=1e-5)  # Part 1 has the masked examples; float32.


@pytest.mark.parametrize("microbatches", [1, 5])
def test_a_regularizer_is_added_to_loss_and_gradient_once(microbatches):
    params, inputs = problem()
    targets, key = jnp.array([0, 1, 1, 0, 1]), jax.random.key(3)

    def penalty(params):
        return 0.5 * jnp.sum(jnp.square(params["w"])) + jnp.sum(params["b"])

    options = {"microbatches": microbatches}
    loss, grads, sampled = value_and_sampled_grad(forward, Categorical(), regularizer=penalty, **options)(
        params, inputs, targets, key
    )
    plain = value_and_sampled_grad(forward, Categorical(), **options)(params, inputs, targets, key)
    assert loss == pytest.approx(float(plain[0] + penalty(params)), rel=1e-6)
    np.testing.assert_allclose(grads["w"], plain[1]["w"] + params["w"], rtol=1e-6)
    np.testing.assert_allclose(grads["b"], plain[1]["b"] + 1, rtol=1e-6)
    chex.assert_trees_all_equal(sampled(), plain[2]())


# A model of two outputs, each with its own inputs: of five and of three examples.
SIZES = {"policy": 5, "value": 3}


def two_heads(params, inputs):
    hidden = {name: jnp.tanh(x @ params["w"]) for name, x in inputs.items()}
    return {"policy": hidden["policy"] + params["b"], "value": hidden["value"][:, :1]}


def joint_problem(sizes=SIZES):
    params, _ = problem()
    rng = np.random.default_rng(1)
    inputs = {name: jnp.asarray(rng.normal(size=(m, FEATURES)), jnp.float32) for name, m in sizes.items()}
    return params, inputs


def joint(policy=Categorical(), value=Normal(0.5)):  # noqa: B008
    return Joint({"policy": policy, "value": value})


def test_the_losses_of_a_joint_distribution_add():
    params, inputs = joint_problem()
    outputs = two_heads(params, inputs)
    targets = {"policy": jnp.array([0, 1, 1, 0, 1]), "value": jnp.ones((3, 1))}
    losses = (
        Categorical().loss(outputs["policy"], targets["policy"]),
        Normal(0.5).loss(outputs["value"], targets["value"]),
    )
    assert joint().loss(outputs, targets) == pytest.approx(float(sum(losses)), rel=1e-6)
    loss, grads, _ = value_and_sampled_grad(two_heads, joint())(params, inputs, targets, jax.random.key(0))
    expected = jax.value_and_grad(lambda p: joint().loss(two_heads(p, inputs), targets))(params)
    chex.assert_trees_all_close((loss, grads), expected, rtol=1e-6)
    drawn = joint().sample(jax.random.key(0), outputs)
    chex.assert_trees_all_equal_shapes_and_dtypes(drawn, targets | {"policy": targets["policy"].astype(jnp.int32)})
    nested = Joint({"both": joint()})
    assert nested.loss({"both": outputs}, {"both": targets}) == pytest.approx(float(sum(losses)), rel=1e-6)


@pytest.mark.parametrize("scale", ["mean", "fisher"])
def test_the_covariance_of_a_joint_distribution_is_the_sum_of_the_fisher_matrices(scale):
    """Each part has a batch size of its own: 5 and 3."""
    params, inputs = joint_problem()
    fisher = 0.0
    for name, predictive in joint().distributions.items():

        def head(params, x, name=name):
            return two_heads(params, dict.fromkeys(SIZES, x))[name]

        of_part = exact_fisher(predictive, params, inputs[name], head)
        fisher += of_part / (SIZES[name] if scale == "mean" else 1)
    value_and_grads = value_and_sampled_grad(two_heads, joint(), scale=scale)
    targets = joint().sample(jax.random.key(1), two_heads(params, inputs))
    mean, covariance, draws = sample_moments(lambda key: value_and_grads(params, inputs, targets, key)[2]())
    size = np.linalg.norm(fisher)
    # As for a single distribution, below.
    assert np.linalg.norm(covariance - fisher) < 0.015 * size
    assert np.linalg.norm(mean) < 5 * math.sqrt(np.trace(fisher) / draws)


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["mean", "fisher"])
def test_microbatches_of_a_joint_distribution_equal_one_batch(scale):
    """Parts of 8 and 4 examples, of which one has weights; in float64, because only the order of sums differs."""
    with jax.enable_x64(True):
        weights = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.5, 1.0])
        params, inputs = jax.tree.map(lambda x: x.astype(jnp.float64), joint_problem({"policy": 8, "value": 4}))
        predictive = joint(Weighted(weights), FixedSamples())
        targets = predictive.sample(jax.random.key(0), two_heads(params, inputs))

        def run(microbatches):
            options = {"scale": scale, "microbatches": microbatches, "regularizer": lambda p: jnp.sum(p["b"] ** 2)}
            arguments = (params, inputs, targets, jax.random.key(0))
            loss, grads, sampled = jax.jit(value_and_sampled_grad(two_heads, predictive, **options))(*arguments)
            return loss, grads, sampled()

        for parts in (2, 4):
            chex.assert_trees_all_close(run(parts), run(1), rtol=1e-12, atol=1e-14)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weighted(Categorical):
    """With samples that depend on the outputs alone."""

    def sample(self, key, outputs):
        return jnp.argmin(outputs, axis=-1).astype(jnp.int32)

    def split(self, number):
        parts, shares = super().split(number)
        return Weighted(parts.weights), shares


def test_a_joint_distribution_with_other_names():
    params, inputs = joint_problem()
    targets = joint().sample(jax.random.key(0), two_heads(params, inputs))
    value_and_grads = value_and_sampled_grad(two_heads, joint())
    for wrong in ({"policy": targets["policy"]}, {**targets, "more": 0}, targets["policy"]):
        with pytest.raises(ValueError, match=r"Joint: expected .* names \['policy', 'value'\], got"):
            value_and_grads(params, inputs, wrong, jax.random.key(0))
    value_and_grads = value_and_sampled_grad(lambda p, x: two_heads(p, x)["policy"], joint())
    with pytest.raises(ValueError, match=r"Joint: expected outputs and targets with the names .*got ArrayImpl|Tracer"):
        value_and_grads(params, inputs, targets, jax.random.key(0))


@pytest.mark.parametrize("microbatches", [1, 5])
def test_what_forward_closes_over_crosses_a_jit_boundary(microbatches):
    """A dropout key and an integer mask, which JAX's own closure conversion leaves in the closure."""
    params, inputs = problem()
    targets, traces = jnp.array([0, 1, 1, 0, 1]), []

    def step(params, key):
        dropout_key, mask_key, label_key = jax.random.split(key, 3)
        mask = jax.random.randint(mask_key, (FEATURES,), 0, 2)

        def dropped(params, inputs):
            kept = jax.random.bernoulli(dropout_key, 0.7, (FEATURES,))
            return forward(params, jnp.where(kept, inputs, 0) * mask.astype(inputs.dtype))

        options = {"microbatches": microbatches, "regularizer": lambda p: jnp.sum(p["b"] * mask[:OUTPUTS])}
        with jax.numpy_dtype_promotion("standard"):
            return value_and_sampled_grad(dropped, Categorical(), **options)(params, inputs, targets, label_key)[2]

    @jax.jit
    def call(sampled_grads):
        traces.append(1)
        return sampled_grads()

    jitted = jax.jit(step)
    for seed in range(3):
        sampled_grads = jitted(params, jax.random.key(seed))
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(sampled_grads))
        expected = jax.jit(lambda params, key: step(params, key)())(params, jax.random.key(seed))
        chex.assert_trees_all_close(call(sampled_grads), expected, rtol=1e-5, atol=1e-7)  # float32
    assert len(traces) == 1


def test_outputs_that_are_no_floats_name_has_aux():
    value_and_grads = value_and_sampled_grad(lambda p, x: (forward(p, x), jnp.int32(1)), Categorical())
    params, inputs = problem()
    with pytest.raises(TypeError, match=r"outputs: expected real floating-point arrays, got int32.*has_aux=True"):
        value_and_grads(params, inputs, jnp.zeros(5, int), jax.random.key(0))


@pytest.mark.parametrize(
    ("returned", "has_aux", "message"),
    [
        (None, False, "forward: expected it to return an array or a tree of arrays, got None"),
        (1.0, False, "outputs: expected real floating-point arrays, got float"),
        (
            jnp.ones((5, 3)),
            True,
            r"has_aux=True, got an array of shape \(5, 3\).*leave has_aux out",
        ),
    ],
)
def test_models_that_return_something_else(returned, has_aux, message):
    params, inputs = problem()
    value_and_grads = value_and_sampled_grad(lambda p, x: returned, Categorical(), has_aux=has_aux)
    with pytest.raises(TypeError, match=message):
        value_and_grads(params, inputs, jnp.zeros(5, int), jax.random.key(0))


@pytest.mark.parametrize("key", [0, None, jnp.zeros(2)])
def test_keys_that_are_not_random_keys(key):
    params, inputs = problem()
    with pytest.raises(TypeError, match=r"key: expected a random key, such as jax.random.key\(0\), got "):
        value_and_sampled_grad(forward, Categorical())(params, inputs, jnp.zeros(5, int), key)


def test_keys_of_both_types_are_taken():
    params, inputs = problem()
    value_and_grads = value_and_sampled_grad(forward, Categorical())
    new, old = (
        value_and_grads(params, inputs, jnp.zeros(5, int), key(0))[2]() for key in (jax.random.key, jax.random.PRNGKey)
    )
    chex.assert_trees_all_equal(new, old)


@pytest.mark.parametrize("value", [None, (jnp.float32(1), 2)])
def test_a_loss_that_returns_no_array(value):
    params, inputs = problem()
    value_and_grads = value_and_sampled_grad(forward, Categorical(), loss=lambda outputs, targets: value)
    with pytest.raises(TypeError, match=r"^loss: expected it to return a scalar, got (NoneType|tuple)"):
        value_and_grads(params, inputs, jnp.zeros(5, int), jax.random.key(0))


@pytest.mark.parametrize("which", ["loss", "regularizer", "predictive.loss"])
def test_losses_that_are_no_scalars(which):
    class PerExample(Poisson):
        def loss(self, outputs, targets):
            return jnp.sum(outputs, axis=-1)

    params, inputs = problem()
    targets, key = jnp.ones((BATCH, OUTPUTS)), jax.random.key(0)

    def run(function):
        if which == "predictive.loss":
            return value_and_sampled_grad(forward, PerExample())(params, inputs, targets, key)
        return value_and_sampled_grad(forward, Poisson(), **{which: function})(params, inputs, targets, key)

    with pytest.raises(ValueError, match=rf"^{which}: expected it to return a scalar, got an array of shape"):
        run(lambda *trees: jnp.ones(3))
    if which != "predictive.loss":
        with pytest.raises(TypeError, match=rf"^{which}: expected it to return a real floating-point number, got int"):
            run(lambda *trees: jnp.int32(1))


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
        assert isinstance(sampled_grads, SampledGrad)
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
        ((forward, Categorical()), {"loss": 3}, TypeError, "loss: expected a function, got int"),
        ((forward, Categorical()), {"regularizer": "l2"}, TypeError, "regularizer: expected a function, got str"),
        ((forward, Categorical()), {"axis_name": 3}, TypeError, "axis_name: expected None, the name of an axis"),
        ((forward, Joint({})), {}, TypeError, "predictive: expected Joint to have a mapping"),
        ((forward, Joint([Normal()])), {}, TypeError, "predictive: expected Joint to have a mapping"),
        ((forward, Joint({"a": Normal})), {}, TypeError, r"predictive\['a'\]: .*such as Normal\(\), got <class"),
        ((forward, Categorical), {}, TypeError, r"predictive: .*such as Categorical\(\), got <class"),
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
