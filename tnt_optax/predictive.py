"""Predictive distributions p(y | x, theta): what the outputs of a model say about its targets.

`value_and_sampled_grad` takes any object with the two methods of `PredictiveDistribution`; the three here are the
usual ones. Losses are negative log-likelihoods (up to a constant), because only then is the covariance of the
gradients of sampled targets the Fisher matrix of Eq. (1). They are computed in float32 or better.
"""

import dataclasses
import numbers
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from tnt_optax import checks, microbatches
from tnt_optax.dtypes import as_float, float32_or_better


class PredictiveDistribution(Protocol):
    """What `value_and_sampled_grad` asks of a predictive distribution.

    An object may also have a method `batch_size(outputs)`: over how many independent examples `loss` takes its
    mean. Without it, that is the length of the leading axis of the outputs.

    One that holds arrays needs, for `microbatches`, a method `split(number)` too. It returns the same object with a
    further leading axis of length `number` on all of its arrays, whose element j is the distribution of part j
    (the examples j, j + number, j + 2 number, ...), and the floating-point shares, of shape (number,), that the parts'
    losses have in the loss of the whole batch.
    """

    def loss(self, outputs: Any, targets: Any) -> jax.Array:
        """-log p(targets | outputs), summed over an example's outputs, mean over the batch: a scalar."""
        ...

    def sample(self, key: jax.Array, outputs: Any) -> Any:
        """Targets drawn from p(. | outputs), of the form that `loss` takes."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Categorical:
    """Class labels; the outputs are logits.

    Outputs have the shape (..., classes), targets are integer labels of shape (...). Every label is an example of
    its own: the mean is over all of them, which for a language model is the mean over tokens.

    Attributes:
      weights: None, or an array of shape (...) with a weight for each label, such as a mask that is 0 on padded
        positions. The loss is then sum(weights * nll) / sum(weights), for true and for sampled labels alike (and 0
        where all weights are). It is an array like any other: build `Categorical(weights=mask)` inside the step.
    """

    weights: Any = None

    def loss(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """Cross-entropy, (weighted) mean over all labels: a scalar, float32 or better.

        Raises:
          TypeError: the targets are not integers.
          ValueError: the targets' (or weights') shape is not that of the outputs without its last axis.
        """
        logits = _at_least_float32(outputs)
        targets = jnp.asarray(targets)
        expected = logits.shape[:-1]
        if logits.ndim == 0:
            raise ValueError("outputs: expected logits of shape (..., classes), got a scalar.")
        if not jnp.issubdtype(targets.dtype, jnp.integer):
            raise TypeError(
                f"targets: Categorical expects integer labels of shape {expected}, got {targets.dtype} of shape "
                f"{targets.shape}. One-hot targets become labels with jnp.argmax(targets, axis=-1)."
            )
        _check_shape("targets", targets.shape, expected, f"outputs of shape {logits.shape}")
        if self.weights is None:
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))
        weights = self._weights(outputs)
        # Whatever stands on a padded position, even if it is not finite, has no part in loss and gradient.
        logits = jnp.where(weights[..., None] == 0, 0, logits)
        targets = jnp.where(weights == 0, 0, targets)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        total = jnp.sum(weights)
        return jnp.sum(weights * losses) / jnp.where(total == 0, 1, total)

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        """Labels of shape (...), int32, each drawn from softmax(logits)."""
        return jax.random.categorical(key, _at_least_float32(outputs)).astype(jnp.int32)

    def batch_size(self, outputs: jax.Array) -> jax.Array | int:
        """How many independent labels the mean is over: (sum w)^2 / sum w^2, for a mask the number of ones."""
        if self.weights is None:
            return max(outputs[..., 0].size, 1)
        weights = self._weights(outputs)
        squares = jnp.sum(jnp.square(weights))
        return jnp.square(jnp.sum(weights)) / jnp.where(squares == 0, 1, squares)

    def split(self, number: int) -> tuple["Categorical", jax.Array]:
        """The parts' weights, and their shares of the total weight; see `PredictiveDistribution`.

        Raises:
          ValueError: `number` does not divide the leading axis of the weights.
        """
        if self.weights is None:
            return self, microbatches.uniform_shares(number)
        (weights,) = microbatches.split(number, weights=self.weights)
        totals = jnp.sum(as_float(weights).reshape(number, -1), axis=1)
        total = jnp.sum(totals)
        return Categorical(weights), totals / jnp.where(total == 0, 1, total)

    def _weights(self, outputs: jax.Array) -> jax.Array:
        weights = jnp.asarray(self.weights)
        _check_shape("weights", weights.shape, outputs.shape[:-1], f"outputs of shape {outputs.shape}")
        return weights.astype(_at_least_float32(outputs).dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """Independent yes-or-no outputs; the outputs of the model are their logits.

    Outputs and targets have the same shape (batch, ...). Targets are 0, 1 or anything between (the pixels of the
    paper's autoencoders).
    """

    def loss(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """Binary cross-entropy, summed over an example's outputs, mean over the batch: a scalar.

        Raises:
          ValueError: outputs and targets differ in shape.
        """
        targets = _like_outputs(outputs, targets)
        return _sum_then_mean(optax.sigmoid_binary_cross_entropy(_at_least_float32(outputs), targets))

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        """Zeros and ones of the outputs' shape, in float32 or better, each one with probability sigmoid(logit)."""
        logits = _at_least_float32(outputs)
        return jax.random.bernoulli(key, jax.nn.sigmoid(logits)).astype(logits.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normal:
    """Normal outputs of a fixed variance; the outputs of the model are the means.

    Outputs and targets have the same shape (batch, ...).

    Attributes:
      variance: a positive number, or an array that broadcasts against the outputs.
    """

    variance: Any = 1.0

    def __post_init__(self) -> None:  # noqa: D105
        # JAX also builds it with placeholders for its arrays.
        if isinstance(self.variance, numbers.Real | str):
            checks.check_positive("variance", self.variance)

    def loss(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """Squared error / (2 variance), summed over an example's outputs, mean over the batch: a scalar.

        Raises:
          ValueError: outputs and targets differ in shape.
        """
        targets = _like_outputs(outputs, targets)
        means = _at_least_float32(outputs)
        return _sum_then_mean(jnp.square(means - targets) / (2 * self._variance(means)))

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        """Outputs plus normal noise of the variance, in float32 or better."""
        means = _at_least_float32(outputs)
        return means + jnp.sqrt(self._variance(means)) * jax.random.normal(key, means.shape, means.dtype)

    def split(self, number: int) -> tuple["Normal", jax.Array]:
        """The same variance for all parts, which count equally; see `PredictiveDistribution`.

        One variance for each example of the batch, which does not broadcast to a part's outputs, is an error there.
        """
        return microbatches.stack(self, number), microbatches.uniform_shares(number)

    def _variance(self, means: jax.Array) -> jax.Array:
        try:
            return jnp.broadcast_to(jnp.asarray(self.variance, means.dtype), means.shape)
        except ValueError:
            raise ValueError(
                f"variance: expected a shape that broadcasts to the outputs' {means.shape}, "
                f"got {jnp.shape(self.variance)}. (With microbatches, it has to be the same for all examples.)"
            ) from None


def _at_least_float32(outputs: jax.Array) -> jax.Array:
    if not hasattr(outputs, "dtype"):
        raise TypeError(
            f"outputs: expected an array, got {type(outputs).__name__}. Does `forward` return (outputs, aux)? Then say "
            f"has_aux=True."
        )
    return outputs.astype(float32_or_better(outputs))


def _like_outputs(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    _check_shape("targets", jnp.shape(targets), jnp.shape(outputs), "outputs of the same shape")
    return jnp.asarray(targets).astype(_at_least_float32(outputs).dtype)


def _check_shape(name: str, got: tuple[int, ...], expected: tuple[int, ...], beside: str) -> None:
    if got != expected:
        raise ValueError(f"{name}: expected shape {expected} beside {beside}, got shape {got}.")


def _sum_then_mean(losses: jax.Array) -> jax.Array:
    return jnp.sum(losses) / max(losses.shape[0] if losses.ndim else 1, 1)
