"""The gradient of the loss and, from the same forward pass, the gradient for targets sampled from the model."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from tnt_optax.dtypes import float32_or_better
from tnt_optax.predictive import PredictiveDistribution


def value_and_sampled_grad(
    forward: Callable[..., Any],
    predictive: PredictiveDistribution,
    *,
    has_aux: bool = False,
    scale: Literal["mean", "fisher"] = "mean",
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

    Returns:
      `value_and_grads(params, inputs, targets, key) -> (loss, grads, sampled_grads)`, or
      `((loss, aux), grads, sampled_grads)` with `has_aux`. `loss` is a scalar, `grads` a tree like `params`, and
      `sampled_grads` a `jax.tree_util.Partial` without arguments that returns a tree like `params`. It is a pytree,
      so it can cross a `jit` boundary; pass it to `tx.update(..., sampled_grads=sampled_grads)` as it is.
      Call `value_and_grads` inside `jit`: outside, every call makes a new pullback, and what is jitted behind it
      compiles anew.

    Raises:
      TypeError: `forward` or a method of `predictive` is missing or not callable.
      ValueError: an unknown `scale`; when called, targets that don't fit the outputs.
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

    # The distribution crosses a `jit` boundary with the returned Partial: its arrays (a mask made inside the step)
    # as arrays, an object that is no pytree as a part of this function.
    leaves, structure = jax.tree.flatten(predictive)
    opaque = len(leaves) == 1 and leaves[0] is predictive

    def sampled_gradient(pullback: Callable, leaves: list, outputs: Any, key: jax.Array) -> Any:
        distribution = predictive if opaque else jax.tree.unflatten(structure, leaves)
        targets = distribution.sample(key, outputs)

        def loss(outputs: Any) -> jax.Array:
            value = distribution.loss(outputs, targets)
            if scale == "mean":
                return value
            size = _batch_size(distribution, outputs).astype(float32_or_better(value))
            return jnp.sqrt(size).astype(value.dtype) * value

        return pullback(jax.grad(loss)(outputs))[0]

    def value_and_grads(params: Any, inputs: Any, targets: Any, key: jax.Array) -> tuple[Any, Any, Partial]:
        def outputs_and_aux(params: Any) -> Any:
            result = forward(params, inputs)
            if has_aux and not (isinstance(result, tuple) and len(result) == 2):
                raise TypeError(
                    f"forward: expected it to return (outputs, aux) with has_aux=True, got {type(result).__name__}."
                )
            return result

        outputs, pullback, *aux = jax.vjp(outputs_and_aux, params, has_aux=has_aux)
        loss, cotangent = jax.value_and_grad(predictive.loss)(outputs, targets)
        (grads,) = pullback(cotangent)
        sampled_grads = Partial(sampled_gradient, pullback, [] if opaque else leaves, outputs, key)
        return ((loss, *aux) if has_aux else loss), grads, sampled_grads

    return value_and_grads


def _batch_size(predictive: Any, outputs: Any) -> jax.Array:
    if hasattr(predictive, "batch_size"):
        return jnp.asarray(predictive.batch_size(outputs), jnp.float32)
    shape = jnp.shape(jax.tree.leaves(outputs)[0])
    return jnp.float32(shape[0] if shape else 1)
