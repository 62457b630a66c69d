"""A batch in equal parts, one after the other: what they are, how much each counts, and the sum over them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import keystr

from tnt_optax.dtypes import as_float, float32_or_better


def split(number: int, **trees: Any) -> tuple[Any, ...]:
    """Each tree with its leaves of shape (batch, ...) in the shape (number, batch / number, ...).

    Part j has the examples j, j + number, j + 2 number, ..., so that where a batch is divided among devices each
    part is too.

    Raises:
      ValueError: a leaf without a leading axis, or with another one than the first leaf, or one that `number` does
        not divide; it names the leaf after its tree's keyword.
    """
    leaves = [
        (f"{name}{keystr(path)}", jnp.shape(leaf))
        for name, tree in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    if not leaves:
        raise ValueError(f"{' and '.join(trees)}: expected arrays to be split into {number} microbatches, got none.")
    for name, shape in leaves:
        if not shape:
            raise ValueError(
                f"{name}: expected, with microbatches={number}, a leading axis of the batch, got a scalar. What is the "
                f"same for all examples belongs into the closure of `forward`; a random key has to become one for each "
                f"example, jax.random.split(key, batch_size), of which `forward` may take the first."
            )
        if shape[0] != leaves[0][1][0]:
            raise ValueError(
                f"{name}: unequal microbatches: expected the leading axis of {leaves[0][0]}, {leaves[0][1][0]}, got "
                f"shape {shape}. What is the same for all examples belongs into the closure of `forward`."
            )
    size = leaves[0][1][0]
    if size % number:
        raise ValueError(
            f"{leaves[0][0]}: unequal microbatches: expected a leading axis that microbatches={number} divides, got "
            f"{size}. Drop or pad examples (with Categorical(weights=...) those that are padded don't count)."
        )

    def in_parts(leaf: Any) -> jax.Array:
        shape = jnp.shape(leaf)
        return jnp.swapaxes(jnp.reshape(leaf, (size // number, number, *shape[1:])), 0, 1)

    return tuple(jax.tree.map(in_parts, tree) for tree in trees.values())


def split_distribution(predictive: Any, number: int) -> tuple[Any, jax.Array]:
    """The distribution of every part, stacked on a leading axis of its arrays, and the parts' shares of the loss.

    That is what a method `split(number)` of the distribution says. Without it all parts have the same distribution,
    and count equally. An object that is no pytree holds no arrays that could be stacked: None takes its place.

    Raises:
      TypeError: it has such a method, but is no pytree.
      ValueError: it has no such method, but an array that may be of single examples.
    """
    if jax.tree_util.all_leaves([predictive]):
        if hasattr(predictive, "split"):
            raise TypeError(
                f"predictive: expected a pytree, because it has a method 'split', got {type(predictive).__name__}: "
                f"register it, for example with jax.tree_util.register_dataclass."
            )
        return None, uniform_shares(number)
    if hasattr(predictive, "split"):
        return predictive.split(number)
    for path, leaf in jax.tree_util.tree_leaves_with_path(predictive):
        if jnp.shape(leaf):
            raise ValueError(
                f"predictive: expected, with microbatches={number}, a distribution without arrays or with a method "
                f"split(number) that says which of them belong to which microbatch (see PredictiveDistribution), got "
                f"{type(predictive).__name__} with an array of shape {jnp.shape(leaf)} at {keystr(path)}."
            )
    return stack(predictive, number), uniform_shares(number)


def stack(tree: Any, number: int) -> Any:
    """The same for all parts."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (number, *jnp.shape(x))), tree)


def uniform_shares(number: int) -> jax.Array:
    """1 / number for each part."""
    return as_float(jnp.full(number, 1 / number))


def weighted_sum(function: Callable[[Any], tuple[Any, Any]], like: Any, shares: jax.Array, parts: Any) -> Any:
    """sum_j shares[j] tree_j, where function(parts[j]) = (tree_j, rest_j), and all the rest_j, stacked.

    The parts are gone through one after the other (`jax.lax.scan`): only one of them is in memory. The sum has the
    structure, shapes and shardings of `like`, and is in float32 or better.
    """

    def body(total: Any, xs: tuple[jax.Array, Any]) -> tuple[Any, Any]:
        share, part = xs
        tree, rest = function(part)
        return jax.tree.map(lambda t, x: t + share.astype(t.dtype) * x.astype(t.dtype), total, tree), rest

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=float32_or_better(x)), like)
    return lax.scan(body, zeros, (shares, parts))


def cast_like(like: Any, tree: Any) -> Any:
    """`tree` in the dtypes of `like`."""
    return jax.tree.map(lambda x, y: y.astype(jnp.result_type(x)), like, tree)
