"""Microbatches: a batch in equal parts, their shares of its loss, and the sum over them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import keystr

from tnt_optax.numerics import as_float, float32_or_better


class Part(NamedTuple):
    """A microbatch, a stack of microbatches, or the whole batch.

    Attributes:
      inputs: of the model.
      targets: of the loss.
      key: for the sampled targets.
      predictive: its distribution.
      shares: the weight of its loss in the loss of the batch; for a `Joint` a mapping, as of its distributions.
    """

    inputs: Any
    targets: Any
    key: jax.Array
    predictive: Any
    shares: Any


def split_batch(number: int, batch: Part) -> Part:
    """The microbatches of a batch, stacked on a leading axis of all arrays; a single one is the batch as it is.

    For the errors, see `split`.
    """
    if number == 1:
        return batch
    predictives, shares = split_predictive(batch.predictive, number)
    # The distributions of a `Joint` have batch sizes of their own.
    one_size = not isinstance(shares, Mapping)
    inputs, targets = split(number, one_size=one_size, inputs=batch.inputs, targets=batch.targets)
    return Part(inputs, targets, jax.random.split(batch.key, number), predictives, shares)


def split(number: int, *, one_size: bool = True, **trees: Any) -> tuple[Any, ...]:
    """Each tree with its leaves of shape (batch, ...) in the shape (number, batch / number, ...).

    Part j has the examples j, j + number, j + 2 number, ..., so that each part is divided among devices as the batch
    is.

    Raises:
      ValueError: a leaf without a leading axis, or one that `number` does not divide, or (with `one_size`) of another
        length than that of the first leaf; it names the leaf after its tree's keyword.
    """
    leaves = [
        (f"{name}{keystr(path)}", jnp.shape(leaf))
        for name, tree in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    if not leaves:
        raise ValueError(f"{' and '.join(trees)}: expected arrays to be split into {number} microbatches, got none.")
    size = leaves[0][1][0] if leaves[0][1] else 0
    for name, shape in leaves:
        if not shape or shape[0] % number or (one_size and shape[0] != size):
            expected = f"the leading axis of {leaves[0][0]}, {size}" if one_size and size else "a leading axis"
            raise ValueError(
                f"{name}: unequal microbatches: expected {expected}, that microbatches={number} divides, got shape "
                f"{shape}. Drop or pad examples (with Categorical(weights=...), padded ones do not count). What is the "
                f"same for all examples belongs in the closure of `forward`. A random key has to become one for each "
                f"example, jax.random.split(key, batch_size), of which `forward` may take the first."
            )

    def in_parts(leaf: Any) -> jax.Array:
        size, *rest = jnp.shape(leaf)
        return jnp.swapaxes(jnp.reshape(leaf, (size // number, number, *rest)), 0, 1)

    return tuple(jax.tree.map(in_parts, tree) for tree in trees.values())


def split_predictive(predictive: Any, number: int) -> tuple[Any, Any]:
    """The distribution of every part, stacked on a leading axis of its arrays, and the parts' shares of the loss.

    They are what a method `split(number)` of the distribution returns. Without it, all parts have the same distribution
    and equal shares.

    Raises:
      TypeError: the object has such a method, but is not a pytree.
      ValueError: it has no such method, but an array that may be of single examples.
    """
    opaque = jax.tree_util.all_leaves([predictive])
    if hasattr(predictive, "split"):
        if opaque:
            raise TypeError(
                f"predictive: expected a pytree, because it has a method 'split', got {type(predictive).__name__}: "
                f"register it, for example with jax.tree_util.register_dataclass."
            )
        return predictive.split(number)
    if opaque:
        return predictive, uniform_shares(number)
    for path, leaf in jax.tree_util.tree_leaves_with_path(predictive):
        if jnp.shape(leaf):
            raise ValueError(
                f"predictive: expected, with microbatches={number}, a distribution without arrays or with a method "
                f"split(number) that says which of them belong to which microbatch (see PredictiveDistribution), got "
                f"{type(predictive).__name__} with an array of shape {jnp.shape(leaf)} at {keystr(path)}."
            )
    return stack(predictive, number), uniform_shares(number)


def stack(tree: Any, number: int) -> Any:
    """The same arrays for all parts."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (number, *jnp.shape(x))), tree)


def uniform_shares(number: int) -> jax.Array:
    """1 / number for each part."""
    return as_float(jnp.full(number, 1 / number))


def part_of(parts: Any, index: jax.Array | int) -> Any:
    """The part with this index of stacked parts. Leaves that are not arrays are the same for all parts."""

    def of_leaf(leaf: Any) -> Any:
        is_array = isinstance(leaf, jax.Array | np.ndarray)
        return lax.dynamic_index_in_dim(leaf, index, keepdims=False) if is_array else leaf

    return jax.tree.map(of_leaf, parts)


def accumulate(function: Callable[[jax.Array], tuple[Any, Any]], like: Any, number: int) -> tuple[Any, Any]:
    """sum_j tree_j for j = 0, ..., number - 1, where function(j) = (tree_j, rest_j), and all the rest_j, stacked.

    One j after the other (`jax.lax.scan`), so that only one part is in memory. The sum has the structure, shapes and
    shardings of `like`, and is in float32 or better.
    """

    def body(total: Any, index: jax.Array) -> tuple[Any, Any]:
        tree, rest = function(index)
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, tree), rest

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=float32_or_better(x)), like)
    return lax.scan(body, zeros, jnp.arange(number))


def sum_over_parts(function: Callable[[Any], jax.Array], number: int) -> jax.Array:
    """sum_j function(j), one j after the other, for small results."""
    return function(0) if number == 1 else jnp.sum(lax.map(function, jnp.arange(number)), axis=0)
