"""Predictive distributions p(y | x, theta): the likelihood of the targets, given the outputs of a model.

`value_and_sampled_grad` takes any object with the two methods of `PredictiveDistribution`. This module has the usual
distributions, and `Joint`, which combines several. Losses are negative log-likelihoods (up to a constant), because only
then is the covariance of the gradients of sampled targets the Fisher matrix of Eq. (1). They are computed in float32 or
better.
"""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from tnt_optax import checks, microbatches
from tnt_optax.numerics import as_float, float32_or_better


class PredictiveDistribution(Protocol):
    r"""The interface of a predictive distribution: any object with the methods `loss` and `sample`.

    Three other methods are optional:

    - ``batch_size(outputs)`` returns the number :math:`m` of independent examples over which ``loss`` takes its mean.
      Without it, :math:`m` is the length of the leading axis of the outputs.
    - ``fisher_product(outputs, tangents)`` returns :math:`H` times the tangents. Both arguments and the result are
      trees like the outputs. :math:`H` is the Fisher information of the mean loss with respect to the outputs, weights
      included: :math:`H = \mathbb{E}_y[\nabla^2 \ell(z, y)]`, for targets :math:`y` sampled from the object at the
      outputs :math:`z`. Without the method, :math:`H` is the Hessian of ``loss`` at one sample of the targets. Both are
      the same if the outputs are natural parameters of an exponential family, or means of a fixed variance.
    - ``split(number)`` is for ``microbatches``. An object that holds arrays needs it. It returns two things: the same
      object with an additional leading axis of length ``number`` on all of its arrays, and the shares of the parts in
      the loss of the whole batch, a floating-point array of shape ``(number,)``. Element :math:`j` of the new axis is
      the distribution of part :math:`j`, which has the examples :math:`j`, :math:`j` + ``number``, :math:`j` + 2
      ``number``, and so on.

    Example:
      >>> import jax, jax.numpy as jnp, tnt_optax
      >>> class Poisson:  # Counts; the outputs are the logarithms of their rates.
      ...     def loss(self, outputs, targets):
      ...         return jnp.sum(jnp.exp(outputs) - targets * outputs) / len(outputs)
      ...     def sample(self, key, outputs):
      ...         return jax.random.poisson(key, jnp.exp(outputs)).astype(outputs.dtype)
      >>> value_and_grads = tnt_optax.value_and_sampled_grad(lambda params, x: x @ params, Poisson())
      >>> loss, _, _ = value_and_grads(jnp.zeros((3, 2)), jnp.ones((5, 3)), jnp.ones((5, 2)), jax.random.key(0))
      >>> float(loss)
      2.0
    """

    def loss(self, outputs: Any, targets: Any) -> jax.Array:
        r""":math:`-\log p(y \mid z)`, summed over the outputs of an example, mean over the batch: a scalar."""
        ...

    def sample(self, key: jax.Array, outputs: Any) -> Any:
        """Targets sampled from the distribution at these outputs, as ``loss`` expects them."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Categorical:
    r"""The distribution of class labels. The outputs are logits.

    .. math::

      \ell = \frac{\sum_n w_n \left( \log \sum_c e^{z_{nc}} - z_{n y_n} \right)}{\sum_n w_n}

    The outputs :math:`z` have the shape ``(..., classes)``. The targets :math:`y` are integer labels of shape
    ``(...)``. Each label is an example: the mean is over all of them. In a language model it is the mean over the
    tokens.

    Attributes:
      weights: :math:`w`: None (all 1), or an array of shape ``(...)`` with the weight of each label, such as a mask
        that is 0 at padded positions. The loss is 0 if all weights are 0. Sampled labels have the same weights. The
        weights are an array: build ``Categorical(weights=mask)`` inside the training step.

    Example:
      >>> import jax.numpy as jnp, tnt_optax
      >>> logits, labels = jnp.zeros((2, 5, 3)), jnp.array([[0, 1, 2, -1, -1], [2, 1, 0, 0, -1]])
      >>> predictive = tnt_optax.Categorical(weights=labels >= 0)  # Padding does not count.
      >>> bool(jnp.isclose(predictive.loss(logits, labels), jnp.log(3)))
      True
    """

    weights: Any = None

    def loss(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """The cross-entropy, a (weighted) mean over all labels: a scalar in float32 or better.

        If a label is not a class (-1 or -100, for example) and its weight is not 0, the loss and its gradient are NaN.
        Exclude such labels with ``Categorical(weights=labels >= 0)``.

        Raises:
          TypeError: the targets are not integers.
          ValueError: the shape of the targets or of the weights is not that of the outputs without its last axis, or
            there are fewer than two classes.
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
        if logits.shape[-1] < 2:
            raise ValueError(
                f"outputs: expected logits of at least two classes, got the shape {logits.shape}. For one logit of a "
                f"binary target, use Bernoulli."
            )
        hints = {logits.shape: "jnp.argmax(targets, axis=-1) for one-hot targets", (*expected, 1): "targets[..., 0]"}
        hint = f" Pass {hints[targets.shape]}." if targets.shape in hints else ""
        _check_shape("targets", targets.shape, expected, f"outputs of shape {logits.shape}", hint)
        weights = None if self.weights is None else self._weights(outputs)
        if weights is not None:
            # The value at a padded position, even if it is not finite, has no effect on loss and gradient.
            logits = jnp.where(weights[..., None] == 0, 0, logits)
            targets = jnp.where(weights == 0, 0, targets)
        # A label that is no class would have a finite gradient: NaN makes the optimizer reject the step.
        valid = (targets >= 0) & (targets < logits.shape[-1])
        logits += jnp.where(valid, 0.0, jnp.nan).astype(logits.dtype)[..., None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        if weights is None:
            return jnp.mean(losses)
        total = jnp.sum(weights)
        return jnp.sum(weights * losses) / jnp.where(total == 0, 1, total)

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        """Labels of shape ``(...)``, in int32, each sampled from the softmax of its logits."""
        return jax.random.categorical(key, _at_least_float32(outputs)).astype(jnp.int32)

    def fisher_product(self, outputs: jax.Array, tangents: jax.Array) -> jax.Array:
        r""":math:`H t = w\, p\, (t - \langle p, t \rangle) / \sum w`, with the probabilities :math:`p`."""
        logits, t = _at_least_float32(outputs), _at_least_float32(tangents)
        weights = jnp.ones(logits.shape[:-1], logits.dtype) if self.weights is None else self._weights(outputs)
        p = jax.nn.softmax(logits)
        product = p * (t - jnp.sum(p * t, axis=-1, keepdims=True))
        total, weights = jnp.sum(weights), weights[..., None]
        return jnp.where(weights == 0, 0, weights * product / jnp.where(total == 0, 1, total))

    def batch_size(self, outputs: jax.Array) -> jax.Array | int:
        r"""The number of independent labels, :math:`(\sum w)^2 / \sum w^2`: of a mask, the number of ones."""
        if self.weights is None:
            return max(outputs[..., 0].size, 1)
        weights = self._weights(outputs)
        squares = jnp.sum(jnp.square(weights))
        return jnp.square(jnp.sum(weights)) / jnp.where(squares == 0, 1, squares)

    def split(self, number: int) -> tuple["Categorical", jax.Array]:
        """The weights of the parts, and their shares of the total weight (see :class:`PredictiveDistribution`).

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
    r"""The distribution of independent binary variables. The outputs are logits.

    .. math::

      \ell = \frac1m \sum_{n=1}^{m} \sum_i \left( \log(1 + e^{z_{ni}}) - y_{ni} z_{ni} \right)

    The outputs :math:`z` and the targets :math:`y` have the same shape ``(batch, ...)``. Targets are numbers from 0 to
    1, such as the pixels of the paper's autoencoders.

    Example:
      >>> import jax.numpy as jnp, tnt_optax
      >>> loss = tnt_optax.Bernoulli().loss(jnp.zeros((2, 4)), jnp.ones((2, 4)))  # A sum over four outputs.
      >>> bool(jnp.isclose(loss, 4 * jnp.log(2)))
      True
    """

    def loss(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """The binary cross-entropy, summed over the outputs of an example, mean over the batch: a scalar.

        Raises:
          ValueError: outputs and targets have different shapes.
        """
        targets = _like_outputs(outputs, targets)
        return _sum_then_mean(optax.sigmoid_binary_cross_entropy(_at_least_float32(outputs), targets))

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        """Zeros and ones of the shape of the outputs, in float32 or better: 1 with the probability sigmoid(logit)."""
        logits = _at_least_float32(outputs)
        return jax.random.bernoulli(key, jax.nn.sigmoid(logits)).astype(logits.dtype)

    def fisher_product(self, outputs: jax.Array, tangents: jax.Array) -> jax.Array:
        r""":math:`H t = p (1 - p)\, t / m`, with the probabilities :math:`p` of the ones."""
        logits = _at_least_float32(outputs)
        return jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits) * _at_least_float32(tangents) / _batch(logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normal:
    r"""The normal distribution with a fixed variance. The outputs are the means.

    .. math::

      \ell = \frac1m \sum_{n=1}^{m} \sum_i \frac{(z_{ni} - y_{ni})^2}{2 \sigma^2}

    The outputs :math:`z` and the targets :math:`y` have the same shape ``(batch, ...)``.

    Attributes:
      variance: :math:`\sigma^2`: a positive number, or an array that broadcasts to the shape of the outputs.

    Example:
      >>> import jax.numpy as jnp, tnt_optax
      >>> float(tnt_optax.Normal(variance=2.0).loss(jnp.zeros((5, 4)), jnp.ones((5, 4))))  # 4 / (2 * 2)
      1.0
    """

    variance: Any = 1.0

    def __post_init__(self) -> None:  # noqa: D105
        # JAX also builds it with placeholders for its arrays.
        if isinstance(self.variance, numbers.Real | str):
            checks.check_number("variance", self.variance, 0)

    def loss(self, outputs: jax.Array, targets: jax.Array) -> jax.Array:
        """The squared error / (2 variance), summed over the outputs of an example, mean over the batch: a scalar.

        Raises:
          ValueError: outputs and targets have different shapes.
        """
        targets = _like_outputs(outputs, targets)
        means = _at_least_float32(outputs)
        return _sum_then_mean(jnp.square(means - targets) / (2 * self._variance(means)))

    def sample(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        """The outputs plus normal noise of this variance, in float32 or better."""
        means = _at_least_float32(outputs)
        return means + jnp.sqrt(self._variance(means)) * jax.random.normal(key, means.shape, means.dtype)

    def fisher_product(self, outputs: jax.Array, tangents: jax.Array) -> jax.Array:
        r""":math:`H t = t / (\sigma^2 m)`."""
        means = _at_least_float32(outputs)
        return _at_least_float32(tangents) / (self._variance(means) * _batch(means))

    def split(self, number: int) -> tuple["Normal", jax.Array]:
        """The same variance and equal shares for all parts (see :class:`PredictiveDistribution`).

        A variance for each example of the batch does not broadcast to the outputs of a part: ``loss`` raises an error.
        """
        return microbatches.stack(self, number), microbatches.uniform_shares(number)

    def _variance(self, means: jax.Array) -> jax.Array:
        try:
            return jnp.broadcast_to(jnp.asarray(self.variance, means.dtype), means.shape)
        except ValueError:
            raise ValueError(
                f"variance: expected a shape that broadcasts to the outputs' {means.shape}, "
                f"got {jnp.shape(self.variance)}. With microbatches, it has to be the same for all examples."
            ) from None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalNormal:
    r"""The normal distribution with a variance that the model predicts too, of independent variables.

    .. math::

      \ell = \frac1m \sum_{n=1}^{m} \sum_i \frac12 \left( (z_{ni} - y_{ni})^2 e^{-s_{ni}} + s_{ni} \right)

    The outputs are a mapping with the means :math:`z` under the name ``"mean"``, and the logarithms :math:`s` of the
    variances under ``"log_variance"``. They and the targets :math:`y` have the same shape ``(batch, ...)``. The policy
    of an agent with continuous actions is an example. A variance that is the same for all inputs is a parameter, which
    ``forward`` broadcasts to the shape of the means.

    Example:
      >>> import jax.numpy as jnp, tnt_optax
      >>> outputs = {"mean": jnp.zeros((5, 4)), "log_variance": jnp.zeros((5, 4))}
      >>> float(tnt_optax.DiagonalNormal().loss(outputs, jnp.ones((5, 4))))  # 4 / 2
      2.0
    """

    def loss(self, outputs: Mapping[str, jax.Array], targets: jax.Array) -> jax.Array:
        """The negative log-likelihood, summed over the variables of an example, mean over the batch: a scalar.

        Raises:
          ValueError: the outputs have other names, or means, variances and targets have different shapes.
        """
        means, log_variances = self._outputs(outputs)
        errors = jnp.square(means - _like_outputs(means, targets))
        return _sum_then_mean((errors * jnp.exp(-log_variances) + log_variances) / 2)

    def sample(self, key: jax.Array, outputs: Mapping[str, jax.Array]) -> jax.Array:
        """The means plus normal noise of these variances, in float32 or better."""
        means, log_variances = self._outputs(outputs)
        return means + jnp.exp(log_variances / 2) * jax.random.normal(key, means.shape, means.dtype)

    def fisher_product(
        self, outputs: Mapping[str, jax.Array], tangents: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        r""":math:`H t`: :math:`e^{-s} t / m` for the means, :math:`t / (2 m)` for the logarithms of the variances."""
        means, log_variances = self._outputs(outputs)
        of_mean, of_log_variance = self._outputs(tangents)
        m = _batch(means)
        return {"mean": jnp.exp(-log_variances) * of_mean / m, "log_variance": of_log_variance / (2 * m)}

    def _outputs(self, outputs: Any) -> tuple[jax.Array, jax.Array]:
        if not isinstance(outputs, Mapping) or set(outputs) != {"mean", "log_variance"}:
            got = sorted(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
            raise ValueError(f"outputs: DiagonalNormal expects the names 'mean' and 'log_variance', got {got}.")
        means, log_variances = _at_least_float32(outputs["mean"]), _at_least_float32(outputs["log_variance"])
        hint = " Use jnp.broadcast_to(log_variance, mean.shape)."
        _check_shape("log_variance", log_variances.shape, means.shape, "means of the same shape", hint)
        return means, log_variances


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Joint:
    r"""The distribution of several independent outputs, each with its own distribution.

    Examples are the policy and the value of an agent, and the residuals of a differential equation in the interior and
    on the boundary. Outputs and targets are mappings with the names of the distributions. Each part has its own leading
    axis and batch size. The losses of the parts are added, and so are their Fisher matrices.

    Attributes:
      distributions: a mapping from names to distributions. Weight a squared error by the variance of its ``Normal``:
        its weight is :math:`1 / \sigma^2`.

    Example:
      >>> import jax.numpy as jnp, tnt_optax
      >>> predictive = tnt_optax.Joint({"inside": tnt_optax.Normal(), "edge": tnt_optax.Normal(variance=0.5)})
      >>> outputs = {"inside": jnp.zeros(8), "edge": jnp.zeros(2)}
      >>> float(predictive.loss(outputs, {"inside": jnp.ones(8), "edge": jnp.ones(2)}))
      1.5
    """

    distributions: Mapping[str, Any]

    def loss(self, outputs: Mapping[str, Any], targets: Mapping[str, Any]) -> jax.Array:
        """The sum of the losses: a scalar.

        Raises:
          ValueError: the names of outputs or targets are not those of the distributions.
        """
        return weighted_loss(self, unit_weights(self), outputs, targets)

    def sample(self, key: jax.Array, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """The sampled targets of all parts, each with its own key."""
        keys = jax.random.split(key, len(self.distributions))
        parts = zip(self._parts(outputs), keys, strict=True)
        return {name: predictive.sample(subkey, outputs) for (name, predictive, outputs), subkey in parts}

    def split(self, number: int) -> tuple["Joint", dict[str, Any]]:
        """The microbatches of all parts, and a mapping with their shares (see :class:`PredictiveDistribution`)."""
        parts = {name: microbatches.split_predictive(part, number) for name, part in self.distributions.items()}
        joint = Joint({name: predictive for name, (predictive, _) in parts.items()})
        return joint, {name: shares for name, (_, shares) in parts.items()}

    def _parts(self, *trees: Any) -> list[tuple[Any, ...]]:
        """For each part its name, its distribution, and its entry in each tree."""
        names = set(self.distributions)
        for tree in trees:
            if not isinstance(tree, Mapping) or set(tree) != names:
                got = sorted(tree) if isinstance(tree, Mapping) else type(tree).__name__
                raise ValueError(f"Joint: expected outputs and targets with the names {sorted(names)}, got {got}.")
        return [(name, part, *(tree[name] for tree in trees)) for name, part in self.distributions.items()]


def check_predictive(name: str, predictive: Any) -> None:
    """An error for an object that is not a predictive distribution, or a `Joint` with such a part."""
    example = f"{predictive.__name__}()" if isinstance(predictive, type) else "tnt_optax.Categorical()"
    methods = [callable(getattr(predictive, method, None)) for method in ("loss", "sample")]
    if isinstance(predictive, type) or not all(methods):
        raise TypeError(
            f"{name}: expected an object with the methods loss(outputs, targets) and sample(key, outputs), such as "
            f"{example}, got {predictive!r}."
        )
    if isinstance(predictive, Joint):
        if not isinstance(predictive.distributions, Mapping) or not predictive.distributions:
            raise TypeError(
                f"{name}: expected Joint to have a mapping from names to distributions, got {predictive!r}."
            )
        for part, distribution in predictive.distributions.items():
            check_predictive(f"{name}[{part!r}]", distribution)


def weighted_loss(predictive: Any, weights: Any, outputs: Any, targets: Any) -> jax.Array:
    """The loss times a weight; of a `Joint`, the sum of the losses of its parts, each times its own weight."""
    if isinstance(predictive, Joint):
        losses = [weighted_loss(*part) for _, *part in predictive._parts(weights, outputs, targets)]
        return jnp.sum(jnp.stack(losses))
    loss = checks.check_scalar("predictive.loss", predictive.loss(outputs, targets))
    return jnp.asarray(weights, loss.dtype) * loss


def fisher_product(predictive: Any, weights: Any, outputs: Any, tangents: Any, targets: Any) -> Any:
    """H times the tangents, times a weight: of a `Joint`, for each of its parts with its own weight.

    Args:
      predictive: the distribution.
      weights: those of `weighted_loss`.
      outputs: the outputs of the model, in float32 or better.
      tangents: a tree like the outputs.
      targets: a function that returns sampled targets, for a distribution without a `fisher_product` of its own.
    """
    if isinstance(predictive, Joint):
        return {
            name: fisher_product(part, weight, output, tangent, lambda name=name: targets()[name])
            for name, part, weight, output, tangent in predictive._parts(weights, outputs, tangents)
        }
    if hasattr(predictive, "fisher_product"):
        product = predictive.fisher_product(outputs, tangents)
    else:
        samples = targets()
        gradient = jax.grad(lambda o: checks.check_scalar("predictive.loss", predictive.loss(o, samples)))
        product = jax.jvp(gradient, (outputs,), (tangents,))[1]
    product = checks.match("predictive.fisher_product", product, outputs, "the outputs")
    return jax.tree.map(lambda x: jnp.asarray(weights, x.dtype) * x, product)


def unit_weights(predictive: Any) -> Any:
    """The weight 1 for `weighted_loss`; of a `Joint`, a mapping with the weights of its parts."""
    if isinstance(predictive, Joint):
        return {name: unit_weights(part) for name, part in predictive._parts()}
    return 1.0


def batch_sizes(predictive: Any, outputs: Any) -> Any:
    """m, the number of independent examples in the loss: a scalar; of a `Joint`, a mapping as of `unit_weights`."""
    if isinstance(predictive, Joint):
        return {name: batch_sizes(*part) for name, *part in predictive._parts(outputs)}
    if hasattr(predictive, "batch_size"):
        return as_float(predictive.batch_size(outputs))
    shape = jnp.shape(jax.tree.leaves(outputs)[0])
    return as_float(shape[0] if shape else 1)


def _at_least_float32(outputs: jax.Array) -> jax.Array:
    if not hasattr(outputs, "dtype"):
        raise TypeError(
            f"outputs: expected an array, got {type(outputs).__name__}. If `forward` returns (outputs, aux), pass "
            f"has_aux=True."
        )
    return outputs.astype(float32_or_better(outputs))


def _like_outputs(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    dtype = _at_least_float32(outputs).dtype
    hint = " Pass targets[..., None]." if (*jnp.shape(targets), 1) == outputs.shape else ""
    _check_shape("targets", jnp.shape(targets), outputs.shape, "outputs of the same shape", hint)
    return jnp.asarray(targets).astype(dtype)


def _check_shape(name: str, got: tuple[int, ...], expected: tuple[int, ...], beside: str, hint: str = "") -> None:
    if got != expected:
        raise ValueError(f"{name}: expected shape {expected} beside {beside}, got shape {got}.{hint}")


def _sum_then_mean(losses: jax.Array) -> jax.Array:
    return jnp.sum(losses) / _batch(losses)


def _batch(outputs: jax.Array) -> int:
    """The number of examples of which `loss` is the mean."""
    return max(outputs.shape[0] if outputs.ndim else 1, 1)
