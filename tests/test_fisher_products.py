"""The quadratic model of a `SampledGrad`: Fisher products against dense matrices in float64, losses, jit boundaries."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import FixedSamples, Poisson, count, marked
from jax.flatten_util import ravel_pytree

from tnt_optax import (
    Bernoulli,
    Categorical,
    DiagonalNormal,
    Joint,
    Normal,
    SampledGrad,
    adaptive_tnt,
    tnt,
    value_and_sampled_grad,
)

BATCH, TIME, FEATURES, HIDDEN, OUTPUTS = 4, 2, 3, 4, 3
WEIGHTS = np.float32([0.5, 2.0, 0.25, 1.0])
MASK = np.array([True, False, True, True])


def normals(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def make_params(seed=0):
    w, b, v, c = normals(seed, (FEATURES, HIDDEN), (HIDDEN,), (HIDDEN, OUTPUTS), (OUTPUTS,))
    return {"hidden": {"w": w, "b": b}, "out": {"w": v, "b": c}}


def make_directions(number, params=None, seed=1):
    params = make_params() if params is None else params
    leaves, structure = jax.tree.flatten(params)
    shapes = [leaf.shape for leaf in leaves]
    return [structure.unflatten(normals(seed + i, *shapes)) for i in range(number)]


def forward(params, inputs):
    hidden = jnp.tanh(inputs @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["out"]["w"] + params["out"]["b"]


def flat(params, inputs):
    """One number for each example, without an axis."""
    return forward(params, inputs)[:, 0]


def two_parameters(params, inputs):
    outputs = forward(params, inputs)
    return {"mean": outputs[:, :1], "log_variance": outputs[:, 1:2]}


def two_heads(params, inputs):
    return {name: forward(params, x) for name, x in inputs.items()}


# The truth, in float64: J by jax.jacobian, H enumerated in NumPy.


def float64(tree):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), tree)


def dense_jacobian(forward, params, inputs):
    """Of all outputs, one after the other, with respect to all parameters; and the outputs."""
    with jax.enable_x64(True):
        inputs = jax.tree.map(lambda x: float64(x) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x), inputs)
        flat, unravel = ravel_pytree(float64(params))

        def flat_and_outputs(v):
            outputs = forward(unravel(v), inputs)
            return ravel_pytree(outputs)[0], outputs

        return jax.tree.map(np.asarray, jax.jit(jax.jacrev(flat_and_outputs, has_aux=True))(flat))


def fisher_of_outputs(predictive, outputs):
    """The Fisher information of the mean loss, the expected outer product of scores, over all outputs."""
    if isinstance(predictive, Joint):
        return block_diagonal(fisher_of_outputs(predictive.distributions[name], outputs[name]) for name in outputs)
    if isinstance(predictive, DiagonalNormal):
        return fisher_of_normal_numbers(outputs)
    size = len(outputs)
    if isinstance(predictive, Categorical):
        p = np.exp(outputs).reshape(-1, outputs.shape[-1])
        p /= p.sum(axis=-1, keepdims=True)
        weights = np.ones(len(p)) if predictive.weights is None else np.asarray(predictive.weights, float).ravel()
        weights = weights / max(weights.sum(), 1e-300)
        classes = np.eye(p.shape[-1])
        return block_diagonal(
            w * sum(q[c] * np.outer(classes[c] - q, classes[c] - q) for c in range(len(q)))
            for w, q in zip(weights, p, strict=True)
        )
    if isinstance(predictive, Bernoulli):
        p = 1 / (1 + np.exp(-outputs))
        return np.diag((p * (1 - p)).ravel()) / size
    if isinstance(predictive, Normal):
        return np.diag(np.broadcast_to(1 / np.asarray(predictive.variance, float), outputs.shape).ravel()) / size
    assert isinstance(predictive, Poisson)
    return np.diag(np.exp(outputs).ravel()) / size


def fisher_of_normal_numbers(outputs):
    """By Gauss-Hermite quadrature, which is exact for polynomials of the target up to degree 9."""
    names, size = list(outputs), len(outputs["mean"])
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    deviation = np.exp(outputs["log_variance"] / 2).ravel()
    fisher = np.zeros((2, size, 2, size))
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        scores = {"mean": node / deviation, "log_variance": np.full(size, (node**2 - 1) / 2)}
        for i, one in enumerate(names):
            for j, other in enumerate(names):
                fisher[i, :, j, :] += weight * np.diag(scores[one] * scores[other]) / size
    return fisher.reshape(2 * size, 2 * size)


def block_diagonal(blocks):
    blocks = list(blocks)
    size, start = sum(len(block) for block in blocks), 0
    matrix = np.zeros((size, size))
    for block in blocks:
        stop = start + len(block)
        matrix[start:stop, start:stop] = block
        start = stop
    return matrix


def flattened(directions):
    return np.stack([np.concatenate([np.ravel(x).astype(float) for x in jax.tree.leaves(d)]) for d in directions])


def dense_products(forward, predictive, params, inputs, directions):
    """d_i^T J^T H J d_j."""
    jacobian, outputs = dense_jacobian(forward, params, inputs)
    tangents = jacobian @ flattened(directions).T
    return tangents.T @ fisher_of_outputs(predictive, outputs) @ tangents


# What is tested.


def sampled(forward, predictive, params, inputs, *, targets=None, key=3, **options):
    """The `SampledGrad` of some targets, which have no part in its Fisher products."""
    if targets is None:
        outputs = forward(params, inputs)
        outputs = outputs[0] if options.get("has_aux") else outputs
        targets = predictive.sample(jax.random.key(0), outputs)
    return value_and_sampled_grad(forward, predictive, **options)(params, inputs, targets, jax.random.key(key))[2]


def jitted_products(forward, predictive, params, inputs, directions, **options):
    run = jax.jit(lambda p, x, d: sampled(forward, predictive, p, x, **options).fisher_products(d))
    return run(params, inputs, directions)


def assert_products(ours, expected, tolerance=1e-5):
    """Relative to the largest element, because others are differences of such numbers: float32 has 6e-8, sums of 50."""
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def one_head(shape=(BATCH, FEATURES)):
    return forward, make_params(), normals(5, shape)[0]


def with_log_variance():
    return two_parameters, make_params(), normals(5, (BATCH, FEATURES))[0]


def with_two_heads(sizes=(4, 2)):
    first, second = normals(5, *((size, FEATURES) for size in sizes))
    return two_heads, make_params(), {"first": first, "second": second}


SEQUENCES = functools.partial(one_head, (BATCH, TIME, FEATURES))
SEQUENCE_WEIGHTS = np.stack([WEIGHTS, WEIGHTS[::-1] - 0.25], axis=1)
CASES = {
    "categorical": (Categorical, one_head),
    "weights": (lambda: Categorical(jnp.asarray(WEIGHTS)), one_head),
    "mask": (lambda: Categorical(jnp.asarray(MASK)), one_head),
    "no weights": (lambda: Categorical(jnp.zeros(BATCH)), one_head),
    "sequences": (Categorical, SEQUENCES),
    "weighted sequences": (lambda: Categorical(jnp.asarray(SEQUENCE_WEIGHTS)), SEQUENCES),
    "bernoulli": (Bernoulli, one_head),
    "normal": (lambda: Normal(0.5), lambda: (flat, *one_head()[1:])),
    "variances": (lambda: Normal(jnp.array([0.5, 1.0, 3.0])), SEQUENCES),
    "own": (Poisson, one_head),
    "diagonal normal": (DiagonalNormal, with_log_variance),
    "joint": (lambda: Joint({"first": Categorical(), "second": Normal(0.5)}), with_two_heads),
    "weighted joint": (
        lambda: Joint({"first": Categorical(jnp.asarray(WEIGHTS)), "second": Poisson()}),
        with_two_heads,
    ),
}
LITTLE_NEW = {"bernoulli", "normal", "mask", "sequences", "joint"}


@functools.cache
def dense_truth(name, number=2):
    predictive, (model, params, inputs) = CASES[name][0](), CASES[name][1]()
    return dense_products(model, predictive, params, inputs, make_directions(number))


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_dense_matrix(name):
    predictive, (model, params, inputs) = CASES[name][0](), CASES[name][1]()
    ours = jitted_products(model, predictive, params, inputs, make_directions(2))
    assert_products(ours, dense_truth(name))
    assert ours.dtype == jnp.float32
    assert bool(jnp.any(ours)) == (name != "no weights")


class AtSamples(DiagonalNormal):
    fisher_product = property()  # So that `hasattr` says no.


@pytest.mark.parametrize("joint", [False, True])
def test_without_a_method_it_is_the_hessian_at_the_sampled_targets(joint):
    """Not the Fisher matrix here, so that the case "diagonal normal" tests the method."""
    model, params, inputs = with_log_variance()
    directions, key, predictive = make_directions(2), jax.random.key(3), AtSamples()
    jacobian, outputs = dense_jacobian(model, params, inputs)
    if joint:
        model, predictive = lambda p, x: {"only": two_parameters(p, x)}, Joint({"only": predictive})
    ours = jitted_products(model, predictive, params, inputs, directions)
    # The targets of `sampled_grads()`, and the second derivatives of DiagonalNormal.loss, with r = mean - target.
    targets = predictive.sample(key, jax.jit(model)(params, inputs))
    r = (outputs["mean"] - np.asarray(targets["only"] if joint else targets, float)).ravel()
    precision = np.exp(-outputs["log_variance"]).ravel()
    # The outputs in the order of their names: log-variance, mean.
    blocks = [[r**2 * precision / 2, -r * precision], [-r * precision, precision]]
    hessian = np.block([[np.diag(block) for block in row] for row in blocks]) / BATCH
    tangents = jacobian @ flattened(directions).T
    assert_products(ours, tangents.T @ hessian @ tangents)
    assert np.abs(ours - dense_truth("diagonal normal")).max() > 0.1 * np.abs(ours).max()


@pytest.mark.slow
def test_a_distribution_gets_outputs_and_tangents_in_float32():
    dtypes = []

    class Recording(Poisson):
        def fisher_product(self, outputs, tangents):
            dtypes.append((outputs.dtype, tangents.dtype))
            return tangents

    model, params, inputs = one_head()
    narrow, narrow_inputs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, inputs))
    targets = jnp.ones((BATCH, OUTPUTS), jnp.bfloat16)
    for predictive, run, y in (
        (Recording(), model, targets),
        (Joint({"only": Recording()}), lambda p, x: {"only": model(p, x)}, {"only": targets}),
    ):
        sampled(run, predictive, narrow, narrow_inputs, targets=y).fisher_products([params])
    assert dtypes == [(jnp.float32, jnp.float32)] * 2


def test_a_model_without_parameters():
    sampled_grads = sampled(lambda params, inputs: inputs, Categorical(), {}, one_head()[2])
    np.testing.assert_array_equal(sampled_grads.fisher_products([{}, None]), np.zeros((2, 2)))
    np.testing.assert_array_equal(sampled_grads.regularizer_products([{}]), np.zeros((1, 1)))
    np.testing.assert_allclose(sampled_grads.loss_at({}), sampled_grads.loss, rtol=1e-6)  # The same sums.


@pytest.mark.parametrize("number", [1, 3])
def test_any_number_of_directions(number):
    model, params, inputs = one_head()
    ours = jitted_products(model, Categorical(), params, inputs, make_directions(number))
    assert_products(ours, dense_truth("categorical", number))


def test_products_of_one_direction_twice_and_of_zero():
    model, params, inputs = one_head()
    (direction,) = make_directions(1)
    zero = jax.tree.map(jnp.zeros_like, params)
    ours = jitted_products(model, Categorical(), params, inputs, (direction, direction, zero))
    expected = dense_truth("categorical", 1)[0, 0] * np.array([[1, 1, 0], [1, 1, 0], [0, 0, 0]])
    assert_products(ours, expected)


def test_padded_examples_have_no_part_even_if_they_are_not_finite():
    model, params, inputs = one_head()
    broken = jnp.where(MASK[:, None], inputs, jnp.nan)
    ours = jitted_products(model, Categorical(jnp.asarray(MASK)), params, broken, make_directions(2))
    assert_products(ours, dense_truth("mask"))


@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loss_of_its_own_has_no_part(microbatches):
    def absolute(outputs, targets):
        return jnp.mean(jnp.abs(outputs - targets["y"]))

    model, params, inputs = one_head()
    options = {"loss": absolute, "targets": {"y": jnp.ones((BATCH, 1))}, "microbatches": microbatches}
    ours = jitted_products(model, Categorical(), params, inputs, make_directions(2), **options)
    assert_products(ours, dense_truth("categorical"))


def penalty(params):
    """Not a sum over arrays, so that its Hessian has no blocks."""
    return jnp.square(jnp.sum(params["hidden"]["w"] ** 2) + jnp.sum(jnp.sin(params["out"]["b"])))


def dense_penalty(params, directions):
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(float64(params))
        hessian = np.asarray(jax.jit(jax.hessian(lambda v: penalty(unravel(v))))(flat))
    d = flattened(directions)
    return d @ hessian @ d.T


@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_regularizer_has_products_of_its_own(microbatches):
    model, params, inputs = one_head()
    directions = make_directions(2)

    @jax.jit
    def run(params, inputs, directions):
        options = {"regularizer": penalty, "microbatches": microbatches}
        sampled_grads = sampled(model, Categorical(), params, inputs, **options)
        return sampled_grads.fisher_products(directions), sampled_grads.regularizer_products(directions)

    fisher, hessian = run(params, inputs, directions)
    assert_products(fisher, dense_truth("categorical"))
    assert_products(hessian, dense_penalty(params, directions))
    assert hessian.dtype == jnp.float32


def test_products_without_a_regularizer_are_zeros():
    model, params, inputs = one_head()
    sampled_grads = sampled(model, Categorical(), params, inputs)
    for one in (sampled_grads, jax.jit(lambda s: s)(sampled_grads)):
        ours = one.regularizer_products(make_directions(3))
        np.testing.assert_array_equal(ours, np.zeros((3, 3)))
        assert ours.dtype == jnp.float32


def without(tree, *paths):
    """Zeros in place of some arrays."""
    kept = lambda path: not jax.tree_util.keystr(path).startswith(paths)  # noqa: E731
    return jax.tree_util.tree_map_with_path(lambda path, x: x if kept(path) else jnp.zeros_like(x), tree)


@pytest.mark.parametrize("left_out", [None, optax.MaskedNode()], ids=["None", "MaskedNode"])
@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_left_out_counts_as_zeros(left_out, microbatches):
    model, params, inputs = one_head()
    one, other, third = make_directions(3)
    partial = [
        {"hidden": {"w": left_out, "b": one["hidden"]["b"]}, "out": one["out"]},
        {"hidden": left_out, "out": {"w": other["out"]["w"], "b": left_out}},
        third,
        left_out,
    ]
    same = [
        without(one, "['hidden']['w']"),
        without(other, "['hidden']", "['out']['b']"),
        third,
        jax.tree.map(jnp.zeros_like, params),
    ]

    @jax.jit
    def run(params, inputs, directions):
        options = {"regularizer": penalty, "microbatches": microbatches}
        sampled_grads = sampled(model, Categorical(), params, inputs, **options)
        return sampled_grads.fisher_products(directions), sampled_grads.regularizer_products(directions)

    ours, hessian = run(params, inputs, partial)
    assert_products(ours, dense_products(model, Categorical(), params, inputs, same))
    assert not np.any(ours[3])
    assert_products(hessian, dense_penalty(params, same))


@pytest.mark.parametrize("left_out", [None, optax.MaskedNode()], ids=["None", "MaskedNode"])
def test_params_may_have_holes_themselves(left_out):
    """What `optax.partition` or a filtered module leaves of the parameters."""
    model, params, inputs = one_head()

    def with_hole(params, inputs):
        return model({**params, "out": {**params["out"], "b": jnp.zeros(OUTPUTS)}}, inputs)

    holed = {**params, "out": {**params["out"], "b": left_out}}
    zero = {**params, "out": {**params["out"], "b": jnp.zeros(OUTPUTS)}}
    (direction,) = make_directions(1)
    expected = dense_products(model, Categorical(), zero, inputs, [without(direction, "['out']['b']")])
    directions = [{**direction, "out": {**direction["out"], "b": left_out}}]

    def create(params):
        return sampled(with_hole, Categorical(), params, inputs)

    def use(sampled_grads):
        assert jax.tree.structure(sampled_grads.params) == jax.tree.structure(holed)
        return sampled_grads.fisher_products(directions), sampled_grads.loss_at(holed), sampled_grads.loss

    for products, *losses in (jax.jit(lambda p: use(create(p)))(holed), jax.jit(use)(jax.jit(create)(holed))):
        assert_products(products, expected)
        np.testing.assert_allclose(*losses, rtol=1e-6)  # The same sums.


@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bfloat16_parameters_with_float32_directions(microbatches):
    model, params, inputs = one_head()
    narrow, narrow_inputs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, inputs))
    directions = make_directions(2)
    options = {"microbatches": microbatches}
    ours = jitted_products(model, Categorical(), narrow, narrow_inputs, directions, **options)
    assert ours.dtype == jnp.float32
    wide, wide_inputs = jax.tree.map(lambda x: x.astype(jnp.float32), (narrow, narrow_inputs))
    expected = jitted_products(model, Categorical(), wide, wide_inputs, directions, **options)
    # bfloat16 rounds to 2^-9 = 0.2%: the directions, and each of some ten operations, which a matrix has twice.
    assert_products(ours, expected, tolerance=0.03)
    assert np.abs(ours - expected).max() > 0


@pytest.mark.parametrize("name", ["categorical", "own", pytest.param("weighted joint", marks=pytest.mark.slow)])
@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_float64(name, microbatches):
    predictive, (model, params, inputs) = CASES[name][0](), CASES[name][1]()
    with jax.enable_x64(True):
        params, inputs, directions = float64((params, inputs, make_directions(2)))
        ours = jitted_products(model, predictive, params, inputs, directions, microbatches=microbatches)
        assert ours.dtype == jnp.float64
        assert_products(ours, dense_truth(name), tolerance=1e-13)  # 2e-16 with sums of 50


@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_float32_where_float64_is_allowed(microbatches):
    model, params, inputs = one_head()
    with jax.enable_x64(True):
        directions = make_directions(2)
        assert directions[0]["out"]["b"].dtype == jnp.float32
        targets = jnp.zeros(BATCH, int)
        options = {"targets": targets, "microbatches": microbatches, "regularizer": penalty}
        sampled_grads = jax.jit(lambda p, x: sampled(model, Categorical(), p, x, **options))(params, inputs)
        fisher, hessian, loss = jax.jit(
            lambda s, d: (s.fisher_products(d), s.regularizer_products(d), s.loss_at(s.params))
        )(sampled_grads, directions)
        assert_products(fisher, dense_truth("categorical"))
        assert_products(hessian, dense_penalty(params, directions))
        np.testing.assert_allclose(loss, sampled_grads.loss, rtol=1e-6)  # float32
        assert loss.dtype == sampled_grads.loss.dtype  # The optimizer subtracts them.


@pytest.mark.parametrize("make", [adaptive_tnt, lambda: tnt(0.1)], ids=["adaptive_tnt", "tnt"])
def test_an_optimizer_with_float32_where_float64_is_allowed(make):
    """Under strict promotion, as all tests here."""
    model, params, inputs = one_head()
    tx = make()
    with jax.enable_x64(True):

        def step(params, inputs):
            value_and_grads = value_and_sampled_grad(model, Categorical())
            _, grads, sampled_grads = value_and_grads(params, inputs, jnp.zeros(BATCH, int), jax.random.key(0))
            return tx.update(grads, tx.init(params), params, sampled_grads=sampled_grads)[0]

        chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(step, params, inputs), params)


@pytest.mark.parametrize("microbatches", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LITTLE_NEW else name for name in CASES]
)
def test_microbatches_equal_the_whole_batch(name, microbatches):
    predictive, (model, params, inputs) = CASES[name][0](), CASES[name][1]()
    if "joint" in name and microbatches == 4:
        _, params, inputs = with_two_heads((4, 8))
        expected = dense_products(model, predictive, params, inputs, make_directions(2))
    else:
        expected = dense_truth(name)
    ours = jitted_products(model, predictive, params, inputs, make_directions(2), microbatches=microbatches)
    assert_products(ours, expected)


def test_four_microbatches():
    """Of which one has no weights and one is padded; the slow tests have four of all distributions."""
    model, params, inputs = one_head((8, FEATURES))
    predictive = Categorical(jnp.array([1.0, 2, 0, 0.5, 1, 1, 0, 0]))
    ours = jitted_products(model, predictive, params, inputs, make_directions(2), microbatches=4)
    assert_products(ours, dense_products(model, predictive, params, inputs, make_directions(2)))


@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_scale_of_sampled_gradients_has_no_part(microbatches):
    predictive, (model, params, inputs) = CASES["weighted joint"][0](), with_two_heads()

    @jax.jit
    def both(params, inputs, directions):
        options = [{"scale": scale, "microbatches": microbatches} for scale in ("mean", "fisher")]
        return [sampled(model, predictive, params, inputs, **one).fisher_products(directions) for one in options]

    mean, fisher = both(params, inputs, make_directions(2))
    np.testing.assert_allclose(mean, fisher, rtol=1e-6)  # The same program twice.
    assert_products(mean, dense_truth("weighted joint"))


@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("crossing", [False, True])
def test_vmap_over_parameters(crossing, microbatches):
    model, _, inputs = one_head()
    sets = [make_params(seed) for seed in (0, 7)]
    stacked, directions = jax.tree.map(lambda *x: jnp.stack(x), *sets), make_directions(2)
    options = {"targets": jnp.zeros(BATCH, int), "regularizer": penalty, "microbatches": microbatches}

    def create(params):
        return sampled(model, Categorical(), params, inputs, **options)

    def use(sampled_grads):
        return sampled_grads.fisher_products(directions), sampled_grads.loss_at(make_params(8))

    if crossing:
        products, losses = jax.jit(jax.vmap(use))(jax.jit(jax.vmap(create))(stacked))
    else:
        products, losses = jax.jit(jax.vmap(lambda params: use(create(params))))(stacked)
    for ours, params in zip(products, sets, strict=True):
        assert_products(ours, dense_products(model, Categorical(), params, inputs, directions))
    expected = jax.jit(create)(make_params(8)).loss
    np.testing.assert_allclose(losses, [expected, expected], rtol=1e-6)  # The same sums.


# Across a jit boundary.


def closing_step(microbatches):
    """A step whose forward, loss and regularizer close over traced arrays."""
    _, _, inputs = one_head()

    def step(params, key, strength):
        mask_key, dropout_key, label_key = jax.random.split(key, 3)
        mask = jax.random.randint(mask_key, (FEATURES,), 1, 3)
        smoothing = 0.1 * strength

        def dropped(params, inputs):
            kept = jax.random.bernoulli(dropout_key, 0.7, (FEATURES,))
            return forward(params, jnp.where(kept, inputs, 0) * mask.astype(inputs.dtype))

        def smoothed(outputs, targets):
            one_hot = jax.nn.one_hot(targets, OUTPUTS, dtype=outputs.dtype)
            return jnp.mean(optax.softmax_cross_entropy(outputs, (1 - smoothing) * one_hot + smoothing / OUTPUTS))

        options = {"loss": smoothed, "regularizer": lambda p: strength * penalty(p), "microbatches": microbatches}
        value_and_grads = value_and_sampled_grad(dropped, Categorical(), **options)
        return value_and_grads(params, inputs, jnp.array([0, 2, 1, 0]), label_key)[2]

    return step


def numbers_of(sampled_grads, directions, others):
    return {
        "fisher": sampled_grads.fisher_products(directions),
        "regularizer": sampled_grads.regularizer_products(directions),
        "loss": sampled_grads.loss_at(others),
        "sampled": sampled_grads(),
    }


@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_numbers_across_a_jit_boundary(microbatches):
    params, others, directions = make_params(), make_params(9), make_directions(2)
    step, traces = closing_step(microbatches), []

    @jax.jit
    def use(sampled_grads):
        traces.append(1)
        return numbers_of(sampled_grads, directions, others)

    jitted, inside = jax.jit(step), jax.jit(lambda *args: numbers_of(step(*args), directions, others))
    for seed in range(2):
        arguments = (params, jax.random.key(seed), jnp.float32(0.5 + seed))
        sampled_grads = jitted(*arguments)
        assert isinstance(sampled_grads, SampledGrad)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(sampled_grads))
        expected = inside(*arguments)
        chex.assert_trees_all_close(use(sampled_grads), expected, rtol=1e-5, atol=1e-6)  # float32, compiled twice
        chex.assert_trees_all_equal(sampled_grads.params, params)
        at_other = jitted(others, *arguments[1:]).loss
        np.testing.assert_allclose(expected["loss"], at_other, rtol=1e-6)  # The same sums.
    assert len(traces) == 1
    again = jax.jit(lambda s: s)(jax.jit(lambda s: s)(sampled_grads))
    chex.assert_trees_all_close(use(again), expected, rtol=1e-5, atol=1e-6)
    assert len(traces) == 1


@pytest.mark.slow
def test_the_numbers_without_jit():
    params, others, directions = make_params(), make_params(9), make_directions(2)
    step, arguments = closing_step(1), (params, jax.random.key(0), jnp.float32(0.5))
    expected = jax.jit(lambda *args: numbers_of(step(*args), directions, others))(*arguments)
    sampled_grads = step(*arguments)
    for ours in (
        numbers_of(sampled_grads, directions, others),
        numbers_of(jax.jit(step)(*arguments), directions, others),
        jax.jit(lambda s: numbers_of(s, directions, others))(sampled_grads),
    ):
        chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)  # float32, compiled in other pieces


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weights", "variances", "diagonal normal", "weighted joint"])
@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_products_of_every_distribution_across_a_jit_boundary(name, microbatches):
    predictive, (model, params, inputs) = CASES[name][0](), CASES[name][1]()
    create = jax.jit(lambda p, x: sampled(model, predictive, p, x, microbatches=microbatches))
    use = jax.jit(lambda sampled_grads, directions: sampled_grads.fisher_products(directions))
    assert_products(use(create(params, inputs), make_directions(2)), dense_truth(name))


def test_inside_a_conditional_and_a_loop():
    """As an optimizer may use them."""
    model, params, inputs = one_head()

    @jax.jit
    def run(params, directions):
        sampled_grads = sampled(model, Categorical(), params, inputs)

        def body(_, due):
            zeros = jnp.zeros((2, 2)), sampled_grads.loss
            return None, jax.lax.cond(
                due, lambda: (sampled_grads.fisher_products(directions), sampled_grads.loss_at(params)), lambda: zeros
            )

        return jax.lax.scan(body, None, jnp.array([True, False]))[1], sampled_grads.loss

    (products, losses), loss = run(params, make_directions(2))
    assert_products(products[0], dense_truth("categorical"))
    assert not np.any(products[1])
    np.testing.assert_allclose(losses, [loss, loss], rtol=1e-6)  # The same sums.


def repeated(tree):
    leaves = jax.tree.leaves(tree)
    return [leaf.shape for i, leaf in enumerate(leaves) if any(leaf is other for other in leaves[:i])]


@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["closures", "SampledGrad"])
@pytest.mark.parametrize("jitted", [False, True])
def test_every_array_is_in_the_leaves_once(what, microbatches, jitted):
    """An array that is there twice crosses the boundary, and is kept in memory, twice."""
    seen = []

    def step(*args):
        sampled_grads = closing_step(microbatches)(*args)
        seen.append(repeated(sampled_grads._closures if what == "closures" else sampled_grads))
        return sampled_grads

    arguments = (make_params(), jax.random.key(0), jnp.float32(0.5))
    if jitted:
        jax.make_jaxpr(step)(*arguments)
    else:
        step(*arguments)
    assert seen == [[]]


# One forward pass.


@jax.custom_vjp
def marked_forward(x):
    """2 x, with one `sin` in its forward pass, and a backward pass that can be transposed; `jax.jvp` raises."""
    return 2 * x + 0 * jnp.sin(x)


marked_forward.defvjp(lambda x: (marked_forward(x), jnp.full_like(x, 2)), lambda two, g: (two * g,))


def marked_model(params, inputs):
    return marked_forward(forward(params, inputs))


def sines(function, *args):
    return count(jax.make_jaxpr(function)(*args), "sin", inside_cond=False)


def test_products_run_no_second_forward_pass():
    _, params, inputs = one_head()
    directions, targets = make_directions(2), jnp.zeros(BATCH, int)

    def create(params):
        return sampled(marked_model, Categorical(), params, inputs, targets=targets)

    assert sines(lambda p: create(p).grads, params) == 1
    assert sines(lambda p: create(p).fisher_products(directions), params) == 1
    assert sines(lambda p: create(p).loss_at(p), params) == 2
    # Nor behind a boundary, where nothing but `loss_at` needs one.
    for crossing in (create(params), jax.jit(create)(params)):
        crossed = jax.jit(lambda s: s)(crossing)
        assert sines(lambda s: (s.fisher_products(directions), s.regularizer_products(directions), s()), crossed) == 0
        assert sines(lambda s: s.loss_at(params), crossed) == 1
    # Returning the object costs nothing.
    assert sines(create, params) == 1
    assert sines(jax.jit(create), params) == 1


def test_microbatches_run_it_once_more():
    """In the loop over them, whatever the number of directions."""
    _, params, inputs = one_head()

    def create(params):
        targets = jnp.zeros(BATCH, int)
        return sampled(marked_model, Categorical(), params, inputs, targets=targets, microbatches=2)

    for number in (1, 3):
        directions = make_directions(number)
        assert sines(lambda p, directions=directions: create(p).fisher_products(directions), params) == 2


@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_products_where_jvp_raises(microbatches):
    _, params, inputs = one_head()
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda p: marked_model(p, inputs), (params,), (params,))
    ours = jitted_products(marked_model, Categorical(), params, inputs, make_directions(2), microbatches=microbatches)
    # The factor 2 is also in the probabilities.
    assert_products(ours, dense_products(marked_model, Categorical(), params, inputs, make_directions(2)))


# Layers whose pullback is not a chain of products.


def layers(number=3):
    return {"layers": normals(11, (number, HIDDEN, HIDDEN))[0] / 2, **make_params()}


def batch_norm(params, inputs):
    """In training mode, with the new averages as aux."""
    hidden = inputs @ params["hidden"]["w"]
    mean = jnp.mean(hidden, axis=0)
    variance = jnp.mean(jnp.square(hidden - mean), axis=0)
    normalized = (hidden - mean) * jax.lax.rsqrt(variance + 1e-3)
    hidden = jax.nn.relu(normalized * (1 + params["hidden"]["b"]))
    return hidden @ params["out"]["w"] + params["out"]["b"], {"mean": mean}


def deep(layer, wrap=lambda f: f):
    """A loop over stacked layers, with a counter in its carry."""

    def model(params, inputs):
        def body(carry, w):
            x, i = carry
            return (layer(w, x), i + 1), jnp.mean(x, axis=1)

        hidden = jnp.tanh(inputs @ params["hidden"]["w"] + params["hidden"]["b"])
        (hidden, number), means = jax.lax.scan(wrap(body), (hidden, jnp.int32(0)), params["layers"])
        hidden = hidden + (jnp.mean(means, axis=0) * number.astype(hidden.dtype))[:, None]
        return hidden @ params["out"]["w"] + params["out"]["b"]

    return model


def residual(w, x):
    return x + jnp.tanh(x @ w)


def rematerialized(params, inputs):
    layer = jax.checkpoint(residual)
    hidden = jnp.tanh(inputs @ params["hidden"]["w"] + params["hidden"]["b"])
    for i in range(len(params["layers"])):
        hidden = layer(params["layers"][i], hidden)
    return hidden @ params["out"]["w"] + params["out"]["b"]


def counted_loop(params, inputs):
    """`fori_loop`, which is a scan over nothing, with the layers in its closure."""
    hidden = jnp.tanh(inputs @ params["hidden"]["w"] + params["hidden"]["b"])
    hidden = jax.lax.fori_loop(0, 3, lambda i, x: residual(params["layers"][i], x), hidden)
    return hidden @ params["out"]["w"] + params["out"]["b"]


def branches(params, inputs):
    """A layer that is chosen by a number, for all examples and for each."""
    hidden = jnp.tanh(inputs @ params["hidden"]["w"] + params["hidden"]["b"])
    chosen = (hidden[0, 0] > 0).astype(jnp.int32)
    kinds = [lambda x: residual(params["layers"][0], x), lambda x: jnp.sin(x @ params["layers"][1])]
    hidden = jax.lax.switch(chosen, kinds, hidden)
    hidden = jnp.where(hidden > 0, hidden, jax.lax.cond(chosen == 0, jnp.cos, lambda x: x * x, hidden))
    return hidden @ params["out"]["w"] + params["out"]["b"]


def embedding(params, inputs):
    """Rows of a matrix, sorted features, a cumulative sum and a concatenation."""
    rows = params["layers"][0][jnp.array([0, 2, 2, 1])]
    hidden = jnp.sort(inputs @ params["hidden"]["w"], axis=-1) + jnp.cumsum(rows, axis=1)
    hidden = jnp.concatenate([jnp.tanh(hidden[:, :2]), jax.nn.softmax(hidden[:, 2:])], axis=1)
    return hidden @ params["out"]["w"] + params["out"]["b"]


def attention(params, inputs):
    """Causal, over the examples."""
    x = inputs @ params["hidden"]["w"]
    q, k, v = (x @ params["layers"][i] for i in range(3))
    scores = jnp.where(np.tril(np.ones((BATCH, BATCH), bool)), q @ k.T, -1e30)
    hidden = jax.nn.softmax(scores) @ v
    return jax.nn.gelu(hidden) @ params["out"]["w"] + params["out"]["b"]


def convolution(x, w):
    return jax.lax.conv_general_dilated(x[..., None], w[:, None], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


@jax.custom_vjp
def own_convolution(x, w):
    return convolution(x, w)


def own_convolution_backward(residuals, g):
    """By shifted sums, linear in g."""
    x, w = residuals
    padded, padded_g = jnp.pad(x, ((0, 0), (1, 1))), jnp.pad(g, ((0, 0), (1, 1), (0, 0)))
    length = x.shape[1]
    dw = jnp.stack([jnp.sum(padded[:, i : i + length, None] * g, axis=(0, 1)) for i in range(3)])
    dx = sum(padded_g[:, 2 - i : 2 - i + length] @ w[i] for i in range(3))
    return dx, dw


own_convolution.defvjp(lambda x, w: (convolution(x, w), (x, w)), own_convolution_backward)


def convolutional(convolve, params, inputs):
    """With a max-pooling behind it."""
    hidden = jax.nn.relu(convolve(jnp.tanh(inputs @ params["hidden"]["w"]), params["layers"][0, :3]))
    pooled = jax.lax.reduce_window(hidden, -np.inf, jax.lax.max, (1, 2, 1), (1, 2, 1), "VALID")
    return jnp.mean(pooled, axis=1) @ params["out"]["w"] + params["out"]["b"]


ARCHITECTURES = {
    "batch norm": batch_norm,
    "scan": deep(residual),
    "checkpoint": rematerialized,
    "checkpoint in scan": deep(jax.checkpoint(residual)),
    "checkpoint of the body": deep(residual, jax.checkpoint),
    "unprevented cse": deep(residual, functools.partial(jax.checkpoint, prevent_cse=False)),
    "policy": deep(residual, functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)),
    "scan in checkpoint": lambda params, inputs: jax.checkpoint(deep(residual))(params, inputs),
    "loop": counted_loop,
    "branches": branches,
    "embedding": embedding,
    "attention": attention,
    "convolution": functools.partial(convolutional, convolution),
    "own convolution": functools.partial(convolutional, own_convolution),
    "own convolution in checkpoint": lambda p, x: jax.checkpoint(functools.partial(convolutional, own_convolution))(
        p, x
    ),
}
RARE = {"unprevented cse", "policy", "scan in checkpoint", "own convolution in checkpoint", "attention"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in RARE else name for name in ARCHITECTURES]
)
def test_models(name):
    model, params, (inputs,) = ARCHITECTURES[name], layers(), normals(12, (BATCH, FEATURES))
    directions, has_aux = make_directions(2, params), name == "batch norm"
    options = {"has_aux": has_aux, "targets": jnp.array([0, 2, 1, 0])}

    @jax.jit
    def run(params, inputs, directions):
        sampled_grads = sampled(model, Categorical(), params, inputs, **options)
        return sampled_grads, sampled_grads.fisher_products(directions)

    sampled_grads, ours = run(params, inputs, directions)
    outputs = (lambda p, x: model(p, x)[0]) if has_aux else model
    expected = dense_products(outputs, Categorical(), params, inputs, directions)
    assert_products(ours, expected)
    assert_products(jax.jit(lambda s: s.fisher_products(directions))(sampled_grads), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scan", "checkpoint of the body", "own convolution"])
@pytest.mark.parametrize("predictive", [Categorical(), Poisson()], ids=["Categorical", "Poisson"])
@pytest.mark.slow
def test_models_in_microbatches(name, predictive):
    model, params, (inputs,) = ARCHITECTURES[name], layers(), normals(12, (BATCH, FEATURES))
    directions = make_directions(3, params)
    ours = jitted_products(model, predictive, params, inputs, directions, microbatches=2)
    assert_products(ours, dense_products(model, predictive, params, inputs, directions))


@pytest.mark.slow
def test_microbatches_of_a_batch_norm_have_statistics_of_their_own():
    """The matrix is the mean of the parts' matrices, of examples 0, 2 and of 1, 3."""
    params, (inputs,), directions = make_params(), normals(12, (BATCH, FEATURES)), make_directions(2)
    options = {"has_aux": True, "targets": jnp.array([0, 2, 1, 0]), "microbatches": 2}
    ours = jitted_products(batch_norm, Categorical(), params, inputs, directions, **options)
    parts = [
        dense_products(lambda p, x: batch_norm(p, x)[0], Categorical(), params, inputs[i::2], directions)
        for i in range(2)
    ]
    assert_products(ours, np.mean(parts, axis=0))


