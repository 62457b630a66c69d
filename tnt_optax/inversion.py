"""The inverse of a symmetric positive definite matrix, alone and stacked."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

_BLOCK = 256  # Triangular matrices up to this size are inverted by LAPACK (or its like), larger ones in blocks.


@jax.custom_jvp
def inverse(matrix: jax.Array) -> jax.Array:
    """The inverse of a symmetric positive definite matrix (d, d); all NaN where it is not positive definite.

    `jax.vmap` makes it the inverse of a stack: one by one on CPU, side by side elsewhere.
    """
    return _inverse(matrix)


@inverse.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    # `custom_vmap` has no reverse mode of its own.
    result = inverse(*primals)
    return result, -_matmul(_matmul(result, *tangents), result)


def _by_cholesky(matrix: jax.Array) -> jax.Array:
    # LAPACK stores by columns: the transpose saves a symmetric matrix from being copied.
    upper = lax.linalg.cholesky(matrix.mT, symmetrize_input=False).mT
    return _from_factor(upper)[1]


_inverse = custom_vmap(_by_cholesky)


@_inverse.def_vmap
def _(axis_size: int, in_batched: list[bool], matrices: jax.Array) -> tuple[jax.Array, bool]:
    # Batched LAPACK calls of several sizes in one program can deadlock XLA's CPU backend, so there one matrix
    # follows the other, also under a `vmap` of the user's.
    del axis_size, in_batched
    inverses = lax.platform_dependent(
        matrices, cpu=lambda stack: lax.map(_inverse, stack), default=jax.vmap(_by_cholesky)
    )
    return inverses, True


def _from_factor(upper: jax.Array) -> tuple[jax.Array, jax.Array]:
    """R^-1 and R^-1 R^-T of a triangular R, for the most part by matrix products, which are the faster."""
    d = len(upper)
    if d <= _BLOCK:
        eye = jnp.eye(d, dtype=upper.dtype)
        solved = lax.linalg.triangular_solve(upper, eye, left_side=True, lower=False)
        return solved, _matmul(solved, solved.mT)
    half = d // 2
    first, first_product = _from_factor(upper[:half, :half])
    second, second_product = _from_factor(upper[half:, half:])
    corner = -_matmul(first, _matmul(upper[:half, half:], second))
    corner_product = _matmul(corner, second.mT)
    return (
        jnp.block([[first, corner], [jnp.zeros((d - half, half), upper.dtype), second]]),
        jnp.block([[first_product + _matmul(corner, corner.mT), corner_product], [corner_product.mT, second_product]]),
    )


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
