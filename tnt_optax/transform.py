"""Tensor Normal Training as an Optax gradient transformation: Algorithm 3 of the paper."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import KeyPath, keystr

from tnt_optax import checks, factors, sharding, states
from tnt_optax.dtypes import as_float, as_int32, float32_or_better
from tnt_optax.modes import Modes, ModesFn, batch_shape, mode_dims, resolve
from tnt_optax.states import HistoryState, RejectedState, TNTState

Number = float | jax.Array
NumberOrSchedule = Number | optax.Schedule
# For the function `warm_start`, which can't reach a TNTState inside wrappers but through `update`: which of steps 2
# and 3 to do in a call that is no step.
WarmStart = Literal["absorb", "refresh"]


class Events(NamedTuple):
    """What happened in a step: booleans, for the counters of `tnt`."""

    rejected: RejectedState
    bounded: jax.Array
    refreshed: jax.Array  # Of each part.


Settle = Callable[[optax.Updates], tuple[optax.Updates, TNTState, Events]]


def scale_by_tnt(
    *,
    damping: NumberOrSchedule = 0.01,
    decay: Number = 0.9,
    momentum: Number = 0.9,
    statistics_period: int | jax.Array = 10,
    inverse_period: int | jax.Array = 100,
    fisher: Literal["sampled", "empirical"] = "sampled",
    trust_radius: NumberOrSchedule | None = None,
    modes: ModesFn | None = None,
    max_dim: int = 8192,
    refresh_parts: int | None = None,
    refresh_axis: sharding.AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum, preconditioned by the inverse of the Kronecker-factored Fisher matrix: the direction p of Algorithm 3.

    The arguments are those of `tnt`, which see; learning rate and weight decay are left to other transformations.
    The direction points along the gradient: chain `optax.scale_by_learning_rate` behind it. The state is a `TNTState`.
    """
    init, step = _algorithm(
        damping=damping,
        decay=decay,
        mu=momentum,
        statistics_period=statistics_period,
        inverse_period=inverse_period,
        fisher=fisher,
        trust_radius=trust_radius,
        modes=modes,
        max_dim=max_dim,
        refresh_parts=refresh_parts,
        refresh_axis=refresh_axis,
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
        direction, settle = step(updates, state, sampled_grads, warm_start)
        updates, state, _ = settle(direction)
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def tnt(
    learning_rate: NumberOrSchedule | None = None,
    *,
    damping: NumberOrSchedule = 0.01,
    decay: Number = 0.9,
    momentum: Number = 0.9,
    weight_decay: Number = 0.0,
    statistics_period: int | jax.Array = 10,
    inverse_period: int | jax.Array = 100,
    fisher: Literal["sampled", "empirical"] = "sampled",
    trust_radius: NumberOrSchedule | None = None,
    modes: ModesFn | None = None,
    max_dim: int = 8192,
    refresh_parts: int | None = None,
    refresh_axis: sharding.AxisNames | None = None,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Tensor Normal Training (Ren & Goldfarb, 2021; Algorithm 3): W <- W - learning_rate * (p + weight_decay * W).

    p is the momentum, with every parameter tensor multiplied along each of its modes by the inverse of a factor of
    its Fisher matrix. The factors are estimated from `sampled_grads`, the gradient for targets sampled from the
    model, which `value_and_sampled_grad` gives:

    >>> updates, opt_state = tx.update(grads, opt_state, params, sampled_grads=sampled_grads)

    Args:
      learning_rate: alpha; a number, a schedule of the step, or None for the direction p + weight_decay * W alone,
        neither negated nor scaled, to be chained with `optax.scale_by_schedule` and the like.
      damping: eps > 0, a number or a schedule of the step: P_i = (U_i + eps I)^-1. It is on the scale of the factors'
        mean eigenvalue, that is of (trace of the parameter's Fisher matrix / number of its elements)^(1/k). For a dense
        factor it is at least the dtype's epsilon times the factor's largest absolute row sum.
      decay: beta in [0, 1): of the moving averages of the contractions. The first ones are a plain mean, so that no
        bias correction is needed: C <- (1-w) C + w G^(i) with w = max(1-beta, 1/(n+1)).
      momentum: mu in [0, 1): m <- mu m + g, before preconditioning and not dampened.
      weight_decay: decoupled (AdamW's), scaled by the learning rate; needs `params` in `update`.
      statistics_period: T1 >= 1: every how many steps the statistics absorb a sampled gradient. On all other steps a
        `sampled_grads` function is not called, and so its backward pass not run.
      inverse_period: T2 >= 1: every how many steps the inverses are computed anew (during the first T2 steps: with
        every absorbed gradient).
      fisher: "sampled", the true Fisher matrix, or "empirical", which uses the gradients themselves (the paper's
        ablation TNT-EF) and needs no `sampled_grads`.
      trust_radius: None, or r, a number or a schedule: the step u = -learning_rate * p of all parameters together is
        shortened where <u, F u>, F being the damped estimated Fisher matrix, exceeds r^2. With `scale="fisher"` of
        `value_and_sampled_grad` that is twice the KL divergence, per example, between the predictions before and
        after the step; with "mean", this divided by the batch size. Without a learning rate the bound is on p.
      modes: None, or a function (path, shape) -> `Modes` or None that says how a parameter is viewed as a tensor; the
        path is the one that `jax.tree_util.tree_map_with_path` gives, None means the default: one mode for each
        axis, and with four or more axes all but the last two merged into one (convolution kernels).
      max_dim: a mode longer than this (an embedding's vocabulary) keeps only the diagonal of its factor.
      refresh_parts: None: all inverses are computed in the same step, as in the paper. Or a number of parts, of about
        equal cost, into which the parameters are divided; their refreshes are spread evenly over the `inverse_period`
        steps, so that no step is much slower than the others.
      refresh_axis: None, or the name of an axis of the mesh in context (`jax.set_mesh`), or a tuple of names: the
        devices along it divide the inverses of a refresh among them, by cost, and then send them to one another. With
        None every device computes all of them.
      weight_decay_mask: None, or a tree of booleans (or a function of the parameters that gives one) that says which
        parameters decay, as in `optax.add_decayed_weights`.

    Returns:
      A `GradientTransformationExtraArgs`. Its `update` takes `sampled_grads`: a tree like the parameters, or a
      function without arguments that returns one and is called inside `jax.lax.cond`; other extra arguments are
      accepted. Updates have the dtypes of the gradients. Its state is a tuple (`TNTState`, `RejectedState`,
      `HistoryState`, ...).

    Raises:
      ValueError: a number out of its range, or an unknown `fisher`. From `init`: a mode that merges an axis which is
        divided over a mesh behind another. From `update`: `sampled_grads` missing, or of another structure or shape
        than the gradients; a state of other `modes`; a `refresh_axis` that is no axis of the mesh in context.
      TypeError: an argument of a wrong type, or (from `init` and `update`) a parameter that is not real and floating.
    """
    if learning_rate is not None and not callable(learning_rate):
        checks.check_finite("learning_rate", learning_rate)
    checks.check_not_negative("weight_decay", weight_decay)
    radius = trust_radius
    if trust_radius is not None and learning_rate is not None:
        if not callable(trust_radius):
            checks.check_positive("trust_radius", trust_radius)

        def radius_of_direction(t: Any) -> jax.Array:  # The step is learning_rate times the direction.
            return as_float(_at(trust_radius, t)) / jnp.abs(as_float(_at(learning_rate, t)))

        radius = radius_of_direction
    init_tnt, step = _algorithm(
        damping=damping,
        decay=decay,
        mu=momentum,
        statistics_period=statistics_period,
        inverse_period=inverse_period,
        fisher=fisher,
        trust_radius=radius,
        modes=modes,
        max_dim=max_dim,
        refresh_parts=refresh_parts,
        refresh_axis=refresh_axis,
    )
    # Without decay, `update` works without `params` too.
    no_decay = isinstance(weight_decay, int | float) and weight_decay == 0
    rest = optax.chain(
        optax.identity() if no_decay else optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.identity() if learning_rate is None else optax.scale_by_learning_rate(learning_rate),
    )

    def init(params: optax.Params) -> tuple[TNTState, RejectedState, HistoryState, optax.OptState]:
        rejected = RejectedState(*(jnp.zeros([], jnp.int32) for _ in range(3)))
        history = HistoryState(jnp.zeros([], jnp.int32), jnp.full(refresh_parts or 1, -1, jnp.int32))
        return init_tnt(params), rejected, history, rest.init(params)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        sampled_grads: Any = None,
        warm_start: WarmStart | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        tnt_state, counts, history, rest_state = state
        t = tnt_state.count
        direction, settle = step(updates, tnt_state, sampled_grads, warm_start)
        if params is not None:
            params = jax.tree.map(lambda p, w: w.astype(p.dtype), direction, params)
        scaled, rest_state = rest.update(direction, rest_state, params)
        updates, tnt_state, events = settle(scaled)
        counts = jax.tree.map(lambda count, now: count + now.astype(jnp.int32), counts, events.rejected)
        history = HistoryState(
            bounded=history.bounded + events.bounded.astype(jnp.int32),
            refreshed=jnp.where(events.refreshed, t, history.refreshed),
        )
        return updates, (tnt_state, counts, history, rest_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _algorithm(
    *,
    damping: NumberOrSchedule,
    decay: Number,
    mu: Number,
    statistics_period: int | jax.Array,
    inverse_period: int | jax.Array,
    fisher: str,
    trust_radius: NumberOrSchedule | None,
    modes: ModesFn | None,
    max_dim: int,
    refresh_parts: int | None,
    refresh_axis: sharding.AxisNames | None,
) -> tuple[Callable[..., TNTState], Callable[..., tuple[optax.Updates, Settle]]]:
    """Algorithm 3, as the functions `init` and `step`.

    A step gives the direction, and a function that takes the updates which are made of it, says whether they can be
    trusted, and returns the updates, the new state and what happened.
    """
    if not callable(damping):
        checks.check_positive("damping", damping)
    checks.check_unit_interval("decay", decay)
    checks.check_unit_interval("momentum", mu)
    if trust_radius is not None and not callable(trust_radius):
        checks.check_positive("trust_radius", trust_radius)
    checks.check_period("statistics_period", statistics_period)
    checks.check_period("inverse_period", inverse_period)
    if fisher not in ("sampled", "empirical"):
        raise ValueError(f"fisher: expected 'sampled' or 'empirical', got {fisher!r}.")
    if modes is not None and not callable(modes):
        raise TypeError(f"modes: expected a function (path, shape) -> Modes or None, got {type(modes).__name__}.")
    checks.check_period("max_dim", max_dim)
    if isinstance(refresh_parts, jax.Array):
        raise TypeError(
            "refresh_parts: expected a Python integer, got an array: name it in inject_hyperparams' static_args."
        )
    if refresh_parts is not None:
        checks.check_period("refresh_parts", refresh_parts)
    checks.check_axis_names("refresh_axis", refresh_axis)

    def views(tree: optax.Params) -> Any:
        """A tree of `Modes`."""
        return jax.tree_util.tree_map_with_path(lambda path, x: resolve(modes, path, x.shape), tree)

    def init(params: optax.Params) -> TNTState:
        checks.check_floating("params", params)
        if isinstance(max_dim, jax.core.Tracer):
            raise TypeError(
                "max_dim: expected a Python integer, got a traced one: name it in inject_hyperparams' static_args."
            )

        def zero_matrices(path: KeyPath, x: jax.Array, view: Modes) -> tuple[jax.Array, ...]:
            sharding.check_modes(f"modes for params{keystr(path)}", x, view)
            batch, dims = batch_shape(view, x.shape), mode_dims(view, x.shape)
            shapes = [(*batch, d) if d > max_dim else (*batch, d, d) for d in dims]
            dtype = float32_or_better(x)
            return tuple(sharding.zeros_beside(x, view, mode, shape, dtype) for mode, shape in enumerate(shapes))

        matrices = jax.tree_util.tree_map_with_path(zero_matrices, params, views(params))
        return TNTState(
            count=jnp.zeros([], jnp.int32),
            statistics_count=jnp.zeros([], jnp.int32),
            momentum=jax.tree.map(lambda x: jnp.zeros_like(x, dtype=float32_or_better(x)), params),
            contractions=matrices,
            inverses=jax.tree.map(jnp.zeros_like, matrices),
        )

    def step(
        gradients: optax.Updates, state: Any, sampled_grads: Any, warm_start: WarmStart | None
    ) -> tuple[optax.Updates, Settle]:
        if not isinstance(state, TNTState):
            raise TypeError(f"state: expected a TNTState, got {type(state).__name__}: is it another optimizer's state?")
        gradients = checks.match("updates", gradients, state.momentum, "the optimizer's state")
        if fisher == "sampled" and sampled_grads is None and warm_start is None:
            raise ValueError(_MISSING_SAMPLED_GRADS)
        use_gradients = fisher == "empirical" and warm_start is None
        t, n = state.count, state.statistics_count
        plain_mean = 1 / as_float(n + 1)
        if warm_start is None:
            absorb_now = _is_due(t, statistics_period)
            weight = jnp.maximum(1 - as_float(decay), plain_mean)
        else:
            absorb_now, weight = warm_start == "absorb", plain_mean

        view = views(gradients)

        old_contractions = states.in_tuples("contractions", state.contractions, gradients, view)
        old_inverses = states.in_tuples("inverses", state.inverses, gradients, view)

        def absorb() -> Any:
            tree = gradients
            if not use_gradients:
                tree = sampled_grads() if checks.is_function(sampled_grads) else sampled_grads
                tree = checks.match("sampled_grads", tree, gradients, "the gradients")
            # The trace of a parameter's contractions, which bounds all of their elements.
            finite = _all_finite(jax.tree.map(lambda g: jnp.sum(jnp.square(g.astype(float32_or_better(g)))), tree))

            def average(g: jax.Array, v: Modes, c: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                return sharding.keeping(functools.partial(factors.average_contractions, v), c)(g, c, weight)

            new = jax.tree.map(average, tree, view, old_contractions)
            return _where(finite, new, old_contractions), finite

        contractions, absorbed = _cond(absorb_now, absorb, lambda: (old_contractions, jnp.bool_(True)))

        structure = jax.tree.structure(gradients)
        parameters = [structure.flatten_up_to(tree) for tree in (view, contractions, old_inverses)]
        new_inverses, refreshed = [], jnp.bool_(True)
        number = refresh_parts or 1
        taken = [jnp.bool_(False)] * number
        for index, part in factors.equal_parts(parameters[1], number):
            some_views, some_contractions, some_inverses = (leaves[part] for leaves in parameters)

            def refresh(vs: Any = some_views, cs: Any = some_contractions, old: Any = some_inverses) -> Any:
                invert = functools.partial(factors.damped_inverses, vs, axis=refresh_axis)
                # `finite` is one number, which lies as `absorbed` does, another.
                new, finite = sharding.keeping(invert, (old, absorbed))(cs, as_float(_at(damping, t)))
                return _where(finite, new, old), finite

            now: Any = warm_start == "refresh"
            if warm_start is None:
                period = as_int32(inverse_period)
                now = _is_due(t, inverse_period, offset=index * period // number) | (absorb_now & (t < period))
            some_inverses, finite = _cond(now, refresh, lambda old=some_inverses: (old, jnp.bool_(True)))
            new_inverses += some_inverses
            refreshed &= finite
            taken[index] = now & finite
        inverses = structure.unflatten(new_inverses)
        state = state._replace(
            statistics_count=jnp.where(absorb_now & absorbed, optax.safe_increment(n), n),
            contractions=contractions,
            inverses=inverses,
        )
        if warm_start is not None:
            rejected = RejectedState(jnp.bool_(False), ~absorbed, ~refreshed)
            return gradients, lambda updates: (updates, state, Events(rejected, jnp.bool_(False), jnp.stack(taken)))

        momentum = jax.tree.map(
            lambda m, g: as_float(mu).astype(m.dtype) * m + g.astype(m.dtype), state.momentum, gradients
        )

        def precondition(m: jax.Array, v: Modes, p: tuple[jax.Array, ...]) -> jax.Array:
            return sharding.keeping(functools.partial(factors.precondition, v), m)(m, p)

        direction, bounded = jax.tree.map(precondition, momentum, view, inverses), jnp.bool_(False)
        if trust_radius is not None:
            direction, bounded = _bound(direction, momentum, as_float(_at(trust_radius, t)))

        def settle(updates: optax.Updates) -> tuple[optax.Updates, TNTState, Events]:
            updates = jax.tree.map(lambda u, g: u.astype(g.dtype), updates, gradients)
            # What is not finite in the gradient or the momentum is not finite in the updates either.
            finite = _all_finite(updates)
            return (
                _where(finite, updates, jax.tree.map(jnp.zeros_like, updates)),
                state._replace(count=optax.safe_increment(t), momentum=_where(finite, momentum, state.momentum)),
                Events(RejectedState(~finite, ~absorbed, ~refreshed), bounded & finite, jnp.stack(taken)),
            )

        return direction, settle

    return init, step


def _bound(direction: optax.Updates, momentum: optax.Updates, radius: jax.Array) -> tuple[optax.Updates, jax.Array]:
    """p, shortened where <p, m>, its squared norm in the metric of the damped factors, exceeds radius^2; and if so."""
    products = jax.tree.map(lambda p, m: as_float(jnp.sum(p * m)), direction, momentum)
    # Not below 0, whatever the rounding. (And see `_all_finite`.)
    squared_norm = jnp.sum(jnp.maximum(jnp.stack([as_float(0.0), *jax.tree.leaves(products)]), 0))
    exceeds = squared_norm > jnp.square(radius)
    scale = jnp.where(exceeds, radius * lax.rsqrt(squared_norm), 1)
    # An infinite norm does not tell how much to shorten: the step is then rejected, like all that is not finite.
    scale = jnp.where(jnp.isfinite(squared_norm), scale, jnp.nan)
    return jax.tree.map(lambda p: scale.astype(p.dtype) * p, direction), exceeds


def _all_finite(tree: Any) -> jax.Array:
    # One pass without an array in between; the largest of NaN and anything is NaN. The results are gathered in an array
    # before they are looked at: XLA would else put all of them into each place where the answer is used.
    largest = [as_float(jnp.max(jnp.abs(x), initial=0)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.isfinite(jnp.stack([as_float(0.0), *largest])))


def _where(condition: jax.Array, if_true: Any, if_false: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), if_true, if_false)


def _at(value: Any, t: jax.Array) -> Any:
    return value(t) if callable(value) else value


def _is_due(t: jax.Array, period: int | jax.Array, offset: int | jax.Array = 0) -> bool | jax.Array:
    return True if isinstance(period, int) and period == 1 else t % as_int32(period) == offset


def _cond(predicate: bool | jax.Array, if_true: Callable[[], Any], if_false: Callable[[], Any]) -> Any:
    # What is known beforehand needs no conditional, which costs a copy of its results, and outside jit a compilation.
    if not isinstance(predicate, jax.core.Tracer):
        return if_true() if predicate else if_false()
    return lax.cond(predicate, if_true, if_false)


_MISSING_SAMPLED_GRADS = (
    "sampled_grads: expected, with fisher='sampled', the gradient for targets sampled from the model (or the function "
    "that returns it), got None. Take it from tnt_optax.value_and_sampled_grad and call "
    "tx.update(grads, opt_state, params, sampled_grads=sampled_grads). flax.nnx.Optimizer.update forwards it; with "
    "Flax Linen use tnt_optax.linen.TrainState, because Flax's own TrainState does not. To use the gradients "
    "themselves instead, say fisher='empirical'."
)