# A backward pass that cannot be transposed.

ADVICE = (
    r"fisher_products: expected a `forward` whose backward pass can be transposed.*custom_vjp.*linear JAX operations"
)


def untransposable(params, inputs):
    return marked(forward(params, inputs))


@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_model_that_cannot_be_transposed(microbatches):
    _, params, inputs = one_head()
    directions, targets, key = make_directions(2), jnp.zeros(BATCH, int), jax.random.key(3)
    value_and_grads = value_and_sampled_grad(untransposable, Categorical(), microbatches=microbatches)

    def create(params):
        return value_and_grads(params, inputs, targets, key)[2]

    def products(sampled_grads):
        return sampled_grads.fisher_products(directions)

    crossed = jax.jit(create)(params)
    for call in (
        lambda: jax.jit(lambda p: products(create(p)))(params),
        lambda: products(crossed),
        lambda: jax.jit(products)(crossed),
        lambda: jax.jit(products)(jax.jit(lambda s: s)(crossed)),
    ):
        with pytest.raises(TypeError, match=ADVICE):
            call()
    # Everything else works. Two backward passes of one float32 program.
    plain = value_and_sampled_grad(forward, Categorical(), microbatches=microbatches)
    expected = jax.jit(lambda p: plain(p, inputs, targets, key)[2]())(params)
    for call in (lambda: jax.jit(lambda p: create(p)())(params), crossed, lambda: jax.jit(lambda s: s())(crossed)):
        chex.assert_trees_all_close(call(), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(crossed.loss_at(params), crossed.loss, rtol=1e-6)
    assert not np.any(crossed.regularizer_products(directions))


# Wrong directions.


@pytest.mark.parametrize("crossing", [False, True])
def test_wrong_directions(crossing):
    model, params, inputs = one_head()
    sampled_grads = sampled(model, Categorical(), params, inputs, regularizer=penalty)
    if crossing:
        sampled_grads = jax.jit(lambda s: s)(sampled_grads)
    good = make_directions(1)[0]
    wrong = [
        ({**good, "out": {**good["out"], "b": jnp.ones(7)}}, r"\['out'\]\['b'\]: .*shape \(3,\).*got \(7,\)"),
        ({**good, "out": {**good["out"], "b": jnp.ones(())}}, r"\['out'\]\['b'\]: .*shape \(3,\).*got \(\)"),
        ({"hidden": good["hidden"]}, r": expected the structure of the parameters.*missing: .*\['out'\]"),
        ({**good, "more": jnp.ones(3)}, r": expected the structure of the parameters.*not expected: .*\['more'\]"),
        ({**good, "out": jnp.ones(3)}, r"\['out'\]: expected 2 arrays, as in the parameters, got one"),
        (jax.tree.leaves(good), ": expected the structure of the parameters"),
        (jnp.ones(3), ": expected 4 arrays, as in the parameters, got one"),
    ]
    for method in (sampled_grads.fisher_products, sampled_grads.regularizer_products):
        for direction, message in wrong:
            with pytest.raises(ValueError, match=r"^directions\[1\]" + message):
                method([good, direction])
        with pytest.raises(ValueError, match="directions: expected at least one"):
            method([])
    with pytest.raises(ValueError, match=r"^params\['out'\]\['b'\]: expected the shape \(3,\)"):
        sampled_grads.loss_at({**params, "out": {**params["out"], "b": jnp.ones(7)}})
    with pytest.raises(ValueError, match=r"^params: expected the structure of the parameters"):
        sampled_grads.loss_at({"hidden": params["hidden"]})


def test_a_product_of_another_shape_is_an_error():
    class Wrong(Poisson):
        def fisher_product(self, outputs, tangents):
            return jnp.sum(tangents)

    model, params, inputs = one_head()
    with pytest.raises(ValueError, match=r"predictive.fisher_product: expected the shape \(4, 3\).*got \(\)"):
        jitted_products(model, Wrong(), params, inputs, make_directions(1))


# The loss at other parameters.


def with_aux(params, inputs):
    return forward(params, inputs), {"steps": jnp.int32(1)}


def absolute(outputs, targets):
    return jnp.mean(jnp.abs(outputs[..., 0] - targets.astype(outputs.dtype)))


LOSSES = {
    "categorical": (Categorical, one_head, {}),
    "regularizer": (Categorical, one_head, {"regularizer": penalty}),
    "own loss": (Categorical, one_head, {"loss": absolute, "regularizer": penalty}),
    "weights": (lambda: Categorical(jnp.asarray(WEIGHTS)), one_head, {}),
    "joint": (CASES["weighted joint"][0], with_two_heads, {"regularizer": penalty}),
    "aux": (Categorical, lambda: (with_aux, *one_head()[1:]), {"has_aux": True}),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_loss_at_other_parameters(name, microbatches):
    make, problem, options = LOSSES[name]
    predictive, (model, params, inputs), others = make(), problem(), make_params(9)
    outputs = model(params, inputs)
    targets = predictive.sample(jax.random.key(0), outputs[0] if name == "aux" else outputs)
    value_and_grads = value_and_sampled_grad(model, predictive, microbatches=microbatches, **options)

    @jax.jit
    def run(params, others):
        sampled_grads = value_and_grads(params, inputs, targets, jax.random.key(3))[2]
        expected = value_and_grads(others, inputs, targets, jax.random.key(3))[0]
        ours = sampled_grads.loss_at(others), sampled_grads.loss_at(params)
        return ours, (expected[0] if name == "aux" else expected, sampled_grads.loss)

    ours, expected = run(params, others)
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, expected)
    # The same sums in float32.
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert abs(float(expected[0] - expected[1])) > 1e-3


@pytest.mark.parametrize("left_out", [None, optax.MaskedNode()], ids=["None", "MaskedNode"])
def test_loss_at_takes_the_old_parameters_for_what_is_left_out(left_out):
    model, params, inputs = one_head()
    others = make_params(9)
    sampled_grads = sampled(model, Categorical(), params, inputs, regularizer=penalty)
    pairs = [
        ({"hidden": others["hidden"], "out": left_out}, {**others, "out": params["out"]}),
        (
            {"hidden": {"w": left_out, "b": others["hidden"]["b"]}, "out": others["out"]},
            {**others, "hidden": {"w": params["hidden"]["w"], "b": others["hidden"]["b"]}},
        ),
        (left_out, params),
    ]
    for one in (sampled_grads, jax.jit(lambda s: s)(sampled_grads)):
        for partial, whole in pairs:
            np.testing.assert_allclose(one.loss_at(partial), one.loss_at(whole), rtol=1e-6)  # The same sums.
        np.testing.assert_allclose(one.loss_at(left_out), one.loss, rtol=1e-6)


@pytest.mark.slow
def test_loss_at_with_the_same_dropout_keys():
    """A key for each example, of which a microbatch has its own."""
    _, params, x = one_head()
    others, keys = make_params(9), jax.random.split(jax.random.key(5), BATCH)

    def dropped(params, inputs):
        x, keys = inputs
        return forward(params, jnp.where(jax.random.bernoulli(keys[0], 0.5, x.shape), x, 0))

    targets = FixedSamples().sample(jax.random.key(0), forward(params, x)) ** 2
    value_and_grads = value_and_sampled_grad(dropped, FixedSamples(), microbatches=2)
    *_, sampled_grads = jax.jit(value_and_grads)(params, (x, keys), targets, jax.random.key(0))
    expected = jax.jit(value_and_grads)(others, (x, keys), targets, jax.random.key(0))[0]
    np.testing.assert_allclose(sampled_grads.loss_at(others), expected, rtol=1e-6)  # The same sums.
