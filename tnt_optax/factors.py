"""The Kronecker factors of a parameter: contractions, Eq. (5), damped inverses, mode products.

The first three functions are what the transformation does with parameters of any view. Below them is the mathematics
of a single tensor of shape (d_1, ..., d_k), to which the stacking axes of a view come by `jax.vmap`. A matrix of mode i
has the shape (d_i, d_i), or (d_i,) where only its diagonal is kept.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tnt_optax.inversion import inverse
from tnt_optax.modes import Modes, from_tensor, to_tensor
from tnt_optax.sharding import AxisNames, over_devices

_HIGHEST = lax.Precision.HIGHEST  # These products feed an inverse, or are scaled by 1/damping.


def average_contractions(
    view: Modes, gradient: jax.Array, contractions: tuple[jax.Array, ...], weight: jax.Array
) -> tuple[jax.Array, ...]:
    """C_i <- (1-w) C_i + w G^(i), for every mode i: the moving average that estimates E[G^(i)]."""

    def of_one_tensor(tensor: jax.Array, *averages: jax.Array) -> tuple[jax.Array, ...]:
        w = weight.astype(tensor.dtype)
        return tuple(
            (1 - w) * average + w * contraction(tensor, mode, diagonal=average.ndim == 1)
            for mode, average in enumerate(averages)
        )

    tensor = to_tensor(gradient.astype(contractions[0].dtype), view)
    return _over_stack(of_one_tensor, view)(tensor, *contractions)


def damped_inverses(
    views: Sequence[Modes],
    contractions: Sequence[tuple[jax.Array, ...]],
    damping: jax.Array,
    axis: AxisNames | None = None,
) -> tuple[list[tuple[jax.Array, ...]], jax.Array]:
    """P_i = (U_i + eps I)^-1, for every mode i of all parameters; and whether all of them are finite.

    Modes of one length go through one program together, so that a model of many equal layers compiles as fast as one
    of few, and an accelerator inverts them side by side. The devices of the mesh axis `axis` divide them among them.
    """
    groups: dict[tuple[tuple[int, ...], Any], list[tuple[int, int, int]]] = {}
    for index, (view, matrices) in enumerate(zip(views, contractions, strict=True)):
        for mode, matrix in enumerate(matrices):
            stacking = len(view.batch)
            count = math.prod(matrix.shape[:stacking])
            groups.setdefault((matrix.shape[stacking:], matrix.dtype), []).append((index, mode, count))

    def stack(members: list[tuple[int, int, int]], shape: tuple[int, ...], dtype: Any) -> tuple[jax.Array, ...]:
        matrices, orders, sizes = [], [], []
        for index, mode, count in members:
            dims = [matrix.shape[-1] for matrix in contractions[index]]
            matrices.append(contractions[index][mode].reshape(count, *shape))
            orders.append(np.full(count, len(dims)))
            sizes.append(np.full(count, max(math.prod(dims), 1), float))
        return jnp.concatenate(matrices), *(jnp.asarray(np.concatenate(x), dtype) for x in (orders, sizes))

    @jax.vmap
    def of_one_mode(average: jax.Array, order: jax.Array, size: jax.Array) -> jax.Array:
        return damped_inverse(identify(average, order, size), damping.astype(average.dtype))

    stacks = [stack(members, *kind) for kind, members in groups.items()]
    costs = [float(shape[0]) ** (3 if len(shape) == 2 else 1) for shape, _ in groups]
    results = over_devices(of_one_mode, stacks, costs, axis)

    inverses, finite = [list(matrices) for matrices in contractions], jnp.bool_(True)
    for members, of_group in zip(groups.values(), results, strict=True):
        diagonals = of_group if of_group.ndim == 2 else jnp.diagonal(of_group, axis1=1, axis2=2)
        finite &= jnp.all(jnp.isfinite(diagonals))  # No element of a positive matrix exceeds those on its diagonal.
        ends = np.cumsum([count for _, _, count in members])
        for (index, mode, _), part in zip(members, jnp.split(of_group, ends[:-1]), strict=True):
            inverses[index][mode] = part.reshape(contractions[index][mode].shape)
    return [tuple(matrices) for matrices in inverses], finite


def precondition(view: Modes, momentum: jax.Array, inverses: tuple[jax.Array, ...]) -> jax.Array:
    """p = m x_1 P_1 ... x_k P_k, in the shape of the parameter."""

    def of_one_tensor(tensor: jax.Array, *matrices: jax.Array) -> jax.Array:
        return mode_products(tensor, matrices)

    direction = _over_stack(of_one_tensor, view)(to_tensor(momentum, view), *inverses)
    return from_tensor(direction, view, momentum.shape)


def _over_stack(function: Callable[..., Any], view: Modes) -> Callable[..., Any]:
    for _ in view.batch:
        function = jax.vmap(function)
    return function


def contraction(tensor: jax.Array, mode: int, *, diagonal: bool) -> jax.Array:
    """G^(i) = mat_i(G) mat_i(G)^T of Eq. (2), or only its diagonal."""
    others = [axis for axis in range(tensor.ndim) if axis != mode]
    if diagonal:
        return jnp.sum(jnp.square(tensor), axis=others)
    return jnp.tensordot(tensor, tensor, axes=(others, others), precision=_HIGHEST)


def identify(contraction: jax.Array, order: jax.typing.ArrayLike, size: jax.typing.ArrayLike) -> jax.Array:
    """Eq. (5): U_i from C_i, of a tensor with k = `order` modes and prod_j d_j = `size` elements.

    All U_i have the mean eigenvalue c0, and U_1 x ... x U_k is the covariance of the tensor. Written as
    U_i = C_i * c0 * d_i / tr(C_i), which is the same as C_i / (c0^(k-1) prod_{j!=i} d_j), because all C_i have the same
    trace, but needs no other C_j, and has no intermediate that over- or underflows when C_i and U_i do not.
    Statistics that are all zero give U_i = 0.
    """
    trace = jnp.sum(contraction if contraction.ndim == 1 else jnp.diagonal(contraction))
    divisor = jnp.where(trace > 0, trace, 1)
    mean_eigenvalue = divisor ** (1 / order) / size ** (1 / order)  # c0
    scale = jnp.where(trace > 0, mean_eigenvalue / divisor, 0)
    return contraction * (scale * len(contraction))


def damped_inverse(factor: jax.Array, damping: jax.Array) -> jax.Array:
    """(U + eps I)^-1.

    An eps below the rounding errors of a dense U is raised to their size, so that the inverse is finite: to the dtype's
    epsilon times the largest absolute row sum, which bounds U's largest eigenvalue.
    """
    if factor.ndim == 1:
        return 1 / (factor + damping)
    row_sums = jnp.sum(jnp.abs(factor), axis=1)
    damping = jnp.maximum(damping, jnp.finfo(factor.dtype).eps * jnp.max(row_sums, initial=0))
    return inverse(factor + damping * jnp.eye(len(factor), dtype=factor.dtype))


def mode_products(tensor: jax.Array, matrices: Sequence[jax.Array]) -> jax.Array:
    """tensor x_1 P_1 x_2 ... x_k P_k for symmetric P_i: Eq. (3)."""
    # Each product takes the leading axis away and appends it: after k of them the axes are in order again.
    for matrix in matrices:
        if matrix.ndim == 1:
            tensor = jnp.moveaxis(tensor, 0, -1) * jnp.expand_dims(matrix, range(tensor.ndim - 1))
        else:
            tensor = jnp.tensordot(tensor, matrix, axes=(0, 0), precision=_HIGHEST)
    return tensor


def equal_parts(contractions: list[tuple[jax.Array, ...]], number: int) -> list[tuple[int, slice]]:
    """Runs of parameters whose inverses cost about the same, with the place 0, ..., number - 1 of each."""
    costs = [sum(float(c.size * c.shape[-1]) for c in matrices) for matrices in contractions]
    before, total = itertools.accumulate(costs[:-1], initial=0.0), sum(costs) or 1.0
    places = [int(number * cost / total) for _, cost in zip(costs, before, strict=False)]
    return [
        (place, slice(places.index(place), places.index(place) + places.count(place))) for place in sorted(set(places))
    ]
