"""Errors for bad arguments, raised at trace time. Of numbers that come as arrays only shape and dtype are looked at."""

import math
import numbers
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import KeyPath, Partial, keystr


def check_finite(name: str, value: Any) -> None:
    """A finite number, or an array."""
    if _is_number(name, value) and not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}.")


def check_positive(name: str, value: Any) -> None:
    """A finite number > 0, or an array."""
    if _is_number(name, value) and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}.")


def check_not_negative(name: str, value: Any) -> None:
    """A finite number >= 0, or an array."""
    if _is_number(name, value) and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}.")


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


def check_axis_names(name: str, value: Any) -> None:
    """None, the name of a mesh axis, or a tuple of different names."""
    names = value if isinstance(value, tuple) and value else (value,)
    if value is not None and not all(isinstance(axis, str) for axis in names):
        raise TypeError(f"{name}: expected None, the name of a mesh axis, or a tuple of such names, got {value!r}.")
    if len(set(names)) < len(names):
        raise ValueError(f"{name}: expected each mesh axis once, got {value!r}.")


def _is_number(name: str, value: Any) -> bool:
    if isinstance(value, jax.Array | np.ndarray):
        if value.ndim:
            raise TypeError(f"{name}: expected a number, got an array of shape {value.shape}.")
        return False
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r} of type {type(value).__name__}.")
    return True


def check_floating(name: str, tree: Any) -> None:
    """Every leaf is an array of a real floating-point dtype."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        where = f"{name}{keystr(path)}: expected a real floating-point array, got"
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"{where} {leaf!r} of type {type(leaf).__name__}.")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            complex_ = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
            hint = " Give its real and imaginary parts as two parameters." if complex_ else ""
            raise TypeError(f"{where} {leaf.dtype}.{hint}")


def is_function(sampled_grads: Any) -> TypeGuard[Callable[[], Any]]:
    """Whether it is a function that returns a tree, and not a tree that can be called, such as a module."""
    return callable(sampled_grads) and (isinstance(sampled_grads, Partial) or jax.tree_util.all_leaves([sampled_grads]))


def match(name: str, tree: Any, other: Any, other_name: str) -> Any:
    """`tree` in the structure of `other`, or an error that names the first path at which they differ.

    Where `other` holds None or an `optax.MaskedNode`, whatever `tree` has is left out; where it holds an array,
    `tree` may have an array in a box of one (a Flax variable).

    Raises:
      ValueError: another structure, or another shape.
      TypeError: a leaf that is not a real floating-point array.
    """
    places, structure = jax.tree_util.tree_flatten_with_path(other, is_leaf=_is_left_out)
    try:
        subtrees = structure.flatten_up_to(tree)
    except (ValueError, TypeError):
        raise ValueError(_first_difference(name, tree, other, other_name)) from None
    matched = []
    for (path, array), subtree in zip(places, subtrees, strict=True):
        if _is_left_out(array):
            matched.append(array)
            continue
        leaves = jax.tree.leaves(subtree)
        if len(leaves) != 1:
            raise ValueError(
                f"{name}: expected the structure of {other_name}, but {len(leaves)} arrays came at "
                f"{name}{keystr(path)}, where there is one in it."
            )
        if jnp.shape(leaves[0]) != jnp.shape(array):
            raise ValueError(
                f"{name}{keystr(path)}: expected the shape {jnp.shape(array)} of {other_name}, "
                f"got {jnp.shape(leaves[0])}."
            )
        matched.append(leaves[0])
    result = jax.tree.unflatten(structure, matched)
    check_floating(name, result)
    return result


def _is_left_out(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def _first_difference(name: str, tree: Any, other: Any, other_name: str) -> str:
    places = jax.tree_util.tree_flatten_with_path(other, is_leaf=_is_left_out)[0]
    got = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

    def begins(path: KeyPath, prefix: KeyPath) -> bool:
        return path[: len(prefix)] == prefix

    message = f"{name}: expected the structure of {other_name}"
    for place, array in places:
        if not _is_left_out(array) and not any(begins(path, place) for path in got):
            return f"{message}, but nothing came at {name}{keystr(place)}."
    for path in got:
        if not any(begins(path, place) for place, _ in places):
            return f"{message}, but something came at {name}{keystr(path)}, where there is nothing in it."
    return f"{message}, {jax.tree.structure(other)}, got {jax.tree.structure(tree)}."
