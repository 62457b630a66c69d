"""Optimizers that are chains of this library's transformations and Optax's own."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from tnt_optax import checks, sharding
from tnt_optax.numerics import all_finite, count_events, evaluate_schedule, widen
from tnt_optax.options import MAX_DIM, Number, NumberOrSchedule, Options
from tnt_optax.quadratic_model import scale_by_quadratic_model
from tnt_optax.sampled_grad import check_sampled_grads
from tnt_optax.state import check_state
from tnt_optax.transform import direction, guarded, scale_by_tnt
from tnt_optax.views import ViewFn


def tnt(
    learning_rate: NumberOrSchedule | None = None,
    *,
    damping: NumberOrSchedule = 0.01,
    statistics_decay: Number = 0.9,
    momentum: Number | None = 0.9,
    weight_decay: Number = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    statistics_period: int | jax.Array = 10,
    inverse_period: int | jax.Array = 100,
    fisher: Literal["sampled", "empirical"] = "sampled",
    trust_radius: NumberOrSchedule | None = None,
    views: ViewFn | None = None,
    max_dim: int = MAX_DIM,
    inverse_parts: int | None = None,
    inverse_axis: sharding.AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Tensor Normal Training (Ren and Goldfarb, 2021; Algorithm 3), with a learning rate.

    The direction p is the momentum m, multiplied along each mode of every parameter tensor by the inverse of a factor
    of its Fisher matrix:

    .. math::

      m \leftarrow \mu m + g, \qquad p = m \times_1 (U_1 + \epsilon I)^{-1} \cdots \times_k (U_k + \epsilon I)^{-1},
      \qquad W \leftarrow W - \alpha (p + \gamma W).

    The factors U_i (Eq. (5)) are estimated from `sampled_grads`, the gradient for targets sampled from the model, which
    `value_and_sampled_grad` returns.

    Example:
      >>> import jax, jax.numpy as jnp, optax, tnt_optax
      >>> forward = lambda params, inputs: inputs @ params
      >>> value_and_grads = tnt_optax.value_and_sampled_grad(forward, tnt_optax.Categorical())
      >>> tx = tnt_optax.tnt(0.03, damping=0.1, trust_radius=0.1)
      >>> params, labels = jnp.zeros((4, 3)), jnp.array([0, 1, 2, 0])
      >>> opt_state = tx.init(params)
      >>> loss, grads, sampled_grads = value_and_grads(params, jnp.eye(4), labels, jax.random.key(0))
      >>> updates, opt_state = tx.update(grads, opt_state, params, sampled_grads=sampled_grads)
      >>> params = optax.apply_updates(params, updates)
      >>> bool(value_and_grads(params, jnp.eye(4), labels, jax.random.key(1))[0] < loss)
      True

    Args:
      learning_rate: alpha; a number, a schedule of the step, or None for the direction p + weight_decay * W alone,
        neither negated nor scaled, to be chained with `optax.scale_by_schedule` and the like.
      damping: eps > 0; a number or a schedule of the step. P_i = (U_i + eps I)^-1. It is on the scale of the factors'
        mean eigenvalue, that is of (trace of the parameter's Fisher matrix / number of its elements)^(1/k). For a dense
        factor it is at least the dtype's epsilon times the factor's largest absolute row sum.
      statistics_decay: beta in [0, 1), of the moving averages of the contractions. The first ones are a plain mean, so
        that no bias correction is needed: C_i <- (1-w) C_i + w G_(i) with w = max(1-beta, 1/(n+1)).
      momentum: mu in [0, 1): m <- mu m + g, before preconditioning and not dampened. None: no momentum is kept, and the
        gradient is preconditioned.
      weight_decay: decoupled (AdamW's) and scaled by the learning rate; needs `params` in `update`.
      weight_decay_mask: None, or a tree of booleans (or a function of the parameters that returns one) that says which
        parameters decay, as in `optax.add_decayed_weights`.
      statistics_period: T1 >= 1, the steps between statistics updates. On all other steps a `sampled_grads` function is
        not called, so that its backward pass does not run.
      inverse_period: T2 >= 1, the steps between inverse updates. During the first T2 steps, the inverses are updated
        after each statistics update.
      fisher: "sampled", the true Fisher matrix, or "empirical", which uses the gradients themselves (the paper's
        ablation TNT-EF) and needs no `sampled_grads`.
      trust_radius: None, or r, a number or a schedule: the step u = -learning_rate * p of all parameters together is
        shortened where <u, F u>, F being the damped estimated Fisher matrix, exceeds r^2. With `scale="fisher"` of
        `value_and_sampled_grad`, <u, F u> estimates twice the KL divergence, per example, between the predictions
        before and after the step, too small while the statistics are of few batches; with "mean", it is divided by
        the batch size. Without a learning rate the bound is on p.
      views: None, or a function (path, shape) -> `TensorView` or None that says how a parameter is viewed as a tensor.
        The path is the one that `jax.tree_util.tree_map_with_path` passes. None means the default: one mode for each
        axis, and with four or more axes all but the last two merged into one (convolution kernels).
      max_dim: 8192 by default. A mode longer than this (an embedding's vocabulary) keeps only the diagonal of its
        factor. Static: with `optax.inject_hyperparams`, a value of your own has to be in `static_args`.
      inverse_parts: None: all inverses are updated in the same step, as in the paper. Or a number of parts, of about
        equal cost, into which the parameters are divided; their updates are spread evenly over the `inverse_period`
        steps, so that no step is much slower than the others. Static, as `max_dim`.
      inverse_axis: None, or the name of an axis of the current mesh (`jax.set_mesh`), or a tuple of names. The devices
        along it divide the inverses of an update among them, by cost, and exchange the results. With None every device
        computes all of them.

    Returns:
      A `GradientTransformationExtraArgs`. Its `update` takes `sampled_grads`: a tree like the parameters, or a
      function without arguments that returns one (such as a `SampledGrad`) and is called inside `jax.lax.cond`; other
      extra arguments are accepted. Updates have the dtypes of the gradients. The state is a tuple whose first element
      is a `TNTState`; the others are Optax's, of weight decay and learning rate.

      A step that is not finite gets a zero update and is counted in the state, as are sampled gradients and inverses
      that are not finite. No parameter is updated before there are statistics.

    Raises:
      ValueError: a number is out of its range, or `fisher` is unknown. From `init`: a mode merges an axis that is
        divided over a mesh behind another axis. From `update`: `sampled_grads` is missing, or has another structure or
        shape than the gradients; the state is of other `views`; `inverse_axis` is not an axis of the current mesh.
      TypeError: an argument has a wrong type, or (from `init` and `update`) a parameter is not real and floating, or
        (from `update`) the state is not one of this optimizer.

    References:
      Ren and Goldfarb, `Tensor Normal Training for Deep Learning Models <https://arxiv.org/abs/2106.02925>`_, 2021.
    """
    if learning_rate is not None:
        checks.check_number("learning_rate", learning_rate, schedule=True)
    options = Options(
        damping=damping,
        statistics_decay=statistics_decay,
        momentum=momentum,
        statistics_period=statistics_period,
        inverse_period=inverse_period,
        fisher=fisher,
        trust_radius=trust_radius,
        views=views,
        max_dim=max_dim,
        inverse_parts=inverse_parts,
        inverse_axis=inverse_axis,
    )
    if trust_radius is not None and learning_rate is not None:

        def radius_of_direction(t: Any) -> jax.Array:  # The step is learning_rate times the direction.
            return evaluate_schedule(trust_radius, t) / jnp.abs(evaluate_schedule(learning_rate, t))

        options = dataclasses.replace(options, trust_radius=radius_of_direction)
    chain = optax.chain(
        direction(options),
        _weight_decay(weight_decay, weight_decay_mask),
        optax.identity() if learning_rate is None else optax.scale_by_learning_rate(learning_rate),
    )
    return guarded(chain)


