"""How a parameter is viewed as a tensor: which of its axes form which mode."""

import dataclasses
import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath, keystr


@dataclasses.dataclass(frozen=True)
class Modes:
    """The view of one parameter as a (stack of) tensors of shape (d_1, ..., d_k).

    Attributes:
      groups: one tuple of axes for each mode i = 1, ..., k; its axes are merged, in the order given, into one
        mode of length d_i. A convolution kernel (H, W, I, O) is by default `((0, 1), (2,), (3,))`.
      batch: axes that only stack independent parameters (the layers of an `nn.scan`, the experts of a
        mixture). Each slice along them is a tensor with factors of its own.

    Every axis of the parameter stands in exactly one place. Negative axes count from the end. Without any
    groups, the slices are scalars (k = 1, d_1 = 1).
    """

    groups: tuple[tuple[int, ...], ...]
    batch: tuple[int, ...] = ()


ModesFn = Callable[[KeyPath, tuple[int, ...]], Modes | None]


def default_modes(shape: tuple[int, ...]) -> Modes:
    """One mode an axis; with four or more axes, a convolution kernel whose leading, spatial axes are one."""
    axes = tuple(range(len(shape)))
    if len(shape) >= 4:
        return Modes((axes[:-2], axes[-2:-1], axes[-1:]))
    return Modes(tuple((axis,) for axis in axes))


def resolve(modes: ModesFn | None, path: KeyPath, shape: tuple[int, ...]) -> Modes:
    """The `Modes` of the parameter at `path`, with its axes checked and made non-negative.

    Raises:
      TypeError: `modes` returned something other than a `Modes` or None.
      ValueError: the `Modes` don't name every axis of the parameter exactly once.
    """
    chosen = None if modes is None else modes(path, shape)
    if chosen is None:
        return default_modes(shape)
    where = f"modes={chosen} for the parameter {keystr(path) or 'at the root'} of shape {shape}"
    if not isinstance(chosen, Modes):
        raise TypeError(f"{where}: expected a tnt_optax.Modes or None, got {type(chosen).__name__}.")
    try:
        groups = tuple(tuple(operator.index(axis) for axis in group) for group in chosen.groups)
        batch = tuple(operator.index(axis) for axis in chosen.batch)
    except TypeError:
        raise TypeError(
            f"{where}: expected groups to be a tuple of tuples of axes and batch a tuple of axes, "
            f"such as Modes(groups=((0, 1), (2,)), batch=(3,))."
        ) from None
    ndim = len(shape)
    named = [axis for group in (*groups, batch) for axis in group]
    covered = all(-ndim <= axis < ndim for axis in named) and sorted(axis % ndim for axis in named) == list(range(ndim))
    if not covered or not all(groups):
        raise ValueError(
            f"{where}: expected each of the {ndim} axes exactly once in groups and batch, and no empty group, got the "
            f"axes {named}."
        )
    return Modes(tuple(tuple(axis % ndim for axis in group) for group in groups), tuple(axis % ndim for axis in batch))


def batch_shape(modes: Modes, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The lengths of the stacking axes."""
    return tuple(shape[axis] for axis in modes.batch)


def mode_dims(modes: Modes, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(d_1, ..., d_k), with k >= 1: a scalar has the shape (1,)."""
    return tuple(math.prod(shape[axis] for axis in group) for group in modes.groups) or (1,)


def to_tensor(x: jax.Array, modes: Modes) -> jax.Array:
    """`x` as an array of shape (*batch_shape, d_1, ..., d_k)."""
    order = (*modes.batch, *(axis for group in modes.groups for axis in group))
    return jnp.transpose(x, order).reshape(batch_shape(modes, x.shape) + mode_dims(modes, x.shape))


def from_tensor(tensor: jax.Array, modes: Modes, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `to_tensor`, for a parameter of shape `shape`."""
    order = (*modes.batch, *(axis for group in modes.groups for axis in group))
    back = sorted(range(len(order)), key=order.__getitem__)
    return jnp.transpose(tensor.reshape(tuple(shape[axis] for axis in order)), back)
