"""Tensor views: the modes of a parameter, as groups of its axes."""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterable

from jax.tree_util import KeyPath, keystr


@dataclasses.dataclass(frozen=True)
class TensorView:
    """The view of a parameter as a tensor of shape (d_1, ..., d_k), or as a stack of such tensors.

    Each axis of the parameter is in one mode, or is a batch axis. Negative axes count from the end.

    Attributes:
      modes: a tuple of axes for each mode i = 1, ..., k. The axes of a tuple are merged, in the given order, into one
        mode of length d_i. By default, a convolution kernel (H, W, I, O) has the modes `((0, 1), (2,), (3,))`. Without
        modes, the slices along the batch axes are scalars (k = 1, d_1 = 1).
      batch_axes: axes that stack independent parameters, such as the layers of an `nn.scan`, or the experts of a
        mixture. Each slice along them is a tensor with its own factors.
      diagonal_modes: indices into `modes`. Only the diagonals of the factors of these modes are kept, as for a mode
        that is longer than `max_dim`. `TensorView(((0,),), diagonal_modes=(0,))` is a diagonal preconditioner of a
        vector.

    Example:
      A kernel of shape (layers, width, heads, head_dim) is a matrix (width, heads * head_dim) for each layer.

      >>> import jax.numpy as jnp, tnt_optax
      >>> view = tnt_optax.TensorView(modes=((1,), (2, 3)), batch_axes=(0,))
      >>> tx = tnt_optax.adaptive_tnt(views=lambda path, shape: view if len(shape) == 4 else None)
      >>> state = tx.init({"query": jnp.zeros((2, 8, 4, 3))})
      >>> [c.shape for c in state[0].contractions["query"]]
      [(2, 8, 8), (2, 12, 12)]
    """

    modes: tuple[tuple[int, ...], ...]
    batch_axes: tuple[int, ...] = ()
    diagonal_modes: tuple[int, ...] = ()


ViewFn = Callable[[KeyPath, tuple[int, ...]], TensorView | None]


def default_view(shape: tuple[int, ...]) -> TensorView:
    """One mode for each axis. With four or more axes (a convolution kernel) all but the last two form one mode."""
    axes = tuple(range(len(shape)))
    if len(shape) >= 4:
        return TensorView((axes[:-2], axes[-2:-1], axes[-1:]))
    return TensorView(tuple((axis,) for axis in axes))


def flax_views(stacked: Iterable[str] = ()) -> ViewFn:
    """Views for the parameters of Flax's own modules, Linen or NNX: `tnt(..., views=flax_views())`.

    - **Attention** (`nn.MultiHeadDotProductAttention`, `nnx.MultiHeadAttention`). Heads and their elements form one
      mode. A query, key or value kernel of shape (width, heads, head_dim) is a matrix (width, heads * head_dim), as in
      a dense layer. The out kernel is a matrix (heads * head_dim, width), and a bias (heads, head_dim) is a vector.
    - **Convolution.** The spatial axes of a kernel form one mode.
    - **Other parameters** have one mode for each axis, as without `views`.

    Attention is recognized by the names query, key, value and out, and by the number of axes. Do not use these names
    for a one-dimensional convolution, or for a dense layer with three axes.

    Args:
      stacked: names of modules, such as ("blocks",), at any depth of a path. Each parameter below them has a leading
        axis that stacks layers (`nn.scan` with `variable_axes={"params": 0}`, `nnx.vmap` with `out_axes=0`), and each
        layer gets its own factors. A name that is in no path has no effect.

    Returns:
      A function `views(path, shape) -> TensorView`. It raises a ValueError for a parameter below `stacked` that has no
      axes.

    Raises:
      TypeError: `stacked` is not an iterable of strings, or it is a string.

    Example:
      >>> import jax.numpy as jnp, tnt_optax
      >>> tx = tnt_optax.adaptive_tnt(views=tnt_optax.flax_views(stacked=("blocks",)))
      >>> state = tx.init({"blocks": {"query": {"kernel": jnp.zeros((2, 8, 4, 3))}}})
      >>> [c.shape for c in state[0].contractions["blocks"]["query"]["kernel"]]
      [(2, 8, 8), (2, 12, 12)]
    """
    names = None if isinstance(stacked, str) or not isinstance(stacked, Iterable) else tuple(stacked)
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(f"stacked: expected names of modules, such as ('blocks',), got {stacked!r}.")

    def views(path: KeyPath, shape: tuple[int, ...]) -> TensorView:
        # DictKey, GetAttrKey and the others alike; a path in an `nnx.State` may end with the attribute `value`.
        parts = [keystr((key,), simple=True) for key in path]
        offset = int(not set(names).isdisjoint(parts))
        if len(shape) < offset:
            raise ValueError(
                f"stacked={names!r}: expected a leading axis of layers in every parameter below, got {keystr(path)} of "
                f"shape {shape}."
            )
        modes = default_view(shape[offset:]).modes
        for pair in itertools.pairwise(parts):
            modes = _ATTENTION.get((*pair, len(shape) - offset), modes)
        return TensorView(tuple(tuple(axis + offset for axis in mode) for mode in modes), tuple(range(offset)))

    return views


_ATTENTION = {  # module, parameter, number of axes
    **{(name, "kernel", 3): ((0,), (1, 2)) for name in ("query", "key", "value")},
    **{(name, "bias", 2): ((0, 1),) for name in ("query", "key", "value")},
    ("out", "kernel", 3): ((0, 1), (2,)),
}


def resolve_view(views: ViewFn | None, path: KeyPath, shape: tuple[int, ...]) -> TensorView:
    """The view of the parameter at `path`, checked, with non-negative axes and indices.

    Raises:
      TypeError: `views` returned something other than a `TensorView` or None.
      ValueError: the view does not name every axis of the parameter exactly once, or names a diagonal mode that does
        not exist.
    """
    chosen = None if views is None else views(path, shape)
    if chosen is None:
        return default_view(shape)
    where = f"views: {chosen} for the parameter {keystr(path) or 'at the root'} of shape {shape}"
    if not isinstance(chosen, TensorView):
        raise TypeError(f"{where}: expected a tnt_optax.TensorView or None, got {type(chosen).__name__}.")
    try:
        modes = tuple(tuple(operator.index(axis) for axis in mode) for mode in chosen.modes)
        batch_axes, diagonal = (tuple(map(operator.index, x)) for x in (chosen.batch_axes, chosen.diagonal_modes))
    except TypeError:
        raise TypeError(
            f"{where}: expected modes to be a tuple of tuples of axes, and batch_axes and diagonal_modes tuples of "
            f"integers, such as TensorView(modes=((0, 1), (2,)), batch_axes=(3,), diagonal_modes=(1,))."
        ) from None
    ndim, order = len(shape), max(len(modes), 1)
    named = [axis for mode in (*modes, batch_axes) for axis in mode]
    covered = all(-ndim <= axis < ndim for axis in named) and sorted(axis % ndim for axis in named) == list(range(ndim))
    if not covered or not all(modes) or not all(-order <= mode < order for mode in diagonal):
        raise ValueError(
            f"{where}: expected each of the {ndim} axes exactly once in modes and batch_axes, no empty mode, and "
            f"diagonal_modes that are indices of the {order} modes, from 0 to {order - 1}."
        )
    return TensorView(
        tuple(tuple(axis % ndim for axis in mode) for mode in modes),
        tuple(axis % ndim for axis in batch_axes),
        tuple(sorted({mode % order for mode in diagonal})),
    )
