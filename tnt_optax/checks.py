"""Errors for bad arguments, raised at trace time. Of a number that is an array, only shape and dtype are checked."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    closed: bool = False,
    schedule: bool = False,
) -> None:
    """A number in (low, high), or with `closed` in [low, high); or an array; or with `schedule` a function."""
    if schedule and callable(value):
        return
    if _is_number(name, value, " or a schedule" if schedule else "") and not (
        low < value < high or (closed and value == low)
    ):
        raise ValueError(f"{name}: expected a number in {'[' if closed else '('}{low}, {high}), got {value}.")


def check_period(name: str, value: Any) -> None:
    """An integer >= 1, or an array of an integer dtype."""
    if _is_number(name, value) and not (isinstance(value, numbers.Integral) and int(value) >= 1):
        raise ValueError(f"{name}: expected an integer >= 1, got {value}.")
    if isinstance(value, jax.Array | np.ndarray) and not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name}: expected an integer >= 1, got an array of {value.dtype}.")


def check_static_period(name: str, value: Any) -> None:
    """An integer >= 1 that is known while tracing."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name}: expected a Python integer, got an array. With optax.inject_hyperparams, name it in static_args."
        )
    check_period(name, value)


def check_flags(**flags: Any) -> None:
    """Each is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r} of type {type(value).__name__}.")


def check_axis_names(name: str, value: Any) -> None:
    """None, the name of an axis, or a tuple of different names."""
    names = value if isinstance(value, tuple) and value else (value,)
    if value is not None and not all(isinstance(axis, str) for axis in names):
        raise TypeError(f"{name}: expected None, the name of an axis, or a tuple of such names, got {value!r}.")
    if len(set(names)) < len(names):
        raise ValueError(f"{name}: expected each axis once, got {value!r}.")


def _is_number(name: str, value: Any, other: str = "") -> bool:
    if isinstance(value, jax.Array | np.ndarray):
        if value.ndim:
            raise TypeError(f"{name}: expected a number{other}, got an array of shape {value.shape}.")
        return False
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number{other}, got {value!r} of type {type(value).__name__}.")
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


def check_key(name: str, value: Any) -> None:
    """A random key, of the new type or of the old one (uint32)."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32):
        got = f"{value!r} of type {type(value).__name__}" if dtype is None else f"an array of {dtype}"
        raise TypeError(f"{name}: expected a random key, such as jax.random.key(0), got {got}.")


def check_scalar(name: str, value: Any) -> jax.Array:
    """A real floating-point number, which is returned as an array without axes."""
    if value is None or not jax.tree_util.all_leaves([value]):
        raise TypeError(f"{name}: expected it to return a scalar, got {type(value).__name__}.")
    if jnp.shape(value):
        raise ValueError(f"{name}: expected it to return a scalar, got an array of shape {jnp.shape(value)}.")
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(f"{name}: expected it to return a real floating-point number, got {jnp.result_type(value)}.")
    return jnp.asarray(value)


def match(name: str, tree: Any, other: Any, other_name: str, *, shapes: bool = True) -> Any:
    """`tree` in the structure of `other`, or an error that names the first paths at which they differ.

    The leaves of `other` have a shape, which is compared with `shapes`. Where it holds None or an `optax.MaskedNode`,
    the part of `tree` is dropped. Where it holds a leaf, `tree` may have a container with one array (a Flax variable).

    Raises:
      ValueError: another structure, or another shape.
      TypeError: a leaf that is not a real floating-point array.
    """
    places, structure = jax.tree_util.tree_flatten_with_path(other, is_leaf=_is_left_out)
    try:
        subtrees = structure.flatten_up_to(tree)
    except (ValueError, TypeError):
        raise ValueError(_difference(name, tree, other, other_name)) from None
    matched = []
    for (path, leaf), subtree in zip(places, subtrees, strict=True):
        arrays = [leaf] if _is_left_out(leaf) else jax.tree.leaves(subtree)
        where = f"{name}{keystr(path)}: expected"
        if len(arrays) != 1:
            raise ValueError(f"{where} one array, as in {other_name}, got {len(arrays)} arrays.")
        if shapes and arrays[0] is not leaf and jnp.shape(arrays[0]) != leaf.shape:
            raise ValueError(f"{where} the shape {leaf.shape} of {other_name}, got {jnp.shape(arrays[0])}.")
        matched += arrays
    result = jax.tree.unflatten(structure, matched)
    check_floating(name, result)
    return result


def fill(name: str, tree: Any, like: Any, like_name: str) -> Any:
    """`tree` in the structure and the dtypes of `like`, with arrays of `like` where it holds None or a `MaskedNode`.

    Where it holds an array, `like` may have a container with one array (a Flax variable).

    Raises:
      ValueError: another structure, or another shape.
    """

    def of_node(path: Any, node: Any, part: Any) -> Any:
        if _is_left_out(node):
            return part
        arrays, structure = jax.tree.flatten(part)
        where = f"{name}{keystr(path)}: expected"
        if len(arrays) != 1:
            raise ValueError(f"{where} {len(arrays)} arrays, as in {like_name}, got one array.")
        if jnp.shape(node) != arrays[0].shape:
            raise ValueError(f"{where} the shape {arrays[0].shape} of {like_name}, got {jnp.shape(node)}.")
        return structure.unflatten([jnp.asarray(node).astype(arrays[0].dtype)])

    places, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_left_out)
    try:
        parts = structure.flatten_up_to(like)
    except (ValueError, TypeError):
        raise ValueError(_difference(name, tree, like, like_name)) from None
    filled = [of_node(path, node, part) for (path, node), part in zip(places, parts, strict=True)]
    return jax.tree.unflatten(structure, filled)


def _is_left_out(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def _difference(name: str, tree: Any, other: Any, other_name: str) -> str:
    flat = jax.tree_util.tree_leaves_with_path(other, is_leaf=_is_left_out)
    expected = {keystr(path) for path, leaf in flat if not _is_left_out(leaf)}
    got = {keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
    first = [f"{name}{min(paths)}" if paths else "none" for paths in (expected - got, got - expected)]
    return (
        f"{name}: expected the structure of {other_name}, got another one. First array that is missing: {first[0]}; "
        f"first that is not expected: {first[1]}; containers: {type(other).__name__}, got {type(tree).__name__}."
    )
