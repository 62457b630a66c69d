"""How a parameter is viewed as a tensor: which of its axes form which mode."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterable

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


def flax_modes(stacked: Iterable[str] = ()) -> ModesFn:
    """Views for the parameters of Flax's own modules, Linen or NNX: `tnt(..., modes=flax_modes())`.

    In attention (`nn.MultiHeadDotProductAttention`, `nnx.MultiHeadAttention`) heads and their elements are one mode: a
    query, key or value kernel (width, heads, head_dim) is a matrix (width, heads * head_dim), as that of a dense layer,
    the out kernel (heads * head_dim, width), and a bias (heads, head_dim) a vector. A convolution kernel has its
    spatial axes merged, and every other parameter one mode an axis, as without `modes`. (Attention is told by these
    names and the number of axes: do not give them to a convolution over one axis, or to a dense layer of three.)

    Args:
      stacked: names of modules, such as ("blocks",), wherever in a path they stand. Every parameter below them has a
        leading axis that stacks layers (`nn.scan` with `variable_axes={"params": 0}`, `nnx.vmap` with `out_axes=0`),
        and each layer gets factors of its own. What is not a name in any path has no effect.

    Returns:
      `modes(path, shape) -> Modes`. It raises a ValueError for a parameter below `stacked` that has no axes.

    Raises:
      TypeError: `stacked` is not an iterable of strings, or is a string itself.
    """
    names = None if isinstance(stacked, str) or not isinstance(stacked, Iterable) else tuple(stacked)
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(f"stacked: expected names of modules, such as ('blocks',), got {stacked!r}.")

    def modes(path: KeyPath, shape: tuple[int, ...]) -> Modes:
        # DictKey, GetAttrKey and the others alike; a path in an `nnx.State` may end with the attribute `value`.
        parts = [keystr((key,), simple=True) for key in path]
        offset = int(not set(names).isdisjoint(parts))
        if len(shape) < offset:
            raise ValueError(
                f"stacked={names!r}: expected a leading axis of layers in every parameter below, got {keystr(path)} of "
                f"shape {shape}."
            )
        groups = default_modes(shape[offset:]).groups
        for pair in itertools.pairwise(parts):
            groups = _ATTENTION.get((*pair, len(shape) - offset), groups)
        return Modes(tuple(tuple(axis + offset for axis in group) for group in groups), tuple(range(offset)))

    return modes


_ATTENTION = {  # module, parameter, number of axes
    **{(name, "kernel", 3): ((0,), (1, 2)) for name in ("query", "key", "value")},
    **{(name, "bias", 2): ((0, 1),) for name in ("query", "key", "value")},
    ("out", "kernel", 3): ((0, 1), (2,)),
}


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
