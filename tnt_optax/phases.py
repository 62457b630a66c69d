"""The phases of a step in the notation of Algorithm 3: absorb, refresh, accumulate, precondition, bound, guard.

Every phase takes a tree of `Block`s, which is what is static about the parameters. On a mesh, results are sharded as
the state is.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from tnt_optax import checks, factors, numerics, sharding
from tnt_optax.blocks import Block, equal_parts, map_normalized_factors
from tnt_optax.factors import Factor
from tnt_optax.numerics import all_finite, as_float, as_int32, cond, count_events
from tnt_optax.options import Options
from tnt_optax.sampled_grad import is_function
from tnt_optax.state import TNTState


def absorb(
    blocks: Any, state: TNTState, sampled_grads: Any, *, due: bool | jax.Array, decay: jax.typing.ArrayLike = 1.0
) -> TNTState:
    """Updates the statistics, if due: C_i <- (1-w) C_i + w G_(i), w = max(1-decay, 1/(n+1)).

    A sampled gradient that is not finite is rejected as a whole.

    Args:
      blocks: the parameters.
      state: n and the C_i.
      sampled_grads: G, a tree like the blocks, or a function that returns it and is called only if due.
      due: whether the statistics are updated in this step.
      decay: beta. With 1, the C_i are the plain mean over all sampled gradients.
    """
    n = state.statistics_count
    weight = jnp.maximum(1 - as_float(decay), 1 / as_float(n + 1))

    def of_block(block: Block, gradient: jax.Array, contractions: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        average = sharding.with_shardings_like(contractions, functools.partial(_average, block))
        return average(contractions, gradient, weight)

    def update() -> tuple[Any, jax.Array]:
        tree = sampled_grads() if is_function(sampled_grads) else sampled_grads
        tree = checks.match("sampled_grads", tree, blocks, "the gradients")
        # The trace of a parameter's contractions, which bounds all of their elements.
        traces = jax.tree.map(lambda g: jnp.sum(jnp.square(g.astype(numerics.float32_or_better(g)))), tree)
        finite = all_finite(traces)
        new = jax.tree.map(of_block, blocks, tree, state.contractions)
        return optax.tree.where(finite & due, new, state.contractions), finite

    contractions, finite = cond(due, update, lambda: (state.contractions, jnp.bool_(True)))
    return state._replace(
        contractions=contractions,
        statistics_count=jnp.where(finite & due, optax.safe_increment(n), n),
        rejected_sampled_gradients=count_events(state.rejected_sampled_gradients, ~finite & due),
    )


def statistics_due(options: Options, t: jax.Array) -> bool | jax.Array:
    """Whether the statistics are updated in step t: t % T1 == 0."""
    return _is_due(t, options.statistics_period)


def inverses_due(options: Options, t: jax.Array) -> list[bool | jax.Array]:
    """Whether the inverses are updated in step t, for each part: t % T2 == 0, or t < T2 and t % T1 == 0.

    With several parts, part i is updated i/parts of a period later.
    """
    parts, period = options.inverse_parts or 1, as_int32(options.inverse_period)
    early = (t < period) & statistics_due(options, t)
    regular = [_is_due(t - part * period // parts, options.inverse_period) for part in range(parts)]
    return [True if now is True else now | early for now in regular]


def refresh(options: Options, blocks: Any, state: TNTState, *, due: list[bool | jax.Array]) -> TNTState:
    """Updates the inverses of the parts that are due: P_i = (U_i + eps I)^-1, with U_i from Eq. (5).

    Nothing is updated before there are statistics. Inverses that are not finite are rejected, for each tensor alone.
    """
    leaves, structure = jax.tree.flatten(blocks)
    contractions, inverses, refreshed_at = (
        structure.flatten_up_to(tree) for tree in (state.contractions, state.inverses, state.refreshed_at)
    )
    damping, rejected = numerics.evaluate_schedule(options.damping, state.count), state.rejected_inverses
    damping = jnp.where(damping > 0, damping, jnp.nan)  # A schedule may be at fault: then all inverses are rejected.
    for part, now in zip(equal_parts(leaves, len(due)), due, strict=True):
        if not leaves[part]:
            continue
        old = inverses[part], refreshed_at[part], rejected
        allowed = now & (state.statistics_count > 0)

        def update(part: slice = part, old: Any = old, allowed: jax.Array = allowed) -> Any:
            refresh_part = functools.partial(_refresh_part, leaves[part], options.inverse_axis)
            refresh_part = sharding.with_shardings_like(old, refresh_part)
            return refresh_part(contractions[part], damping, state.count, allowed, old)

        inverses[part], refreshed_at[part], rejected = cond(now, update, lambda old=old: old)
    any_due = functools.reduce(jnp.logical_or, due) & (state.statistics_count > 0)
    return state._replace(
        inverses=structure.unflatten(inverses),
        refreshed_at=structure.unflatten(refreshed_at),
        damping=jnp.where(any_due & jnp.isfinite(damping), damping, state.damping),
        rejected_inverses=rejected,
    )


def accumulate(options: Options, momentum: Any, gradients: Any) -> Any:
    """m <- mu m + g in float32 or better; without momentum, g."""
    if options.momentum is None:
        return numerics.widen(gradients)
    mu = as_float(options.momentum)
    return jax.tree.map(lambda m, g: mu.astype(m.dtype) * m + g.astype(m.dtype), momentum, gradients)


def precondition(blocks: Any, inverses: Any, momentum: Any) -> Any:
    """The direction p = m x_1 P_1 x_2 ... x_k P_k of every parameter, in its shape."""

    def of_block(block: Block, m: jax.Array, matrices: tuple[jax.Array, ...]) -> jax.Array:
        products = block.over_batch(functools.partial(factors.mode_products, block.factors))

        def in_its_shape(m: jax.Array, matrices: tuple[jax.Array, ...]) -> jax.Array:
            return block.from_tensor(products(block.to_tensor(m.astype(matrices[0].dtype)), matrices))

        return sharding.with_shardings_like(m, in_its_shape)(m, matrices)

    return jax.tree.map(of_block, blocks, momentum, inverses)


def bound(options: Options, direction: Any, momentum: Any, t: jax.Array) -> tuple[Any, jax.Array]:
    """The trust region: p, shortened to the radius r where <p, m> > r^2, and whether it was shortened.

    <p, m> = <p, F p> is the squared norm of p in the metric of the damped factors F = (U_1 + eps I) x ... x (U_k + eps
    I) of all parameters.
    """
    if options.trust_radius is None:
        return direction, jnp.bool_(False)
    radius = numerics.evaluate_schedule(options.trust_radius, t)
    products = jax.tree.map(lambda p, m: as_float(jnp.sum(p * m)), direction, momentum)
    # Not below 0, whatever the rounding errors. For the stack, see `all_finite`.
    squared_norm = jnp.sum(jnp.maximum(jnp.stack([as_float(0.0), *jax.tree.leaves(products)]), 0))
    exceeds = ~(squared_norm <= jnp.square(radius))  # Also where a schedule returns NaN.
    scale = jnp.where(exceeds, jnp.abs(radius) * lax.rsqrt(squared_norm), 1)
    # The scale is undefined on overflow: NaN triggers the rejection of the step.
    scale = jnp.where(jnp.isfinite(squared_norm), scale, jnp.nan)
    return jax.tree.map(lambda p: scale.astype(p.dtype) * p, direction), exceeds


def guard(gradients: Any, updates: Any, before: TNTState, after: TNTState) -> tuple[optax.Updates, TNTState]:
    """The updates in the gradients' dtypes, and the state after the step.

    A step that is not finite is rejected as a whole: its update is zero, and the momentum keeps its value. So is the
    update before there are statistics.
    """
    updates = optax.tree.cast_like(updates, gradients)
    # What is not finite in the gradient or the momentum is not finite in the updates either.
    finite = all_finite(updates)
    state = after._replace(
        momentum=optax.tree.where(finite, after.momentum, before.momentum),
        bounded_steps=jnp.where(finite, after.bounded_steps, before.bounded_steps),
        rejected_gradients=count_events(before.rejected_gradients, ~finite),
    )
    moves = finite & (after.statistics_count > 0)
    return optax.tree.where(moves, updates, optax.tree.zeros_like(updates)), state


def _average(
    block: Block, contractions: tuple[jax.Array, ...], gradient: jax.Array, weight: jax.Array
) -> tuple[jax.Array, ...]:
    def of_one_tensor(tensor: jax.Array, averages: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w = weight.astype(tensor.dtype)
        modes = enumerate(zip(block.factors, averages, strict=True))
        return tuple((1 - w) * c + w * factor.contraction(tensor, mode) for mode, (factor, c) in modes)

    tensor = block.to_tensor(gradient.astype(contractions[0].dtype))
    return block.over_batch(of_one_tensor)(tensor, contractions)


def damped_inverses(
    blocks: list[Block], contractions: list[Any], damping: jax.Array, *, axis: sharding.AxisNames | None
) -> list[tuple[tuple[jax.Array, jax.Array], ...]]:
    """For every mode of all blocks P_i = (U_i + eps I)^-1 and its trace, which is finite only if P_i is.

    The devices of the mesh axis `axis` divide the work among them.
    """

    def invert(factor: Factor, matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        inverse = factor.inverse(matrix, damping.astype(matrix.dtype))
        # No element of a positive definite matrix exceeds those on its diagonal.
        return inverse, factor.trace(inverse)

    return map_normalized_factors(invert, blocks, contractions, axis=axis)


def _refresh_part(
    blocks: list[Block], axis: Any, contractions: list[Any], damping: Any, t: jax.Array, allowed: jax.Array, old: Any
) -> tuple[list[Any], list[jax.Array], jax.Array]:
    """`old`, which is (inverses, refreshed_at, rejected), updated where new inverses are allowed and finite."""
    new = damped_inverses(blocks, contractions, damping, axis=axis)
    # One number for each tensor. Without the barrier, XLA would compute them again in every consumer.
    traces = lax.optimization_barrier([sum(trace for _, trace in modes) for modes in new])
    inverses, times = [], []
    for modes, trace, old_inverses, old_time in zip(new, traces, *old[:2], strict=True):
        accepted = jnp.isfinite(trace) & allowed
        take = [jnp.expand_dims(accepted, range(accepted.ndim, inverse.ndim)) for inverse, _ in modes]
        inverses.append(tuple(map(jnp.where, take, [inverse for inverse, _ in modes], old_inverses)))
        times.append(jnp.where(accepted, t, old_time))
    finite = jnp.isfinite(jnp.concatenate([jnp.ravel(as_float(trace)) for trace in traces]))
    return inverses, times, count_events(old[2], ~finite & allowed)


def _is_due(t: jax.Array, period: int | jax.Array) -> bool | jax.Array:
    # What is due in every step is known while tracing, and needs no conditional.
    return True if isinstance(period, int) and period == 1 else t % as_int32(period) == 0
