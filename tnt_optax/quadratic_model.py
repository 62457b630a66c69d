"""A step whose length and momentum come from the exact quadratic model of the batch, without a learning rate.

At parameters theta with the gradient g, the model of the change of the loss at theta - u is

    M(-u) = -g^T u + 1/2 u^T A u,    A = J^T H J + R + lambda I,    u = c_1 p_t + c_2 u_(t-1),

with the exact Fisher matrix J^T H J of the batch and the Hessian R of the regularizer. p_t is the incoming direction,
u_(t-1) the step before: c_1 is a learning rate, and c_2 a momentum (Martens & Grosse 2015, section 7).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from tnt_optax import checks, numerics
from tnt_optax.numerics import as_float, count_events, evaluate_schedule, inner_product, symmetric_products, widen
from tnt_optax.options import Number, NumberOrSchedule
from tnt_optax.sampled_grad import check_sampled_grads
from tnt_optax.state import QuadraticModelState, check_model_state, init_model_state

# The loss at the new parameters is measured at each of the first steps, when lambda may be far off, then at every 5th.
_FIRST_STEPS, _MEASURING_PERIOD = 20, 5
_MOMENTUM_RANGE = 0.25, 1.0  # Of the limit of |c_2|.
_LARGEST_RISE = 0.01  # Of the loss, relative to its size. A smaller rise may be a rounding error.
_DAMPING_RANGE = 1e-8, 1e8  # Of lambda, relative to its initial value.


def scale_by_quadratic_model(
    *,
    initial_damping: Number = 0.1,
    adaptive_damping: bool = True,
    use_momentum: bool = True,
    trust_radius: NumberOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The minimizer of the batch's quadratic model, for the directions of any transformation before it.

    .. math::

      u_t = c_1 p_t + c_2 u_{t-1} \quad \text{minimizes} \quad
      M(-u) = -\langle g, u \rangle + \tfrac12 \langle u, A u \rangle, \qquad A = J^\top H J + R + \lambda I

    :math:`p_t` is the incoming direction, :math:`u_{t-1}` the step before, :math:`g` the gradient of the mean loss,
    :math:`J^\top H J` the exact Fisher matrix of the batch (see :meth:`SampledGrad.fisher_products`), and :math:`R` the
    Hessian of the regularizer. :math:`c_1` is a learning rate and :math:`c_2` a momentum, so that momentum in the
    direction itself is not needed.

    Like every ``scale_by_*`` transformation it does not negate: chain :func:`optax.scale_by_learning_rate` behind it.
    The step follows the noise of its batch: let that learning rate, a factor of the step, fall from 1 to 0 at the end
    of a training.

    Args:
      initial_damping: :math:`\lambda \ge 0` at the first step, on the scale of the eigenvalues of the Fisher matrix. It
        limits the steps while the Fisher matrix of a batch says little about the loss.
      adaptive_damping: whether :math:`\lambda` is adapted, by the rule of Levenberg and Marquardt. The loss is computed
        at the new parameters (a forward pass, in :func:`jax.lax.cond`) at each of the first 20 steps, then at every
        fifth, and after a rejected one. If the loss rises by more than 1%, the step is rejected and :math:`\lambda` is
        multiplied by 4. Otherwise the reduction of the loss is compared with the prediction :math:`-M(-u)`: below 1/4
        of it, :math:`\lambda` is doubled; above 3/4, multiplied by 0.95; above 3/2, where :math:`\lambda` itself limits
        the step, halved. :math:`\lambda` is not reduced where it contributes less than 1% to :math:`\langle u, A u
        \rangle`. It is not changed where the prediction is less than the rounding error of the loss, and stays within a
        factor of :math:`10^8` of its initial value. With a ``loss`` that is linear in the outputs (a policy gradient)
        the comparison says nothing: pass False, and a ``trust_radius``. With False, :math:`\lambda` is
        ``initial_damping``, 0 is allowed, and :math:`u` is the minimizer itself.
      use_momentum: whether :math:`u_{t-1}` is a direction. Unless ``adaptive_damping`` is False, the momentum is
        limited to :math:`|c_2| \le \min(1, \max(1/4, \kappa))`. Here :math:`\kappa = (\langle g, u_{t-1} \rangle +
        \langle u_{t-1}, (J^\top H J + R)\, u_{t-1} \rangle) / \langle g_{t-1}, u_{t-1} \rangle` is the share of the
        last batch's slope along :math:`u_{t-1}` that this batch confirms. Without the limit, the minimizer of a small
        batch may be the difference of two large and almost parallel directions, which does not fit the next batch. With
        False, :math:`u` is a multiple of :math:`p`, and the state holds no tree.
      trust_radius: None, or :math:`r`: a number or a schedule of the step. :math:`u` is shortened where :math:`u^\top
        J^\top H J u > r^2`. To second order, :math:`u^\top J^\top H J u` is twice the KL divergence per example between
        the predictions before and after the step.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` whose state is a :class:`QuadraticModelState`. Its ``update``
      takes ``sampled_grads``, the :class:`SampledGrad` of the batch, and ``grad``, the gradient :math:`g`, a tree like
      the updates, where it is not ``sampled_grads.grads`` (because it was clipped, for example). Updates have the
      dtypes of :math:`p`. Inside :func:`optax.masked` and :func:`optax.partition` the model takes the other parameters
      as fixed.

      Where :math:`p` is 0, so is the update. Where something is not finite, the model has no minimum, or the measured
      loss rises by more than 1%, the step is rejected: its update is zero, it is counted, and the next step has no
      momentum.

    Raises:
      ValueError: a number is out of its range. From ``update``: ``sampled_grads`` is not a :class:`SampledGrad`, or a
        tree has another structure or shape than the state or the parameters of ``sampled_grads``.
      TypeError: an argument has a wrong type, a parameter is not real and floating, the state is of another
        transformation, or the model does not allow :meth:`SampledGrad.fisher_products`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, tnt_optax
      >>> forward = lambda params, inputs: inputs @ params
      >>> value_and_grads = tnt_optax.value_and_sampled_grad(forward, tnt_optax.Normal())
      >>> tx = optax.chain(
      ...     optax.scale_by_adam(), tnt_optax.scale_by_quadratic_model(), optax.scale_by_learning_rate(1.0))
      >>> params, inputs, targets = jnp.zeros((4, 3)), jnp.eye(4), jnp.ones((4, 3))
      >>> opt_state = tx.init(params)
      >>> loss, grads, sampled_grads = value_and_grads(params, inputs, targets, jax.random.key(0))
      >>> updates, opt_state = tx.update(grads, opt_state, params, sampled_grads=sampled_grads)
      >>> bool(sampled_grads.loss_at(optax.apply_updates(params, updates)) < loss)
      True

    References:
      Martens and Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate Curvature
      <https://arxiv.org/abs/1503.05671>`_, 2015.
    """
    checks.check_number("initial_damping", initial_damping, 0, closed=True)
    checks.check_flags(adaptive_damping=adaptive_damping, use_momentum=use_momentum)
    if trust_radius is not None:
        checks.check_number("trust_radius", trust_radius, 0, schedule=True)

    def init(params: optax.Params) -> QuadraticModelState:
        checks.check_floating("params", params)
        return init_model_state(params, as_float(initial_damping), use_momentum)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        grad: Any = None,
        sampled_grads: Any = None,
        warm_start: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, QuadraticModelState]:
        del params, extra_args
        state = check_model_state(state, use_momentum)
        if warm_start is not None:
            return updates, state
        batch = check_sampled_grads(sampled_grads)
        p = widen(checks.match("updates", updates, state.step, "the optimizer's state") if use_momentum else updates)
        own_gradient = widen(checks.match("sampled_grads.grads", batch.grads, p, "the updates"))
        g = own_gradient if grad is None else widen(checks.match("grad", grad, p, "the updates"))
        damping = state.damping if adaptive_damping else as_float(initial_damping)

        # Directions are scaled to a largest element of 1, so that their size makes no product over- or underflow.
        directions, lengths = zip(*map(_normalized, [p, state.step] if use_momentum else [p]), strict=True)
        fisher, squares = batch.fisher_products(directions), symmetric_products(directions, directions)
        undamped = fisher + batch.regularizer_products(directions)
        curvature = undamped + damping * squares
        slopes = jnp.stack([inner_product(d, g) for d in directions])
        slope_before = (slopes[-1] + undamped[-1, -1] * lengths[-1]) * lengths[-1]
        momentum_bound = _largest_momentum(slope_before, state.slope) * lengths[-1] if adaptive_damping else jnp.inf
        c = _minimizer(curvature, slopes, momentum_bound, numerics.epsilon(p))
        c, bounded = _bounded(c, fisher, trust_radius, state.count)
        predicted = jnp.sum(c * slopes) - _square(curvature, c) / 2
        numbers = jnp.concatenate([jnp.ravel(x) for x in (curvature, slopes, c, predicted, jnp.stack(lengths))])
        finite = jnp.all(jnp.isfinite(numbers)) & (jnp.sum(jnp.abs(c)) <= numerics.largest_number(updates))
        # A direction of 0 (before there are statistics, for example) gives no step, and is not counted as rejected.
        nothing = finite & (lengths[0] == 0)
        minimum = finite & (curvature[0, 0] > 0) & jnp.all(jnp.diagonal(curvature) >= 0) & ~nothing
        u = jax.tree.map(lambda *d: sum(x * y.astype(x.dtype) for x, y in zip(d, c, strict=True)), *directions)

        def measure() -> tuple[jax.Array, jax.Array]:
            theta = checks.match("params", batch.params, u, "the updates")
            new = jax.tree.map(lambda x, step: (x.astype(step.dtype) - step).astype(x.dtype), theta, u)
            # What the model predicts with the batch's own gradient, where `grad` is another one.
            own_slopes = slopes if grad is None else jnp.stack([inner_product(d, own_gradient) for d in directions])
            return as_float(batch.loss - batch.loss_at(new)), predicted + jnp.sum(c * (own_slopes - slopes))

        # Also after a step that was rejected: the same lambda would give the same step.
        due = (state.count < _FIRST_STEPS) | (state.count % _MEASURING_PERIOD == 0) | (state.coefficients[0] == 0)
        measured: Any = due if adaptive_damping else np.bool_(False)
        true, expected = numerics.cond(measured, measure, lambda: (state.true_reduction, predicted))
        epsilon = max(10 * numerics.epsilon(batch.loss), numerics.epsilon(batch.params))
        loss = jnp.abs(as_float(batch.loss))
        reliable = minimum & measured & (expected > epsilon * loss)
        worse = reliable & ~(true >= -_LARGEST_RISE * loss)  # Also where it is NaN.
        accepted = minimum & ~worse & (~measured | jnp.isfinite(true))
        ratio = true / jnp.where(reliable, expected, 1)
        if adaptive_damping:
            share = damping * _square(squares, c) / _square(curvature, c)
            low, high = (as_float(initial_damping) * bound for bound in _DAMPING_RANGE)
            damping = jnp.where(reliable, jnp.clip(_adapted(damping, ratio, share, worse), low, high), damping)
        u = jax.tree.map(lambda x: jnp.where(accepted, x, 0), u)
        return optax.tree.cast_like(u, updates), QuadraticModelState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            step=u if use_momentum else None,
            damping=damping,
            slope=jnp.where(accepted, jnp.sum(c * slopes), 0),
            coefficients=jnp.where(accepted, c / jnp.where(jnp.stack(lengths) > 0, jnp.stack(lengths), 1), 0),
            predicted_reduction=jnp.where(accepted, predicted, 0),
            true_reduction=jnp.where(measured & accepted, true, state.true_reduction),
            reduction_ratio=jnp.where(reliable & accepted, ratio, state.reduction_ratio),
            bounded_steps=count_events(state.bounded_steps, bounded & accepted),
            rejected_steps=count_events(state.rejected_steps, ~accepted & ~nothing),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _normalized(direction: Any) -> tuple[Any, jax.Array]:
    """The direction divided by the size of its largest element, and that size."""
    length = numerics.largest(direction)
    return jax.tree.map(lambda x: x / jnp.where(length > 0, length, 1).astype(x.dtype), direction), length


