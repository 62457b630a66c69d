"""The Kronecker factors of one parameter: contractions, Eq. (5), damped inverses, mode products.

The first three functions are what the transformation does with a parameter of any view. Below them is the mathematics
of a single tensor of shape (d_1, ..., d_k), to which the stacking axes of a view come by `jax.vmap`. A matrix of mode i
has the shape (d_i, d_i), or (d_i,) where only its diagonal is kept.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from tnt_optax.modes import Modes, from_tensor, to_tensor

_HIGHEST = lax.Precision.HIGHEST  # These products feed an inverse, or are scaled by 1/damping.


def average_contractions(
    gradient: jax.Array, view: Modes, contractions: tuple[jax.Array, ...], weight: jax.Array
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


def damped_inverses(view: Modes, contractions: tuple[jax.Array, ...], damping: jax.Array) -> tuple[jax.Array, ...]:
    """P_i = (U_i + eps I)^-1, for every mode i."""

    def of_one_tensor(*averages: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(damped_inverse(u, damping.astype(u.dtype)) for u in identify(averages))

    return _over_stack(of_one_tensor, view)(*contractions)


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


def identify(contractions: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Eq. (5): the U_i, all of mean eigenvalue c0, with U_1 x ... x U_k the covariance of the tensor.

    Written as U_i = C_i * c0 * d_i / tr(C_1), which is the same as C_i / (c0^(k-1) prod_{j!=i} d_j) but has no
    intermediate that over- or underflows when C_i and U_i do not. Statistics that are all zero give U_i = 0.
    """
    first = contractions[0]
    trace = jnp.sum(first) if first.ndim == 1 else jnp.trace(first)  # All contractions have the same.
    order, size = len(contractions), max(math.prod(len(c) for c in contractions), 1)
    divisor = jnp.where(trace > 0, trace, 1)
    mean_eigenvalue = divisor ** (1 / order) / size ** (1 / order)  # c0
    scale = jnp.where(trace > 0, mean_eigenvalue / divisor, 0)
    return tuple(c * (scale * len(c)) for c in contractions)


def damped_inverse(factor: jax.Array, damping: jax.Array) -> jax.Array:
    """(U + eps I)^-1, by Cholesky factorization.

    An eps below the rounding errors of a dense U is raised to their size, so that the inverse is finite: to the dtype's
    epsilon times the largest absolute row sum, which bounds U's largest eigenvalue.
    """
    if factor.ndim == 1:
        return 1 / (factor + damping)
    row_sums = jnp.sum(jnp.abs(factor), axis=1)
    damping = jnp.maximum(damping, jnp.finfo(factor.dtype).eps * jnp.max(row_sums, initial=0))
    return _positive_definite_inverse(factor + damping * jnp.eye(len(factor), dtype=factor.dtype))


def mode_products(tensor: jax.Array, matrices: Sequence[jax.Array]) -> jax.Array:
    """tensor x_1 P_1 x_2 ... x_k P_k for symmetric P_i: Eq. (3)."""
    # Each product takes the leading axis away and appends it: after k of them the axes are in order again.
    for matrix in matrices:
        if matrix.ndim == 1:
            tensor = jnp.moveaxis(tensor, 0, -1) * jnp.expand_dims(matrix, range(tensor.ndim - 1))
        else:
            tensor = jnp.tensordot(tensor, matrix, axes=(0, 0), precision=_HIGHEST)
    return tensor


def _cholesky_inverse(matrix: jax.Array) -> jax.Array:
    lower = lax.linalg.cholesky(matrix, symmetrize_input=False)
    return jax.scipy.linalg.cho_solve((lower, True), jnp.eye(len(matrix), dtype=matrix.dtype))


_inverse_one_by_one = custom_vmap(_cholesky_inverse)


@_inverse_one_by_one.def_vmap
def _(axis_size: int, in_batched: list[bool], matrices: jax.Array) -> tuple[jax.Array, bool]:
    # Batched LAPACK calls of several sizes in one program can deadlock XLA's CPU backend, so there one matrix
    # follows the other, also under a `vmap` of the user's; accelerators take them all at once.
    del axis_size, in_batched
    inverses = lax.platform_dependent(
        matrices,
        cpu=lambda m: lax.map(_inverse_one_by_one, m),
        default=jax.vmap(_cholesky_inverse),
    )
    return inverses, True


@jax.custom_jvp
def _positive_definite_inverse(matrix: jax.Array) -> jax.Array:
    return _inverse_one_by_one(matrix)


@_positive_definite_inverse.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # `custom_vmap` has no reverse mode of its own.
    inverse = _positive_definite_inverse(*primals)
    return inverse, -mode_products(*tangents, (inverse, inverse))
