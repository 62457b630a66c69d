"""The gradient of the loss and, from the same forward pass, the gradient for targets sampled from the model."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeGuard

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import Partial

from tnt_optax import checks
from tnt_optax import predictive as distributions
from tnt_optax.microbatches import Part, accumulate, split_batch
from tnt_optax.numerics import as_float
from tnt_optax.sharding import AxisNames


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampledGrad:
    """The sampled-label gradient of a batch, computed when called; the third result of `value_and_sampled_grad`.

    It is a pytree: what its computation needs (residuals of the forward pass, outputs, keys, and all arrays that
    `forward` closes over) are its leaves, so that it can cross a `jit` boundary. Pass it to
    `tx.update(..., sampled_grads=sampled_grads)` as it is: the optimizer calls it inside `jax.lax.cond`, on the steps
    that use it.

    Attributes:
      loss: the loss, as returned.
      grads: the gradients, as returned.
      compute: the function that `sampled_grads()` calls.
    """

    loss: jax.Array
    grads: Any
    compute: Partial

    def __call__(self) -> Any:
        """The sampled-label gradient, a tree like the parameters."""
        return self.compute()


def is_function(sampled_grads: Any) -> TypeGuard[Callable[[], Any]]:
    """Whether it is a function that returns a tree, and not a tree that can be called, such as an Equinox module."""
    lazy = isinstance(sampled_grads, Partial | SampledGrad) or jax.tree_util.all_leaves([sampled_grads])
    return callable(sampled_grads) and lazy


def value_and_sampled_grad(
    forward: Callable[..., Any],
    predictive: distributions.PredictiveDistribution,
    *,
    loss: Callable[[Any, Any], jax.Array] | None = None,
    regularizer: Callable[[Any], jax.Array] | None = None,
    has_aux: bool = False,
    scale: Literal["mean", "fisher"] = "fisher",
    microbatches: int = 1,
    axis_name: AxisNames | None = None,
) -> Callable[[Any, Any, Any, jax.Array], tuple[Any, Any, SampledGrad]]:
    """A function that returns the loss, its gradient, and the sampled-label gradient (lines 3-4 of Algorithm 1).

    One forward pass and one `jax.vjp`: the pullback is applied to the cotangent of the true targets and, only when the
    `SampledGrad` is called, to that of targets sampled from `predictive`.

    >>> value_and_grads = value_and_sampled_grad(model.apply, Categorical())
    >>> loss, grads, sampled_grads = value_and_grads(params, inputs, labels, key)

    Args:
      forward: `forward(params, inputs) -> outputs`, or `(outputs, aux)` with `has_aux`. `inputs` is any pytree. A
        dropout key or the running averages of a BatchNorm can be part of it, or of the closure of `forward`.
      predictive: `Categorical()`, `Bernoulli()`, `Normal()`, a `Joint` of several, or an object of your own with their
        methods `loss` and `sample` (see `PredictiveDistribution`).
      loss: None, or the training loss `(outputs, targets) -> scalar`, where it is not the negative log-likelihood
        (label smoothing, PPO, focal loss), on the scale of `predictive.loss`: the mean over the batch. Loss and
        gradient are those of this function. Sampled labels and statistics stay those of `predictive`, which never sees
        the targets.
      regularizer: None, or `(params) -> scalar`, which is added to the loss and, with its gradient, to the gradient,
        but is not part of the Fisher matrix. Where it is not finite the gradient is NaN, so that the optimizer rejects
        the step.
      has_aux: whether `forward` returns `(outputs, aux)`, such as BatchNorm's new averages.
      scale: "fisher": the sampled gradient G, a mean over m examples, is multiplied by sqrt(m), so that the factors
        estimate the Fisher matrix F itself, whatever the batch size. "mean": it is not, as in the paper, so that the
        factors estimate F/m. The published hyper-parameters assume "mean". m is `predictive.batch_size(outputs)` where
        there is that method, else the length of the leading axis of the outputs.
      microbatches: the number of sequential microbatches of equal size, of which only one has its activations in memory
        at a time. Part j has the examples j, j + microbatches, ...: every leaf of inputs and targets needs the leading
        axis of the batch (for a dropout key, `jax.random.split(key, batch_size)`, of which `forward` may take the
        first); in the targets and outputs of a `Joint`, each part its own. Loss and gradients are those of the whole
        batch, summed in float32 or better. A `loss` should apply
        the weights of `predictive`, because a microbatch counts by its share of them (of a `Joint`, by the mean of the
        shares of its parts). `aux` has a leading axis of the microbatches: take the mean of
        BatchNorm's new averages, the last value of a counter. `sampled_grads()` runs its own forward passes.
      axis_name: None, or the name (or names) of an axis of `jax.shard_map` or `jax.pmap` over which the batch is
        divided. Loss, gradients and the sampled gradient are averaged over it; targets are sampled with a key of each
        device's own, and m is the size of the global batch. With weights, the loss of each device is divided by the
        device's own total weight. `aux` is that of the device.

    Returns:
      `value_and_grads(params, inputs, targets, key) -> (loss, grads, sampled_grads)`, or
      `((loss, aux), grads, sampled_grads)` with `has_aux`. `loss` is a scalar, `grads` a tree like `params`, and
      `sampled_grads` a `SampledGrad`. Call it inside `jit`: outside, every call traces the model anew, and what is
      jitted behind it compiles anew.

      With `microbatches=1`, the residuals of the forward pass stay in memory until the optimizer's update, in every
      step.

    Raises:
      TypeError: `forward`, `loss`, `regularizer` or a method of `predictive` is missing or not callable; `microbatches`
        is not an integer; when called, a loss or the regularizer does not return a real floating-point number.
      ValueError: `scale` is unknown or `microbatches` below 1; when called, targets that do not fit the outputs, a loss
        or regularizer that returns an array with axes, a batch that `microbatches` does not divide, or that has no
        common leading axis.
    """
    for name, function in (("forward", forward), ("loss", loss), ("regularizer", regularizer)):
        if not callable(function) and (function is not None or name == "forward"):
            raise TypeError(f"{name}: expected a function, got {type(function).__name__}.")
    distributions.check_predictive("predictive", predictive)
    if scale not in ("mean", "fisher"):
        raise ValueError(f"scale: expected 'mean' or 'fisher', got {scale!r}.")
    checks.check_static_period("microbatches", microbatches)
    checks.check_axis_names("axis_name", axis_name)
    model = _Model(forward, has_aux, loss)

    def value_and_grads(params: Any, inputs: Any, targets: Any, key: jax.Array) -> tuple[Any, Any, SampledGrad]:
        local, key = _of_this_device(params, key, axis_name)
        batch, run = Part(inputs, targets, key, predictive, distributions.unit_weights(predictive)), model.run
        if microbatches > 1:
            batch, run = split_batch(microbatches, batch), model.run_parts
        value, aux, grads, sizes, sampled = run(local, batch)
        value, grads = _mean((value, grads), axis_name)
        if regularizer is not None:
            value, grads = _add_regularizer(regularizer, params, value, grads)

        def sampled_gradient() -> Any:
            weights = batch.shares if scale == "mean" else _fisher_weights(batch.shares, sizes, axis_name)
            return _mean(sampled(weights), axis_name)

        sampled_grads = SampledGrad(value, grads, _hoisted(sampled_gradient))
        return ((value, aux) if has_aux else value), grads, sampled_grads

    return value_and_grads


@dataclasses.dataclass(frozen=True)
class _Model:
    """A model with its training loss; None is the loss of the predictive distribution."""

    forward: Callable[..., Any]
    has_aux: bool
    loss: Callable[[Any, Any], jax.Array] | None

    def run(self, params: Any, part: Part) -> tuple[jax.Array, Any, Any, Any, Callable[[Any], Any]]:
        """One forward pass: loss, aux, gradient, batch sizes, and the sampled gradient as a function of weights."""
        outputs, pullback, aux = self._linearize(params, part.inputs)
        value, cotangent = self._value_and_cotangent(outputs, part)
        sizes = distributions.batch_sizes(part.predictive, outputs)
        return value, aux, pullback(cotangent)[0], sizes, functools.partial(_sample, part, outputs, pullback)

    def run_parts(self, params: Any, parts: Part) -> tuple[jax.Array, Any, Any, Any, Callable[[Any], Any]]:
        """The same for stacked parts of a batch, one after the other; the sampled gradient has passes of its own."""

        def train(part: Part) -> tuple[Any, Any]:
            value, aux, grads, sizes, _ = self.run(params, part)
            return grads, (value, aux, sizes)

        def sample(part_and_weights: tuple[Part, Any]) -> tuple[Any, None]:
            part, weights = part_and_weights
            outputs, pullback, _ = self._linearize(params, part.inputs)
            return _sample(part, outputs, pullback, weights), None

        def sampled_gradient(weights: Any) -> Any:
            return optax.tree.cast_like(accumulate(sample, params, (parts._replace(targets=None), weights))[0], params)

        grads, (values, aux, sizes) = accumulate(train, params, parts)
        return jnp.sum(values), aux, optax.tree.cast_like(grads, params), sizes, sampled_gradient

    def _value_and_cotangent(self, outputs: Any, part: Part) -> tuple[jax.Array, Any]:
        own = self.loss
        if own is None:
            loss = distributions.weighted_loss
            return jax.value_and_grad(loss, argnums=2)(part.predictive, part.shares, outputs, part.targets)
        loss = jax.value_and_grad(lambda outputs: checks.check_scalar("loss", own(outputs, part.targets)))
        shares = jax.tree.leaves(part.shares)
        share = as_float(sum(shares) / len(shares))
        # A microbatch without a share may have no loss: the mean over no examples is NaN.
        return jax.tree.map(lambda x: jnp.where(share == 0, 0, share.astype(x.dtype) * x), loss(outputs))

    def _linearize(self, params: Any, inputs: Any) -> tuple[Any, Callable[[Any], Any], Any]:
        def outputs_and_aux(params: Any) -> tuple[Any, Any]:
            result = self.forward(params, inputs)
            if not self.has_aux:
                return result, None
            if not (isinstance(result, tuple) and len(result) == 2):
                raise TypeError(
                    f"forward: expected it to return (outputs, aux) with has_aux=True, got {type(result).__name__}."
                )
            return result

        outputs, pullback, aux = jax.vjp(outputs_and_aux, params, has_aux=True)
        for leaf in jax.tree.leaves(outputs):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(
                    f"outputs: expected real floating-point arrays, got {leaf.dtype}. If `forward` returns (outputs, "
                    f"aux), pass has_aux=True."
                )
        return outputs, pullback, aux


def _sample(part: Part, outputs: Any, pullback: Callable[[Any], Any], weights: Any) -> Any:
    targets = part.predictive.sample(part.key, outputs)
    cotangent = jax.grad(lambda o: distributions.weighted_loss(part.predictive, weights, o, targets))(outputs)
    return pullback(cotangent)[0]


def _fisher_weights(shares: Any, sizes: Any, axis_name: AxisNames | None) -> Any:
    """Weights of the parts' sampled losses whose gradient has the covariance F (`scale="fisher"`).

    The mean over a part has the covariance F / size, so that the mean over all, weighted by their shares, has F / m
    with 1/m = sum of shares^2 / sizes.
    """

    def of_one_distribution(share: jax.Array, size: jax.Array) -> jax.Array:
        share, size = as_float(share), as_float(size)
        empty = share * size == 0  # All weights of the part are 0, and so is its gradient.
        reciprocal = jnp.sum(jnp.where(empty, 0, jnp.square(share) / jnp.where(empty, 1, size)))
        if axis_name is not None:
            reciprocal = lax.pmean(reciprocal, axis_name) / lax.psum(1, axis_name)
        # Where all weights are 0, so is the gradient.
        return share / jnp.sqrt(jnp.where(reciprocal == 0, 1, reciprocal))

    return jax.tree.map(of_one_distribution, shares, sizes)


def _of_this_device(params: Any, key: jax.Array, axis_name: AxisNames | None) -> tuple[Any, jax.Array]:
    """The parameters and the key for the device's own part of the batch."""
    if axis_name is None:
        return params, key
    index = lax.axis_index(axis_name)
    # Inside `shard_map`, the gradient with respect to an array that is equal on all devices is already a sum over them.
    # Adding the device's own zero makes the parameters different arrays.
    local = jax.tree.map(lambda x: x + (0 * index).astype(x.dtype), params)
    return local, jax.random.fold_in(key, index)


def _mean(tree: Any, axis_name: AxisNames | None) -> Any:
    return tree if axis_name is None else lax.pmean(tree, axis_name)


def _add_regularizer(
    regularizer: Callable[[Any], jax.Array], params: Any, value: jax.Array, grads: Any
) -> tuple[jax.Array, Any]:
    checked = jax.value_and_grad(lambda params: checks.check_scalar("regularizer", regularizer(params)))
    penalty, gradient = checked(params)
    finite = jnp.isfinite(penalty)
    grads = jax.tree.map(lambda g, r: g + jnp.where(finite, r, jnp.nan), grads, gradient)
    return value + penalty.astype(value.dtype), grads


def _hoisted(function: Callable[[], Any]) -> Partial:
    """`function` as a pytree whose leaves are all arrays that it closes over."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)()
    jaxpr, structure = closed.jaxpr, jax.tree.structure(shapes)

    def evaluate(arrays: list[jax.Array]) -> Any:
        return structure.unflatten(jax.core.eval_jaxpr(jaxpr, arrays))

    return Partial(evaluate, closed.consts)