def _minimizer(curvature: jax.Array, slopes: jax.Array, bound: Any, epsilon: float) -> jax.Array:
    """c with curvature c = slopes, or, where |c_2| would exceed its bound, the minimizer at the bound.

    The first direction alone, where two are parallel to working precision, or the model has no minimum in their plane.
    """
    diagonal = jnp.diagonal(curvature)
    first = jnp.where(diagonal[0] == 0, 1, diagonal[0])
    if len(slopes) == 1:
        return slopes / first
    scale = lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1))  # To a unit diagonal.
    b, correlation = scale * slopes, scale[0] * curvature[0, 1] * scale[1]
    determinant = 1 - jnp.square(correlation)
    one = ~(determinant > 100 * epsilon) | (diagonal[1] == 0)
    second = jnp.where(one, 0, scale[1] * (b[1] - correlation * b[0]) / jnp.where(one, 1, determinant))
    second = jnp.clip(second, -bound, bound)
    return jnp.stack([(slopes[0] - curvature[0, 1] * second) / first, second])


def _largest_momentum(slope: jax.Array, before: jax.Array) -> jax.Array:
    """The share of the last batch's slope along the last step that this batch confirms, but at least a quarter.

    `slope` is that of this batch's model at the parameters before the step, if the whole step was taken. The share is 1
    without noise, and about 0 where the step followed nothing but the noise of its batch.
    """
    confirmed = jnp.where(before > 0, slope / jnp.where(before > 0, before, 1), 0)
    return jnp.clip(confirmed, *_MOMENTUM_RANGE)


def _bounded(c: jax.Array, fisher: jax.Array, trust_radius: Any, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The coefficients of a step with u^T F u at most r^2, and whether they were reduced."""
    if trust_radius is None:
        return c, jnp.bool_(False)
    radius, squared_norm = evaluate_schedule(trust_radius, t), _square(fisher, c)
    exceeds = ~(squared_norm <= jnp.square(radius))  # Also where a schedule returns NaN.
    return jnp.where(exceeds, jnp.abs(radius) * lax.rsqrt(jnp.where(exceeds, squared_norm, 1)), 1) * c, exceeds


def _adapted(damping: jax.Array, ratio: jax.Array, share: jax.Array, worse: jax.Array) -> jax.Array:
    """Lambda after a step with this ratio of true to predicted reduction, and this share of lambda in u^T A u."""
    smaller = jnp.where(ratio > 1.5, 0.5, jnp.where(ratio > 0.75, 0.95, 1))
    return damping * jnp.where(ratio >= 0.25, jnp.where(share > 0.01, smaller, 1), jnp.where(worse, 4, 2))


def _square(matrix: jax.Array, c: jax.Array) -> jax.Array:
    return jnp.sum(c[:, None] * matrix * c)  # A product of matrices might have a lower precision.
