"""Errors for bad arguments, raised at trace time. Numbers that are arrays, traced or not, are not looked at."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import KeyPath, keystr


def check_positive(name: str, value: Any) -> None:
    """A finite number > 0, or an array."""
    if _is_number(name, value) and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}.")


def check_unit_interval(name: str, value: Any) -> None:
    """A number in [0, 1), or an array."""
    if _is_number(name, value) and not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}.")


def check_period(name: str, value: Any) -> None:
    """An integer >= 1, or an array of an integer dtype."""
    if _is_number(name, value) and not (isinstance(value, numbers.Integral) and int(value) >= 1):
        raise ValueError(f"{name}: expected an integer >= 1, got {value}.")
    if isinstance(value, jax.Array | np.ndarray) and not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name}: expected an integer >= 1, got an array of {value.dtype}.")


def _is_number(name: str, value: Any) -> bool:
    if isinstance(value, jax.Array | np.ndarray):
        return False
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r} of type {type(value).__name__}.")
    return True


def check_floating(name: str, tree: Any) -> None:
    """Every leaf has a real floating-point dtype."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            hint = "Give its real and imaginary parts as two parameters." if dtype.kind == "c" else ""
            raise TypeError(f"{name}{keystr(path)}: expected a real floating-point array, got {dtype}. {hint}".strip())


def match(name: str, tree: Any, updates: optax.Updates) -> Any:
    """`tree` in the structure of `updates`, or an error that names the first path at which they differ.

    Where `updates` holds None or an `optax.MaskedNode`, whatever `tree` has is left out; where it holds an array,
    `tree` may have an array in a box of one (a Flax variable).

    Raises:
      ValueError: another structure, or another shape.
      TypeError: a leaf that is not real and floating-point.
    """
    flat_updates, structure = jax.tree_util.tree_flatten_with_path(updates, is_leaf=_is_left_out)
    try:
        subtrees = structure.flatten_up_to(tree)
    except (ValueError, TypeError):
        raise ValueError(_first_difference(name, tree, updates)) from None
    matched = []
    for (path, update), subtree in zip(flat_updates, subtrees, strict=True):
        if _is_left_out(update):
            matched.append(update)
            continue
        leaves = jax.tree.leaves(subtree)
        if len(leaves) != 1:
            raise ValueError(
                f"{name}: expected the structure of the gradients, but {len(leaves)} arrays came at "
                f"{name}{keystr(path)}, where they have one."
            )
        if jnp.shape(leaves[0]) != jnp.shape(update):
            raise ValueError(
                f"{name}{keystr(path)}: expected the gradient's shape {jnp.shape(update)}, got {jnp.shape(leaves[0])}."
            )
        matched.append(leaves[0])
    result = jax.tree.unflatten(structure, matched)
    check_floating(name, result)
    return result


def _is_left_out(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def _first_difference(name: str, tree: Any, updates: Any) -> str:
    places = jax.tree_util.tree_flatten_with_path(updates, is_leaf=_is_left_out)[0]
    got = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

    def begins(path: KeyPath, prefix: KeyPath) -> bool:
        return path[: len(prefix)] == prefix

    message = f"{name}: expected the structure of the gradients"
    for place, update in places:
        if not _is_left_out(update) and not any(begins(path, place) for path in got):
            return f"{message}, but nothing came at {name}{keystr(place)}."
    for path in got:
        if not any(begins(path, place) for place, _ in places):
            return f"{message}, but something came at {name}{keystr(path)}, where they have nothing."
    return f"{message}, {jax.tree.structure(updates)}, got {jax.tree.structure(tree)}."
