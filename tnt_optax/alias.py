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
    r"""Tensor Normal Training, with a learning rate.

    Algorithm 3 of Ren and Goldfarb (2021). The momentum :math:`m` of the gradient :math:`g` of every parameter tensor
    :math:`W` of shape :math:`(d_1, \dots, d_k)` is multiplied along each mode by a damped inverse:

    .. math::

      m &\leftarrow \mu m + g \\
      p &= m \times_1 P_1 \times_2 P_2 \cdots \times_k P_k, \qquad P_i = (U_i + \epsilon I)^{-1} \\
      W &\leftarrow W - \alpha (p + \gamma W)

    :math:`U_1 \otimes \dots \otimes U_k` estimates the Fisher matrix of :math:`W`. The factors come from the
    second-moment matrix of each mode, called contraction, of the sampled gradient :math:`G` (the gradient for targets
    sampled from the model, which :func:`value_and_sampled_grad` returns):

    .. math::

      C_i &\leftarrow (1 - w)\, C_i + w\, \mathrm{mat}_i(G)\, \mathrm{mat}_i(G)^\top,
      \qquad w = \max\left(1 - \beta, \frac{1}{n + 1}\right) \\
      U_i &= \frac{C_i}{c_0^{\,k-1} \prod_{j \ne i} d_j}, \qquad
      c_0 = \left( \frac{\operatorname{tr} C_1}{\prod_j d_j} \right)^{1/k}

    :math:`n` is the number of sampled gradients in :math:`C_i`, and the second line is Eq. (5) of the paper.

    Args:
      learning_rate: :math:`\alpha`: a number, a schedule of the step, or None. With None the updates are :math:`p +
        \gamma W`, neither negated nor scaled, to be chained with :func:`optax.scale_by_schedule` and the like.
      damping: :math:`\epsilon > 0`: a number or a schedule of the step. It is on the scale of the factors' mean
        eigenvalue :math:`c_0`, which is (trace of the parameter's Fisher matrix / number of its elements)^(1/k). For a
        dense factor, it is at least the epsilon of the dtype times the largest absolute row sum of the factor.
      statistics_decay: :math:`\beta` in [0, 1), of the moving averages :math:`C_i`. The first sampled gradients form a
        plain mean, so that no bias correction is needed.
      momentum: :math:`\mu` in [0, 1). It is applied before preconditioning and is not dampened. None: no momentum is
        kept, and the gradient is preconditioned.
      weight_decay: :math:`\gamma \ge 0`. The decay is decoupled (as in AdamW) and scaled by the learning rate. It needs
        ``params`` in ``update``.
      weight_decay_mask: None, or a tree of booleans (or a function of the parameters that returns one) that says which
        parameters decay, as in :func:`optax.add_decayed_weights`.
      statistics_period: :math:`T_1 \ge 1`: the statistics are updated every :math:`T_1` steps. On all other steps a
        ``sampled_grads`` function is not called, so that its backward pass does not run.
      inverse_period: :math:`T_2 \ge 1`: the inverses are updated every :math:`T_2` steps. During the first :math:`T_2`
        steps, they are updated after each statistics update.
      fisher: ``"sampled"``, the true Fisher matrix, or ``"empirical"``, which uses the gradients themselves (the
        paper's ablation TNT-EF) and needs no ``sampled_grads``.
      trust_radius: None, or :math:`r`: a number or a schedule of the step. The step :math:`u = -\alpha p` of all
        parameters together is shortened where :math:`u^\top F u > r^2`, with the damped estimated Fisher matrix
        :math:`F`. With ``scale="fisher"`` of :func:`value_and_sampled_grad`, :math:`u^\top F u` estimates twice the KL
        divergence, per example, between the predictions before and after the step. The estimate is too small while the
        statistics are of few batches. With ``scale="mean"`` it is divided by the batch size. Without a learning rate,
        :math:`p` is shortened.
      views: None, or a function ``(path, shape) -> TensorView or None`` that says how a parameter is viewed as a tensor
        (see :class:`TensorView`). The path is the one that ``jax.tree_util.tree_map_with_path`` passes. None means the
        default: one mode for each axis, and with four or more axes all but the last two merged into one (convolution
        kernels).
      max_dim: a mode longer than this (an embedding's vocabulary) keeps only the diagonal of its factor. 8192 by
        default. Static: with :func:`optax.inject_hyperparams`, a value other than the default has to be named in
        ``static_args``.
      inverse_parts: None: all inverses are updated in the same step, as in the paper. Or the number of parts, of about
        equal cost, into which the parameters are divided. The updates of the parts are spread evenly over the
        ``inverse_period`` steps, so that no step is much slower than the others. Static, as ``max_dim``.
      inverse_axis: None, or the name of an axis of the current mesh (:func:`jax.set_mesh`), or a tuple of names. The
        devices along it divide the inverses of an update among them, by cost, and exchange the results. With None,
        every device computes all of them.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`. Its ``update`` takes the extra argument ``sampled_grads``,
      which is a tree like the parameters, or a function without arguments that returns one (such as a
      :class:`SampledGrad`) and is called inside :func:`jax.lax.cond`. Other extra arguments are accepted. Updates have
      the dtypes of the gradients. The state is a tuple of a :class:`TNTState` and Optax's states of weight decay and
      learning rate.

      A step that is not finite gets a zero update and is counted in the state, as are sampled gradients and inverses
      that are not finite. No parameter is updated before there are statistics.

    Raises:
      ValueError: a number is out of its range, or ``fisher`` is unknown. From ``init``: a mode merges an axis that is
        divided over a mesh behind another axis. From ``update``: ``sampled_grads`` is missing, or has another structure
        or shape than the gradients; the state is of other ``views``; ``inverse_axis`` is not an axis of the current
        mesh.
      TypeError: an argument has a wrong type. From ``init`` and ``update``: a parameter is not real and floating. From
        ``update``: the state is not one of this optimizer.

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

    The step :math:`u_t` minimizes the exact quadratic model of the batch (:func:`scale_by_quadratic_model`) in the span
    of the direction :math:`p_t` of TNT, without momentum (:func:`scale_by_tnt`), and the step before, :math:`u_{t-1}`:

    .. math::

      u_t = c_1 p_t + c_2 u_{t-1}, \qquad W \leftarrow W - \tau (u_t + \gamma W)

    :math:`c_1` is a learning rate and :math:`c_2` a momentum; both are computed at each step. Nothing has to be tuned.

    Args:
      learning_rate: :math:`\tau`, a factor of the minimizer: 1, or a schedule of the step that falls from 1 to 0, such
        as ``optax.linear_schedule(1.0, 0.0, steps)``, because the minimizer follows the noise of its batch.
      damping: :math:`\epsilon > 0` of the inverses, as in :func:`tnt`.
      statistics_decay: :math:`\beta`, as in :func:`tnt`.
      statistics_period: :math:`T_1`, as in :func:`tnt`.
      inverse_period: :math:`T_2`, as in :func:`tnt`.
      weight_decay: :math:`\gamma`. The decay is decoupled, as in :func:`tnt`, and not part of the model. It needs
        ``params`` in ``update``.
      weight_decay_mask: as in :func:`tnt`.
      trust_radius: None, or :math:`r`: a number or a schedule of the step. :math:`u` is shortened where the exact
        :math:`u^\top J^\top H J u > r^2`. To second order, :math:`u^\top J^\top H J u` is twice the KL divergence per
        example between the predictions before and after the step.
      initial_model_damping: :math:`\lambda` at the first step: ``initial_damping`` of :func:`scale_by_quadratic_model`.
      adaptive_damping: whether :math:`\lambda` is adapted, as in :func:`scale_by_quadratic_model`.
      use_momentum: whether the step before is a direction, as in :func:`scale_by_quadratic_model`.
      views: as in :func:`tnt`.
      max_dim: as in :func:`tnt`.
      inverse_parts: as in :func:`tnt`.
      inverse_axis: as in :func:`tnt`.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`. Its ``update`` takes the gradient of the model as its updates
      (after ``optax.clip_by_global_norm``, for example), and the extra argument ``sampled_grads``, the
      :class:`SampledGrad` of the same batch. Updates have the dtypes of the gradients. The state is a tuple of a
      :class:`TNTState`, a :class:`QuadraticModelState`, and the states of weight decay and learning rate. Under
      :class:`optax.MultiSteps` the model would be that of the last mini-batch alone: use ``microbatches`` of
      :func:`value_and_sampled_grad` instead.

      A step that is not finite gets a zero update and is counted in the states. No parameter is updated before there
      are statistics.

    Raises:
      ValueError: as :func:`tnt` and :func:`scale_by_quadratic_model`.
      TypeError: as :func:`tnt` and :func:`scale_by_quadratic_model`.

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

    References:
      Ren and Goldfarb, `Tensor Normal Training for Deep Learning Models <https://arxiv.org/abs/2106.02925>`_, 2021.

      Martens and Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate Curvature
      <https://arxiv.org/abs/1503.05671>`_, 2015.
    """
    checks.check_number("learning_rate", learning_rate, 0, closed=True, schedule=True)
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
        # `tnt_direction` raises the error for the state of another optimizer.
        before: Any = state if isinstance(state, tuple) and len(state) == 4 else (state, None)
        (tnt_before, model_before, *others), gradient = before, widen(updates)
        after: Any
        p, tnt_after = tnt_direction.update(gradient, tnt_before, params, **extra)
        u, after = model.update(p, model_before, params, grad=gradient, **extra)
        u, others = decay_and_factor.update(u, tuple(others), widen(params))
        u = optax.tree.cast_like(u, updates)
        # A step that the model rejected has no decay either. A non-finite `learning_rate` rejects a step as well.
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
