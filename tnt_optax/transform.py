"""Tensor Normal Training as an Optax gradient transformation: momentum and preconditioner of Algorithm 3."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from tnt_optax import checks, phases, sharding
from tnt_optax.blocks import Block, describe
from tnt_optax.numerics import count_events, evaluate_schedule, widen
from tnt_optax.options import MAX_DIM, Number, NumberOrSchedule, Options
from tnt_optax.state import TNTState, check_state, init_state, match_factors, match_updates
from tnt_optax.views import ViewFn

# The function `warm_start` reaches a TNTState inside wrappers only through `update`. This argument of `update` names
# the phase to run in a call that is not a step.
WarmStart = Literal["absorb", "refresh"]


def scale_by_tnt(
    *,
    damping: NumberOrSchedule = 0.01,
    statistics_decay: Number = 0.9,
    momentum: Number | None = 0.9,
    statistics_period: int | jax.Array = 10,
    inverse_period: int | jax.Array = 100,
    fisher: Literal["sampled", "empirical"] = "sampled",
    trust_radius: NumberOrSchedule | None = None,
    views: ViewFn | None = None,
    max_dim: int = MAX_DIM,
    inverse_parts: int | None = None,
    inverse_axis: sharding.AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The direction of TNT: momentum, preconditioned by the inverse of the Kronecker-factored Fisher matrix.

    .. math::

      m \leftarrow \mu m + g, \qquad
      p = m \times_1 (U_1 + \epsilon I)^{-1} \times_2 (U_2 + \epsilon I)^{-1} \cdots \times_k (U_k + \epsilon I)^{-1}

    The factors :math:`U_i` are those of :func:`tnt`, without its learning rate and weight decay. Like every
    ``scale_by_*`` transformation it does not negate: chain :func:`optax.scale_by_learning_rate` behind it.

    Args:
      damping: :math:`\epsilon`, as in :func:`tnt`.
      statistics_decay: :math:`\beta`, as in :func:`tnt`.
      momentum: :math:`\mu`, as in :func:`tnt`.
      statistics_period: :math:`T_1`, as in :func:`tnt`.
      inverse_period: :math:`T_2`, as in :func:`tnt`.
      fisher: as in :func:`tnt`.
      trust_radius: :math:`r`, as in :func:`tnt`, for the direction :math:`p` itself.
      views: as in :func:`tnt`.
      max_dim: as in :func:`tnt`.
      inverse_parts: as in :func:`tnt`.
      inverse_axis: as in :func:`tnt`.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` whose state is a :class:`TNTState`. Its ``update`` takes
      ``sampled_grads``, as that of :func:`tnt` does.

    Raises:
      ValueError: as :func:`tnt`.
      TypeError: as :func:`tnt`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, tnt_optax
      >>> forward = lambda params, inputs: inputs @ params["kernel"]
      >>> value_and_grads = tnt_optax.value_and_sampled_grad(forward, tnt_optax.Categorical())
      >>> tx = optax.chain(tnt_optax.scale_by_tnt(damping=0.1), optax.scale_by_learning_rate(0.01))
      >>> params, labels = {"kernel": jnp.zeros((4, 3))}, jnp.array([0, 1, 2, 0])
      >>> _, grads, sampled_grads = value_and_grads(params, jnp.eye(4), labels, jax.random.key(0))
      >>> updates, state = tx.update(grads, tx.init(params), params, sampled_grads=sampled_grads)
      >>> [c.shape for c in state[0].contractions["kernel"]]
      [(4, 4), (3, 3)]

    References:
      Ren and Goldfarb, `Tensor Normal Training for Deep Learning Models <https://arxiv.org/abs/2106.02925>`_, 2021.
    """
    return guarded(direction(Options(**locals())))  # All arguments, by their names.


def direction(options: Options) -> optax.GradientTransformationExtraArgs:
    """`scale_by_tnt` without its guard: directions in float32 or better that may not be finite."""

    def init(params: optax.Params) -> TNTState:
        checks.check_floating("params", params)
        blocks = describe(params, options.views, options.max_dim)

        def zero_factors(block: Block, x: jax.Array) -> tuple[jax.Array, ...]:
            sharding.check_view(f"views for params{block.name}", x, block.view)
            return sharding.init_factors(x, block.view, block.factor_shapes, block.dtype)

        def zero_momentum(block: Block, x: jax.Array) -> jax.Array:
            return jnp.zeros_like(x, dtype=block.dtype)

        return init_state(
            blocks,
            momentum=None if options.momentum is None else jax.tree.map(zero_momentum, blocks, params),
            contractions=jax.tree.map(zero_factors, blocks, params),
            # A copy: donating the state must not delete an array that the caller passed as damping.
            damping=jnp.array(evaluate_schedule(options.damping, jnp.zeros([], jnp.int32))),
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        sampled_grads: Any = None,
        warm_start: WarmStart | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TNTState]:
        del params, extra_args
        blocks = describe(updates, options.views, options.max_dim)
        state = match_factors(blocks, state)
        if warm_start is not None:
            return updates, _warm_start(options, blocks, state, warm_start, sampled_grads)
        t, statistics = state.count, _statistics(options, updates, sampled_grads)
        due = phases.statistics_due(options, t)
        state = phases.absorb(blocks, state, statistics, due=due, decay=options.statistics_decay)
        state = phases.refresh(options, blocks, state, due=phases.inverses_due(options, t))
        momentum = phases.accumulate(options, state.momentum, updates)
        p = phases.precondition(blocks, state.inverses, momentum)
        p, bounded = phases.bound(options, p, momentum, t)
        return p, state._replace(
            count=optax.safe_increment(t),
            momentum=None if options.momentum is None else momentum,
            bounded_steps=count_events(state.bounded_steps, bounded),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def guarded(chain: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`direction`, or a chain that begins with it, in float32 or better, with the guard behind it."""

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        before = check_state(_first(state))
        gradients = match_updates(updates, before)
        new: Any
        new_updates, new = optax.with_extra_args_support(chain).update(gradients, state, widen(params), **extra_args)
        new_updates, after = phases.guard(gradients, new_updates, before, _first(new))
        return new_updates, after if isinstance(new, TNTState) else (after, *new[1:])

    return optax.GradientTransformationExtraArgs(chain.init, update)


def _first(state: Any) -> Any:
    """The `TNTState` of a chain that begins with one, or the state itself."""
    return state[0] if isinstance(state, tuple) and state and not isinstance(state, TNTState) else state


def _statistics(options: Options, gradients: Any, sampled_grads: Any) -> Any:
    """What the statistics are computed from: the sampled gradient, or the gradients themselves."""
    if options.fisher == "empirical":
        return gradients
    if sampled_grads is None:
        raise ValueError(
            "sampled_grads: expected, with fisher='sampled', the gradient for targets sampled from the model (or the "
            "function that returns it), got None. Take it from tnt_optax.value_and_sampled_grad and call "
            "tx.update(grads, opt_state, params, sampled_grads=sampled_grads). flax.nnx.Optimizer.update forwards it. "
            "With Flax Linen, use tnt_optax.linen.TrainState, because Flax's own TrainState does not. To use the "
            "gradients themselves instead, pass fisher='empirical'."
        )
    return sampled_grads


def _warm_start(options: Options, blocks: Any, state: TNTState, phase: WarmStart, sampled_grads: Any) -> TNTState:
    if phase == "absorb":
        return phases.absorb(blocks, state, sampled_grads, due=True)
    return phases.refresh(options, blocks, state, due=[True] * (options.inverse_parts or 1))
