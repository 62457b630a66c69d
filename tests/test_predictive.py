"""Predictive distributions: losses against SciPy's densities, samples against their probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from tnt_optax import Bernoulli, Categorical, DiagonalNormal, Normal


def outputs_of(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_categorical_loss_is_the_mean_negative_log_likelihood():
    logits = outputs_of((4, 3, 5))
    labels = np.random.default_rng(1).integers(5, size=(4, 3))
    log_p = scipy.special.log_softmax(logits.astype(float), axis=-1)
    nll = -np.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    assert Categorical().loss(logits, labels) == pytest.approx(nll.mean(), rel=1e-5)
    weights = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0.5]])
    expected = (weights * nll).sum() / weights.sum()
    assert Categorical(weights=weights).loss(logits, labels) == pytest.approx(expected, rel=1e-5)


def test_padded_positions_have_no_gradient_even_where_they_are_not_finite():
    logits = outputs_of((4, 5))
    logits[2:] = np.nan
    mask = jnp.array([True, True, False, False])
    predictive = Categorical(weights=mask)
    labels = jnp.array([0, 1, -100, 9])
    loss, gradient = jax.value_and_grad(predictive.loss)(jnp.asarray(logits), labels)
    assert loss == pytest.approx(float(Categorical().loss(logits[:2], labels[:2])), rel=1e-6)
    np.testing.assert_array_equal(gradient[2:], 0)
    assert np.all(np.isfinite(gradient))
    assert predictive.batch_size(jnp.asarray(logits)) == 2
    assert Categorical(weights=jnp.zeros(4)).loss(outputs_of((4, 5)), labels) == 0


@pytest.mark.parametrize("label", [-1, -100, 5])
def test_a_label_that_is_no_class_has_no_finite_gradient(label):
    """Optax takes -1 for the last class, and gives others a loss that is NaN with a finite gradient."""
    logits, labels = jnp.asarray(outputs_of((3, 5))), jnp.array([0, label, 1])
    loss, gradient = jax.value_and_grad(Categorical().loss)(logits, labels)
    assert np.isnan(loss)
    assert np.isnan(gradient[1]).all()
    weighted = Categorical(weights=labels == jnp.array([0, 9, 1])).loss(logits, labels)
    assert weighted == pytest.approx(float(Categorical().loss(logits[::2], labels[::2])), rel=1e-6)


def test_bernoulli_loss_is_summed_over_outputs_and_averaged_over_the_batch():
    logits = outputs_of((4, 2, 3))
    targets = np.random.default_rng(1).uniform(size=(4, 2, 3)).astype(np.float32)
    p = scipy.special.expit(logits.astype(float))
    expected = -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum(axis=(1, 2)).mean()
    assert Bernoulli().loss(logits, targets) == pytest.approx(expected, rel=1e-5)


def test_normal_loss_is_the_density_up_to_a_constant():
    means, targets, variance = outputs_of((4, 3)), outputs_of((4, 3), 1), 0.3
    nll = -scipy.stats.norm.logpdf(targets.astype(float), means, np.sqrt(variance))
    constant = 0.5 * np.log(2 * np.pi * variance)
    assert Normal(variance).loss(means, targets) == pytest.approx((nll - constant).sum(axis=1).mean(), rel=1e-5)


def diagonal_outputs(shape, dtype=jnp.float32):
    return {name: jnp.asarray(outputs_of(shape, seed), dtype) for seed, name in enumerate(["mean", "log_variance"])}


def test_diagonal_normal_loss_is_the_density_up_to_a_constant():
    outputs, targets = diagonal_outputs((4, 3)), outputs_of((4, 3), 2)
    deviations = np.exp(np.asarray(outputs["log_variance"], float) / 2)
    nll = -scipy.stats.norm.logpdf(targets.astype(float), np.asarray(outputs["mean"], float), deviations)
    expected = (nll - 0.5 * np.log(2 * np.pi)).sum(axis=1).mean()
    assert DiagonalNormal().loss(outputs, targets) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"mean": jnp.ones((4, 3))}, r"outputs: .*'mean' and 'log_variance'.*\['mean'\]"),
        (jnp.ones((4, 3)), "outputs: .*'mean' and 'log_variance'"),
        ({"mean": jnp.ones((4, 3)), "log_variance": jnp.ones(3)}, r"log_variance: .*\(4, 3\).*\(3,\).*broadcast_to"),
        ({"mean": jnp.ones((4, 2)), "log_variance": jnp.ones((4, 2))}, r"targets: .*\(4, 2\).*\(4, 3\)"),
    ],
)
def test_outputs_that_are_not_those_of_a_diagonal_normal(outputs, message):
    with pytest.raises(ValueError, match=message):
        DiagonalNormal().loss(outputs, jnp.ones((4, 3)))


@pytest.mark.parametrize(
    ("predictive", "outputs"),
    [
        *((predictive, outputs_of((5, 3))) for predictive in (Categorical(), Bernoulli(), Normal(0.2))),
        (DiagonalNormal(), diagonal_outputs((5, 3))),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision_outputs_give_a_float32_loss_and_a_cotangent_of_their_dtype(predictive, outputs, dtype):
    outputs = jax.tree.map(lambda x: jnp.asarray(x, dtype), outputs)
    targets = predictive.sample(jax.random.key(0), outputs)
    loss, cotangent = jax.value_and_grad(predictive.loss)(outputs, targets)
    exact = predictive.loss(jax.tree.map(lambda x: x.astype(jnp.float32), outputs), targets)
    assert loss.dtype == jnp.float32
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(cotangent))
    assert loss == exact


def test_samples_have_the_probabilities_of_the_model():
    draws = 40_000
    keys = jax.random.split(jax.random.key(0), draws)
    outputs = jnp.asarray(outputs_of((2, 3)))
    # Five standard errors of a mean of `draws` Bernoulli variables: 5 * 0.5 / 200.
    tolerance = 0.0125
    labels = jax.vmap(lambda k: Categorical().sample(k, outputs))(keys)
    assert labels.dtype == jnp.int32
    frequencies = np.stack([(labels == c).mean(axis=0) for c in range(3)], axis=-1)
    np.testing.assert_allclose(frequencies, scipy.special.softmax(outputs, axis=-1), atol=tolerance)
    bits = jax.vmap(lambda k: Bernoulli().sample(k, outputs))(keys)
    assert set(np.unique(bits)) == {0.0, 1.0}
    np.testing.assert_allclose(bits.mean(axis=0), scipy.special.expit(outputs), atol=tolerance)
    normals = jax.vmap(lambda k: Normal(0.25).sample(k, outputs))(keys)
    np.testing.assert_allclose(normals.mean(axis=0), outputs, atol=tolerance)
    np.testing.assert_allclose(normals.var(axis=0), 0.25, atol=tolerance)
    diagonal = diagonal_outputs((2, 3))
    variance = np.exp(diagonal["log_variance"])
    normals = jax.vmap(lambda k: DiagonalNormal().sample(k, diagonal))(keys)
    # Five standard errors of a mean and of a variance of normal numbers.
    np.testing.assert_array_less(np.abs(normals.mean(axis=0) - diagonal["mean"]), 5 * np.sqrt(variance / draws))
    np.testing.assert_array_less(np.abs(normals.var(axis=0) / variance - 1), 5 * np.sqrt(2 / draws))


@pytest.mark.parametrize(
    ("predictive", "outputs", "targets", "error", "message"),
    [
        (Categorical(), (4, 3), np.zeros((4, 3)), TypeError, "targets.*integer labels.*argmax"),
        (Categorical(), (4, 3), np.zeros(5, int), ValueError, r"targets: expected shape \(4,\).*got shape \(5,\)"),
        (Categorical(), (4, 3), np.zeros((4, 1), int), ValueError, r"targets: .*Pass targets\[..., 0\]"),
        (Categorical(), (4, 3), np.zeros((4, 3), int), ValueError, r"targets: .*argmax"),
        (
            Categorical(),
            (4, 1),
            np.zeros(4, int),
            ValueError,
            r"outputs: .*two classes.*\(4, 1\).*Bernoulli",
        ),
        (Categorical(weights=np.ones(3)), (4, 3), np.zeros(4, int), ValueError, r"weights.*\(4,\).*\(3,\)"),
        (Categorical(), (), np.zeros((), int), ValueError, "outputs.*logits"),
        (Bernoulli(), (4, 3), np.zeros(4), ValueError, r"targets.*\(4, 3\).*\(4,\)"),
        (Bernoulli(), (4, 1), np.zeros((4,)), ValueError, r"targets: .*Pass targets\[..., None\]"),
        (Normal(), (4, 3), np.zeros((3, 4)), ValueError, r"targets.*\(4, 3\).*\(3, 4\)"),
    ],
)
def test_targets_that_do_not_fit_the_outputs(predictive, outputs, targets, error, message):
    with pytest.raises(error, match=message):
        predictive.loss(jnp.zeros(outputs), jnp.asarray(targets))


@pytest.mark.parametrize("variance", [0, -1.0, float("nan")])
def test_bad_variance(variance):
    with pytest.raises(ValueError, match="variance"):
        Normal(variance)


def test_a_variance_that_does_not_broadcast_to_the_outputs():
    with pytest.raises(ValueError, match="variance: expected a shape that broadcasts"):
        Normal(jnp.ones((5, 3))).loss(jnp.ones((5, 1)), jnp.ones((5, 1)))


@pytest.mark.parametrize("predictive", [Categorical(), Bernoulli(), Normal()])
def test_outputs_that_are_no_array(predictive):
    with pytest.raises(TypeError, match="has_aux=True"):
        predictive.loss((jnp.ones((4, 3)), None), jnp.zeros(4, int))
