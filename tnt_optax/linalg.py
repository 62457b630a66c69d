"""Inverse and eigenvalues of a symmetric matrix, or of a stack of matrices under `jax.vmap`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

_BLOCK = 256  # Triangular matrices up to this size are inverted by LAPACK (or its like), larger ones in blocks.


@jax.custom_jvp
def inverse(matrix: jax.Array) -> jax.Array:
    """The inverse of a symmetric positive definite matrix (d, d); NaN where the matrix is not positive definite.

    `jax.vmap` makes it the inverse of a stack: see `_one_by_one_on_cpu`.
    """
    if len(matrix) == 1:  # A stack of numbers needs no call of LAPACK for each of them.
        return jnp.where(matrix > 0, 1 / matrix, jnp.nan)
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


def eigenvalues(matrix: jax.Array) -> jax.Array:
    """The eigenvalues (d,) of a symmetric matrix (d, d), in ascending order; stacked like `inverse`."""
    return matrix[0] if len(matrix) == 1 else _eigenvalues(matrix)


def _one_by_one_on_cpu(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """`function` of a matrix. Under `jax.vmap`, a loop over the stack on CPU, and a batched call elsewhere.

    Batched LAPACK calls of several sizes in one program can deadlock XLA's CPU backend, also under a `vmap` of the
    user's, so there the matrices go through `function` one by one.
    """
    alone = custom_vmap(function)

    @alone.def_vmap
    def _(axis_size: int, in_batched: list[bool], matrices: jax.Array) -> tuple[jax.Array, bool]:
        del axis_size, in_batched
        results = lax.platform_dependent(matrices, cpu=lambda stack: lax.map(alone, stack), default=jax.vmap(function))
        return results, True

    return alone


def _from_factor(upper: jax.Array) -> tuple[jax.Array, jax.Array]:
    """R^-1 and R^-1 R^-T of a triangular R, mostly by matrix products, which are faster than triangular solves."""
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


_inverse = _one_by_one_on_cpu(_by_cholesky)
_eigenvalues = _one_by_one_on_cpu(lambda matrix: jnp.linalg.eigvalsh(matrix, symmetrize_input=False))
