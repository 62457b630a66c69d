"""Precision, finiteness and conditionals."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap


def float32_or_better(x: Any) -> Any:
    """The dtype for computing with `x`: float32 for narrower floats, else its own."""
    dtype = jnp.result_type(x)
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


def epsilon(tree: Any) -> float:
    """The largest rounding error of the dtypes in a tree."""
    return max([float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(tree)], default=0.0)


def largest_number(tree: Any) -> float:
    """The largest number that all dtypes in a tree have."""
    return min([float(jnp.finfo(x.dtype).max) for x in jax.tree.leaves(tree)], default=0.0)


def as_float(x: jax.typing.ArrayLike) -> jax.Array:
    """A hyper-parameter, which `optax.inject_hyperparams` may give as an array of any dtype, in float32 or better."""
    return jnp.asarray(x, jnp.result_type(float))


def as_int32(x: jax.typing.ArrayLike) -> jax.Array:
    """A period, for comparison with the state's counters."""
    return jnp.asarray(x, jnp.int32)


def evaluate_schedule(value: Any, count: jax.Array) -> jax.Array:
    """The value of a number or of a schedule at step `count`, in float32 or better."""
    number: Any = value(count) if callable(value) else value
    return as_float(number)


def widen(tree: Any) -> Any:
    """`tree` with its floating-point arrays in float32 or better."""
    return jax.tree.map(lambda x: x.astype(float32_or_better(x)) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def largest(tree: Any) -> jax.Array:
    """The largest absolute value of a tree, NaN if there is one: a scalar in float32 or better."""
    return jnp.max(_largest_of_leaves(tree))


def all_finite(tree: Any) -> jax.Array:
    """Whether every element of a tree is finite: a boolean scalar."""
    return jnp.all(jnp.isfinite(_largest_of_leaves(tree)))


def _largest_of_leaves(tree: Any) -> jax.Array:
    # One pass without an intermediate array; the maximum of NaN and anything is NaN. The results are stacked before
    # they are used, because XLA would otherwise duplicate all reductions into every consumer.
    of_leaves = [as_float(jnp.max(jnp.abs(x), initial=0)) for x in jax.tree.leaves(tree)]
    return jnp.stack([as_float(0.0), *of_leaves])


def inner_product(tree: Any, other: Any) -> jax.Array:
    """<tree, other>, in float32 or better; an element that is 0 in the other does not count."""

    def of_leaf(x: jax.Array, y: jax.Array) -> jax.Array:
        return as_float(jnp.sum(jnp.where(y == 0, 0, x * y)))

    products = jax.tree.leaves(jax.tree.map(of_leaf, widen(tree), widen(other)))
    return jnp.sum(jnp.stack([as_float(0.0), *products]))


def symmetric_products(trees: Sequence[Any], others: Sequence[Any]) -> jax.Array:
    """The matrix of <tree_i, other_j>, which is known to be symmetric, so that one half of it is computed."""
    half = {(i, j): inner_product(trees[i], others[j]) for j in range(len(trees)) for i in range(j + 1)}
    size = range(len(trees))
    return jnp.stack([jnp.stack([half[min(i, j), max(i, j)] for j in size]) for i in size])


def count_events(count: jax.Array, events: jax.Array) -> jax.Array:
    """An int32 counter, increased by the number of events that are True."""
    return count + jnp.sum(events, dtype=jnp.int32)


def cond(predicate: bool | jax.Array, if_true: Callable[[], Any], if_false: Callable[[], Any]) -> Any:
    """`jax.lax.cond` that stays a conditional under `jax.vmap`, where JAX would compute both branches at every step.

    Under `vmap`, `if_true` runs where `predicate` holds for any element of the batch, so it has to select by
    `predicate` itself. A predicate that is known while tracing needs no conditional.
    """
    if not isinstance(predicate, jax.core.Tracer):
        return if_true() if predicate else if_false()
    return lax.cond(_any_in_batch(predicate), if_true, if_false)


@custom_vmap
def _any_in_batch(predicate: jax.Array) -> jax.Array:
    return predicate


@_any_in_batch.def_vmap
def _(axis_size: int, in_batched: list[bool], predicate: jax.Array) -> tuple[jax.Array, bool]:
    del axis_size, in_batched
    return _any_in_batch(jnp.any(predicate, axis=0)), False  # The same for the whole batch.
