"""The gradient of the loss and, from the same forward pass, the gradient for targets sampled from the model."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from tnt_optax import checks
from tnt_optax.dtypes import as_float, float32_or_better
from tnt_optax.microbatches import cast_like, split, split_distribution, weighted_sum
from tnt_optax.predictive import PredictiveDistribution


def value_and_sampled_grad(
    forward: Callable[..., Any],
    predictive: PredictiveDistribution,
    *,
    has_aux: bool = False,
    scale: Literal["mean", "fisher"] = "mean",
    microbatches: int = 1,
) -> Callable[[Any, Any, Any, jax.Array], tuple[Any, Any, Partial]]:
    """A function that gives the loss, its gradient, and the sampled-label gradient as a function (lines 3-4 of
    Algorithm 1).

    One forward pass and one `jax.vjp`: the pullback is applied to the cotangent of the true targets and, only when
    the returned function is called, to that of targets sampled from `predictive`.

    Args:
      forward: `forward(params, inputs) -> outputs`, or `(outputs, aux)` with `has_aux`. `inputs` is any pytree: put
        a dropout key or the running averages of a BatchNorm there.
      predictive: `Categorical()`, `Bernoulli()`, `Normal()` or an object of your own with their methods `loss` and
        `sample` (see `tnt_optax.PredictiveDistribution`). One that holds arrays made inside a jitted step, such as a
        mask, has to be a pytree.
      has_aux: whether `forward` returns `(outputs, aux)`, such as BatchNorm's new averages.
      scale: "mean": the sampled gradient G is the mean over the batch of m examples, as in the paper, and so the
        factors estimate F/m. "fisher": G is multiplied by sqrt(m), and so the factors estimate the Fisher
        matrix F itself, whatever the batch size. Damping and learning rate mean different things in the two: the
        published ones assume "mean". m is `predictive.batch_size(outputs)` where there is that method, else the
        length of the outputs' leading axis.
      microbatches: in how many equal parts, one after the other, a batch goes through `forward`, so that only one
        part's activations are in memory. Part j has the examples j, j + microbatches, ...: every leaf of inputs and
        targets has the leading axis of the batch (a random key becomes `jax.random.split(key, batch_size)`, of which
        `forward` may take the first). Loss and gradients are those of the whole batch, summed in float32 or better.
        `aux` has a leading axis of the parts: take the mean of BatchNorm's new averages, the last of a counter.
        `sampled_grads` makes its own forward passes when it is called.

    Returns:
      `value_and_grads(params, inputs, targets, key) -> (loss, grads, sampled_grads)`, or
      `((loss, aux), grads, sampled_grads)` with `has_aux`. `loss` is a scalar, `grads` a tree like `params`, and
      `sampled_grads` a `jax.tree_util.Partial` without arguments that returns a tree like `params`. It is a pytree,
      so it can cross a `jit` boundary; pass it to `tx.update(..., sampled_grads=sampled_grads)` as it is.
      Call `value_and_grads` inside `jit`: outside, every call makes a new pullback, and what is jitted behind it
      compiles anew. With `microbatches` it crosses a `jit` boundary only if `forward` holds no arrays of the step.

    Raises:
      TypeError: `forward` or a method of `predictive` is missing or not callable; `microbatches` is no integer.
      ValueError: an unknown `scale`, `microbatches` below 1; when called, targets that don't fit the outputs, a batch
        that `microbatches` does not divide, or that has no common leading axis.
    """
    if not callable(forward):
        raise TypeError(f"forward: expected a function (params, inputs) -> outputs, got {type(forward).__name__}.")
    for method in ("loss", "sample"):
        if not callable(getattr(predictive, method, None)):
            raise TypeError(
                f"predictive: expected an object with the methods loss(outputs, targets) and sample(key, outputs), "
                f"such as tnt_optax.Categorical(), got {predictive!r} without a method {method!r}."
            )
    if isinstance(predictive, type):
        raise TypeError(
            f"predictive: expected an object, got the class {predictive.__name__}: write {predictive.__name__}()."
        )
    if scale not in ("mean", "fisher"):
        raise ValueError(f"scale: expected 'mean' or 'fisher', got {scale!r}.")

    if isinstance(microbatches, jax.Array):
        raise TypeError("microbatches: expected a Python integer, got an array.")
    checks.check_period("microbatches", microbatches)

    # The distribution crosses a `jit` boundary with the returned Partial: its arrays (a mask made inside the step)
    # as arrays, an object that is no pytree as a part of this function.
    opaque = jax.tree_util.all_leaves([predictive])
    arrays = None if opaque else predictive

    def run(params: Any, inputs: Any) -> Any:
        """The outputs, the pullback to the parameters and, with `has_aux`, the aux."""

        def outputs_and_aux(params: Any) -> Any:
            result = forward(params, inputs)
            if has_aux and not (isinstance(result, tuple) and len(result) == 2):
                raise TypeError(
                    f"forward: expected it to return (outputs, aux) with has_aux=True, got {type(result).__name__}."
                )
            return result

        return jax.vjp(outputs_and_aux, params, has_aux=has_aux)

    def sampled_gradient(pullback: Callable, arrays: Any, outputs: Any, key: jax.Array) -> Any:
        distribution = predictive if opaque else arrays
        targets = distribution.sample(key, outputs)

        def loss(outputs: Any) -> jax.Array:
            value = distribution.loss(outputs, targets)
            if scale == "mean" or microbatches > 1:  # The parts are scaled together.
                return value
            size = _batch_size(distribution, outputs).astype(float32_or_better(value))
            return jnp.sqrt(size).astype(value.dtype) * value

        return pullback(jax.grad(loss)(outputs))[0]

    def value_and_grads(params: Any, inputs: Any, targets: Any, key: jax.Array) -> tuple[Any, Any, Partial]:
        outputs, pullback, *aux = run(params, inputs)
        loss, cotangent = jax.value_and_grad(predictive.loss)(outputs, targets)
        (grads,) = pullback(cotangent)
        sampled_grads = Partial(sampled_gradient, pullback, arrays, outputs, key)
        return ((loss, *aux) if has_aux else loss), grads, sampled_grads

    def sampled_gradient_of_parts(params: Any, shares: jax.Array, parts: Any) -> Any:
        def of_part(part: Any) -> tuple[Any, jax.Array]:
            inputs, arrays, key = part
            outputs, pullback, *_ = run(params, inputs)
            size = _batch_size(predictive if opaque else arrays, outputs)
            return sampled_gradient(pullback, arrays, outputs, key), size

        total, sizes = weighted_sum(of_part, params, shares, parts)
        if scale == "mean":
            return cast_like(params, total)
        # The mean over a part has the covariance F / size, and so the weighted mean over all has F / m with this 1/m.
        reciprocal = jnp.sum(jnp.square(shares) / jnp.where(shares == 0, 1, sizes.astype(shares.dtype)))
        factor = 1 / jnp.sqrt(jnp.where(reciprocal == 0, 1, reciprocal))  # Without any weights the gradient is 0.
        return cast_like(params, jax.tree.map(lambda g: factor.astype(g.dtype) * g, total))

    def value_and_grads_of_parts(params: Any, inputs: Any, targets: Any, key: jax.Array) -> tuple[Any, Any, Partial]:
        inputs, targets = split(microbatches, inputs=inputs, targets=targets)
        distributions, shares = split_distribution(predictive, microbatches)

        def of_part(part: Any) -> tuple[Any, Any]:
            inputs, targets, arrays = part
            outputs, pullback, *aux = run(params, inputs)
            distribution = predictive if opaque else arrays
            loss, cotangent = jax.value_and_grad(distribution.loss)(outputs, targets)
            return pullback(cotangent)[0], (loss, *aux)

        grads, (losses, *aux) = weighted_sum(of_part, params, shares, (inputs, targets, distributions))
        loss = jnp.sum(shares.astype(losses.dtype) * losses)
        parts = (inputs, distributions, jax.random.split(key, microbatches))
        sampled_grads = Partial(sampled_gradient_of_parts, params, shares, parts)
        return ((loss, *aux) if has_aux else loss), cast_like(params, grads), sampled_grads

    return value_and_grads if microbatches == 1 else value_and_grads_of_parts


def _batch_size(predictive: Any, outputs: Any) -> jax.Array:
    if hasattr(predictive, "batch_size"):
        return as_float(predictive.batch_size(outputs))
    shape = jnp.shape(jax.tree.leaves(outputs)[0])
    return as_float(shape[0] if shape else 1)
