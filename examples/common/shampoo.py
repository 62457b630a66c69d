"""Shampoo (Gupta, Koren & Singer, 2018), plain: a baseline for TNT, with the same momentum and update periods."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax


class ShampooState(NamedTuple):
    """Step, momentum, and for every mode of every parameter the statistics and their cached inverse root."""

    count: jax.Array
    momentum: Any
    statistics: Any
    roots: Any


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    damping: float = 1e-4,
    decay: float = 0.9,
    momentum: float = 0.9,
    statistics_period: int = 1,
    inverse_period: int = 20,
) -> optax.GradientTransformation:
    """W <- W - learning_rate * m x_1 (L_1 + eps I)^(-1/2k) ... x_k (L_k + eps I)^(-1/2k).

    Args:
      learning_rate: a number or a schedule.
      damping: eps.
      decay: of the moving averages L_i of mat_i(g) mat_i(g)^T, g being the gradient itself.
      momentum: accumulated before preconditioning, not dampened.
      statistics_period: every how many steps the averages absorb a gradient.
      inverse_period: every how many steps the roots are computed; in the first of these periods with every gradient
        that is absorbed, as TNT does.
    """

    def init(params: optax.Params) -> ShampooState:
        statistics = jax.tree.map(lambda w: [jnp.zeros((d, d)) for d in _view(w).shape], params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return ShampooState(jnp.zeros([], jnp.int32), zeros, statistics, jax.tree.map(jnp.zeros_like, statistics))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        grads, t = updates, state.count
        weight = jnp.maximum(1 - decay, 1 / (t // statistics_period + 1))

        def absorb(g: jax.Array, averages: list[jax.Array]) -> list[jax.Array]:
            unfolded = [jnp.moveaxis(_view(g), i, 0).reshape(len(c), -1) for i, c in enumerate(averages)]
            return [(1 - weight) * c + weight * u @ u.T for u, c in zip(unfolded, averages, strict=True)]

        absorb_now = t % statistics_period == 0
        refresh_now = (t % inverse_period == 0) | (absorb_now & (t < inverse_period))
        statistics = lax.cond(
            absorb_now, lambda: jax.tree.map(absorb, grads, state.statistics), lambda: state.statistics
        )

        def refresh() -> Any:
            return jax.tree.map(
                lambda g, averages: [inverse_root(c + damping * jnp.eye(len(c)), 2 * len(averages)) for c in averages],
                grads,
                statistics,
            )

        roots = lax.cond(refresh_now, refresh, lambda: state.roots)
        velocity = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, grads)

        def precondition(m: jax.Array, matrices: list[jax.Array]) -> jax.Array:
            direction = _view(m)
            for matrix in matrices:  # Each product moves its mode to the end: after all of them they are in order.
                direction = jnp.tensordot(direction, matrix, axes=(0, 0))
            return direction.reshape(m.shape)

        direction = jax.tree.map(precondition, velocity, roots)
        return direction, ShampooState(jnp.asarray(optax.safe_increment(t)), velocity, statistics, roots)

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate))


def inverse_root(matrix: jax.Array, p: int) -> jax.Array:
    """A^(-1/p) of a symmetric positive definite matrix, by the coupled Newton iteration (Guo & Higham, 2006).

    X_0 = z^(1/p) I, M_0 = z A, T = ((p+1) I - M) / p, X <- X T, M <- T^p M, until M is the identity; the factor z
    puts the eigenvalues of M_0 below p + 1.
    """
    eye = jnp.eye(len(matrix), dtype=matrix.dtype)
    z = (1 + p) / (2 * jnp.linalg.norm(matrix))

    def iterate(carry: Any) -> Any:
        count, x, m, _ = carry
        t = ((p + 1) * eye - m) / p
        x, m = x @ t, jnp.linalg.matrix_power(t, p) @ m
        return count + 1, x, m, jnp.max(jnp.abs(m - eye))

    def unfinished(carry: Any) -> jax.Array:
        return (carry[0] < 100) & (carry[3] > 1e-5)

    start = (jnp.int32(0), z ** (1 / p) * eye, z * matrix, jnp.asarray(jnp.inf, matrix.dtype))
    return lax.while_loop(unfinished, iterate, start)[1]


def _view(w: jax.Array) -> jax.Array:
    """As TNT: the leading axes of a convolution kernel are one mode, and a scalar is a vector."""
    return w.reshape(-1, *w.shape[-2:]) if w.ndim >= 4 else jnp.atleast_1d(w)
