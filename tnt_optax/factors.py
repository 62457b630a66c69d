"""Kronecker factors of one tensor: contractions, Eq. (5), damped inverses, mode products.

Everything here is about a single tensor of shape (d_1, ..., d_k). Each mode has one factor, `Dense` or `Diagonal`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from tnt_optax import linalg

_HIGHEST = lax.Precision.HIGHEST  # These products feed an inverse, or are scaled by 1/damping.


@dataclasses.dataclass(frozen=True)
class Dense:
    """How the factor of a mode of length d is stored and used: as a matrix (d, d). Instances hold no arrays."""

    def shape(self, d: int) -> tuple[int, ...]:
        """The shape of the array that holds a factor."""
        return (d, d)

    def contraction(self, tensor: jax.Array, mode: int) -> jax.Array:
        """G_(i) = mat_i(G) mat_i(G)^T of Eq. (2)."""
        others = _other_axes(tensor, mode)
        return jnp.tensordot(tensor, tensor, axes=(others, others), precision=_HIGHEST)

    def trace(self, matrix: jax.Array) -> jax.Array:
        """The sum of the diagonal, a scalar."""
        return jnp.sum(jnp.diagonal(matrix))  # `jnp.trace` makes a pass over the whole matrix.

    def inverse(self, matrix: jax.Array, damping: jax.Array) -> jax.Array:
        """(U + eps I)^-1.

        An eps below the rounding errors of U is raised to their size, so that the inverse is finite: to the dtype's
        epsilon times the largest absolute row sum, which bounds U's largest eigenvalue.
        """
        row_sums = jnp.sum(jnp.abs(matrix), axis=1)
        damping = jnp.maximum(damping, jnp.finfo(matrix.dtype).eps * jnp.max(row_sums, initial=0))
        return linalg.inverse(matrix + damping * jnp.eye(len(matrix), dtype=matrix.dtype))

    def product(self, tensor: jax.Array, matrix: jax.Array) -> jax.Array:
        """The product of a symmetric matrix with the leading axis of a tensor, which becomes the last axis."""
        return jnp.tensordot(tensor, matrix, axes=(0, 0), precision=_HIGHEST)

    def spectrum(self, matrix: jax.Array) -> jax.Array:
        """The eigenvalues (d,), ascending; those below the rounding errors d * epsilon * (largest eigenvalue) are 0."""
        values = linalg.eigenvalues(matrix)
        rounding = len(matrix) * jnp.finfo(matrix.dtype).eps * values[-1]
        return jnp.where(values > rounding, values, 0)

    def inverse_cost(self, d: int) -> float:
        """The number of operations of an inverse, up to a constant."""
        return float(d) ** 3


@dataclasses.dataclass(frozen=True)
class Diagonal:
    """The same interface as `Dense` for a factor of which only the diagonal (d,) is kept; the rest counts as 0."""

    def shape(self, d: int) -> tuple[int, ...]:
        return (d,)

    def contraction(self, tensor: jax.Array, mode: int) -> jax.Array:
        return jnp.sum(jnp.square(tensor), axis=_other_axes(tensor, mode))

    def trace(self, matrix: jax.Array) -> jax.Array:
        return jnp.sum(matrix)

    def inverse(self, matrix: jax.Array, damping: jax.Array) -> jax.Array:
        return 1 / (matrix + damping)

    def product(self, tensor: jax.Array, matrix: jax.Array) -> jax.Array:
        return jnp.moveaxis(tensor, 0, -1) * jnp.expand_dims(matrix, range(tensor.ndim - 1))

    def spectrum(self, matrix: jax.Array) -> jax.Array:
        return jnp.sort(matrix)

    def inverse_cost(self, d: int) -> float:
        return float(d)


Factor = Dense | Diagonal


def normalize_factor(
    factor: Factor, contraction: jax.Array, order: jax.typing.ArrayLike, size: jax.typing.ArrayLike
) -> jax.Array:
    """Eq. (5): U_i from C_i, for a tensor with k = `order` modes and prod_j d_j = `size` elements.

    All U_i have the mean eigenvalue c0 = (tr C_i / size)^(1/k), and U_1 x ... x U_k is the covariance of the tensor.
    This is written as U_i = C_i * c0 * d_i / tr C_i. It equals C_i / (c0^(k-1) prod_{j != i} d_j), because all C_i
    have the same trace, but needs no other C_j and has no intermediate that over- or underflows where C_i and U_i do
    not. Statistics that are all zero give U_i = 0.
    """
    trace = factor.trace(contraction)
    divisor = jnp.where(trace > 0, trace, 1)
    mean_eigenvalue = divisor ** (1 / order) / size ** (1 / order)  # c0
    scale = jnp.where(trace > 0, mean_eigenvalue / divisor, 0)
    return contraction * (scale * len(contraction))


def mode_products(factors: Sequence[Factor], tensor: jax.Array, matrices: Sequence[jax.Array]) -> jax.Array:
    """The tensor x_1 P_1 x_2 ... x_k P_k for symmetric P_i: Eq. (3)."""
    # Each product moves the leading axis to the end: after k of them the axes are in order again.
    for factor, matrix in zip(factors, matrices, strict=True):
        tensor = factor.product(tensor, matrix)
    return tensor


def _other_axes(tensor: jax.Array, mode: int) -> list[int]:
    return [axis for axis in range(tensor.ndim) if axis != mode]