def adaptive_tnt(
    learning_rate: NumberOrSchedule = 1.0,
    *,
    damping: NumberOrSchedule = 0.01,
    statistics_decay: Number = 0.95,
    statistics_period: int | jax.Array = 1,
    inverse_period: int | jax.Array = 10,
    weight_decay: Number = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    trust_radius: NumberOrSchedule | None = None,
    initial_model_damping: Number = 0.1,
    adaptive_damping: bool = True,
    use_momentum: bool = True,
    views: ViewFn | None = None,
    max_dim: int = MAX_DIM,
    inverse_parts: int | None = None,
    inverse_axis: sharding.AxisNames | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""TNT without a learning rate.

    The step u minimizes the exact quadratic model of the batch in the span of TNT's direction p (`scale_by_tnt` without
    momentum) and the step before (`scale_by_quadratic_model`). Nothing has to be tuned.

    .. math::

      u_t = c_1 p_t + c_2 u_{t-1}, \qquad W \leftarrow W - \tau (u_t + \gamma W),

    with the factor tau, `learning_rate`, which is 1 by default.

    Example:
      >>> import jax, jax.numpy as jnp, optax, tnt_optax
      >>> forward = lambda params, inputs: inputs @ params
      >>> value_and_grads = tnt_optax.value_and_sampled_grad(forward, tnt_optax.Categorical())
      >>> tx = tnt_optax.adaptive_tnt()
      >>> params, labels = jnp.zeros((4, 3)), jnp.array([0, 1, 2, 0])
      >>> opt_state = tx.init(params)
      >>> loss, grads, sampled_grads = value_and_grads(params, jnp.eye(4), labels, jax.random.key(0))
      >>> updates, opt_state = tx.update(grads, opt_state, params, sampled_grads=sampled_grads)
      >>> params = optax.apply_updates(params, updates)
      >>> bool(value_and_grads(params, jnp.eye(4), labels, jax.random.key(1))[0] < loss)
      True

    Args:
      learning_rate: a factor of the minimizer: 1, or a schedule of the step that falls from 1 to 0, such as
        `optax.linear_schedule(1.0, 0.0, steps)`, because the minimizer follows the noise of its batch.
      damping: eps > 0 of the inverses, as in `tnt`.
      statistics_decay: beta, as in `tnt`.
      statistics_period: T1, as in `tnt`.
      inverse_period: T2, as in `tnt`.
      weight_decay: decoupled, as in `tnt`: it is no part of the model. Needs `params` in `update`.
      weight_decay_mask: as in `tnt`.
      trust_radius: None, or r, a number or a schedule: u is shortened where the exact <u, J^T H J u>, to second order
        twice the KL divergence per example between the predictions before and after the step, exceeds r^2.
      initial_model_damping: lambda at the first step, `initial_damping` of `scale_by_quadratic_model`.
      adaptive_damping: whether lambda is adapted, as in `scale_by_quadratic_model`.
      use_momentum: whether the step before is a direction, as in `scale_by_quadratic_model`.
      views: as in `tnt`.
      max_dim: as in `tnt`.
      inverse_parts: as in `tnt`.
      inverse_axis: as in `tnt`.

    Returns:
      A `GradientTransformationExtraArgs`. Its `update` takes the gradient of the model as its updates (after
      `optax.clip_by_global_norm`, say), and `sampled_grads`, the `SampledGrad` of the same batch. Updates have the
      dtypes of the gradients. The state is a tuple of a `TNTState`, a `QuadraticModelState`, and those of weight decay
      and learning rate. Under `optax.MultiSteps` the model would be that of the last mini-batch alone: use
      `microbatches` of `value_and_sampled_grad` instead.

      A step that is not finite gets a zero update and is counted in the states. No parameter is updated before there
      are statistics.

    Raises:
      ValueError, TypeError: as `tnt` and `scale_by_quadratic_model`.

    References:
      Ren and Goldfarb, `Tensor Normal Training for Deep Learning Models <https://arxiv.org/abs/2106.02925>`_, 2021.
      Martens and Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate Curvature
      <https://arxiv.org/abs/1503.05671>`_, 2015.
    """
    checks.check_number("learning_rate", learning_rate, schedule=True)
    checks.check_number("initial_model_damping", initial_model_damping, 0, closed=True)
    tnt_direction = scale_by_tnt(
        damping=damping,
        statistics_decay=statistics_decay,
        momentum=None,
        statistics_period=statistics_period,
        inverse_period=inverse_period,
        views=views,
        max_dim=max_dim,
        inverse_parts=inverse_parts,
        inverse_axis=inverse_axis,
    )
    model = scale_by_quadratic_model(
        initial_damping=initial_model_damping,
        adaptive_damping=adaptive_damping,
        use_momentum=use_momentum,
        trust_radius=trust_radius,
    )
    decay_and_factor: Any = optax.chain(
        _weight_decay(weight_decay, weight_decay_mask), optax.scale_by_learning_rate(learning_rate)
    )

    def init(params: optax.Params) -> Any:
        return tnt_direction.init(params), model.init(params), *decay_and_factor.init(params)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        sampled_grads: Any = None,
        warm_start: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        if warm_start is None:
            check_sampled_grads(sampled_grads)  # Before TNT's own, less strict test.
        extra: dict[str, Any] = {"sampled_grads": sampled_grads, "warm_start": warm_start}
        # What is no state of this optimizer is an error of `tnt_direction`.
        before: Any = state if isinstance(state, tuple) and len(state) == 4 else (state, None)
        (tnt_before, model_before, *others), gradient = before, widen(updates)
        after: Any
        p, tnt_after = tnt_direction.update(gradient, tnt_before, params, **extra)
        u, after = model.update(p, model_before, params, grad=gradient, **extra)
        u, others = decay_and_factor.update(u, tuple(others), widen(params))
        u = optax.tree.cast_like(u, updates)
        # The decay, too, leaves out a step that the model rejected. A factor may be at fault as well.
        taken = after.rejected_steps == model_before.rejected_steps
        finite = all_finite(u)
        after = after._replace(
            step=optax.tree.where(finite, after.step, optax.tree.zeros_like(after.step)),
            coefficients=jnp.where(finite, after.coefficients, 0),
            predicted_reduction=jnp.where(finite, after.predicted_reduction, 0),
            rejected_steps=count_events(after.rejected_steps, taken & ~finite),
        )
        moves = taken & finite & (check_state(tnt_after).statistics_count > 0)
        return optax.tree.where(moves, u, optax.tree.zeros_like(u)), (tnt_after, after, *others)

    return optax.GradientTransformationExtraArgs(init, update)


def _weight_decay(weight_decay: Number, mask: Any) -> optax.GradientTransformation:
    checks.check_number("weight_decay", weight_decay, 0, closed=True)
    # Without decay, `update` works without `params` too.
    no_decay = isinstance(weight_decay, int | float) and weight_decay == 0
    return optax.identity() if no_decay else optax.add_decayed_weights(weight_decay, mask)
