"""Numbers that describe the state of the optimizer, for a logger."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from tnt_optax import checks, sharding
from tnt_optax.blocks import Block, map_normalized_factors
from tnt_optax.factors import Factor
from tnt_optax.numerics import as_float, float32_or_better
from tnt_optax.state import QuadraticModelState, TNTState, describe_state, find_states


def diagnostics(opt_state: optax.OptState, *, grads: Any = None, updates: Any = None) -> dict[str, jax.Array]:
    r"""Numbers that describe the factors of all parameters, the steps, and the quadratic model, by name.

    The state does not change. The eigenvalues of all factors are computed, which takes longer than an inverse update:
    do not call it at each step. It can be called inside :func:`jax.jit` and outside. For a state that is stacked by
    :func:`jax.vmap`, call it inside :func:`jax.vmap`. On a mesh of devices, each device gets all numbers.

    For mode i = 0, 1, ... of each parameter there are these numbers. :math:`U` is the factor of Eq. (5) for the current
    statistics, :math:`l_1 \le \dots \le l_d` are its eigenvalues (of a diagonal factor: its elements), and
    :math:`\epsilon` is the damping at the last inverse update. They are scalars, or have the batch axes of a
    :class:`TensorView`, in float32 (float64 for float64 parameters):

      - ``<path>/mode_<i>/trace``: :math:`\operatorname{tr} U`.
      - ``<path>/mode_<i>/mean_eigenvalue``: :math:`\operatorname{tr} U / d`, the same for all modes of a parameter.
      - ``<path>/mode_<i>/smallest_eigenvalue``, ``<path>/mode_<i>/largest_eigenvalue``: :math:`l_1` and :math:`l_d`.
      - ``<path>/mode_<i>/condition``: :math:`l_d / l_1`; infinity if :math:`U` is singular or 0.
      - ``<path>/mode_<i>/damped_condition``: :math:`(l_d + \epsilon) / (l_1 + \epsilon)`, the condition number of the
        matrix that is inverted; 1 for :math:`U = 0`.
      - ``<path>/mode_<i>/share_below_damping``: the share of the eigenvalues that are smaller than :math:`\epsilon`; 1
        for :math:`U = 0`.

    The eigenvalues of a dense factor have rounding errors of about :math:`d\, l_d` times the machine epsilon of the
    dtype. Smaller and negative ones count as 0.

    For each parameter:

      - ``<path>/age``: int32; the number of steps since its inverses were updated: 1 after the step that updated them,
        0 after a warm start, -1 before the first inverse update.
      - ``<path>/update_to_gradient``: the norm of the update divided by the norm of the gradient; infinity if only the
        gradient is 0, 0 if both are.
      - ``<path>/cosine``: the cosine of the angle between update and gradient: -1 for gradient descent, 0 if one of
        them is 0.

    The last two need ``grads`` and ``updates``. A parameter without elements has no numbers. For the whole optimizer:

      - ``tnt/steps``: int32; the number of steps.
      - ``tnt/absorbed``: int32; the number of sampled gradients in the statistics.
      - ``tnt/damping``: :math:`\epsilon`.
      - ``tnt/bounded_steps``: int32; the number of steps that the trust radius shortened.
      - ``tnt/bounded_share``: the same divided by the number of steps; 0 before the first.
      - ``tnt/rejected_gradients``, ``tnt/rejected_sampled_gradients``, ``tnt/rejected_inverses``: int32; see
        :class:`TNTState`.

    For a quadratic model, about the last step :math:`u_t = c_1 p_t + c_2 u_{t-1}` (see
    :func:`scale_by_quadratic_model`):

      - ``quadratic_model/steps``: int32; the number of steps.
      - ``quadratic_model/learning_rate``, ``quadratic_model/momentum``: :math:`c_1` and :math:`c_2`; 0 without a step.
      - ``quadratic_model/damping``: :math:`\lambda` for the next step.
      - ``quadratic_model/predicted_reduction``: the reduction of the loss of the batch that the model predicts.
      - ``quadratic_model/true_reduction``: the measured reduction, of the last accepted step at which it was
        measured.
      - ``quadratic_model/reduction_ratio``: the measured reduction of that step divided by the predicted one; 0 before
        the first.
      - ``quadratic_model/bounded_steps``, ``quadratic_model/rejected_steps``: int32; see :class:`QuadraticModelState`.

    ``<path>`` is ``jax.tree_util.keystr(path, simple=True, separator="/")``, such as ``dense/kernel``. If that is the
    same for two parameters, it is ``keystr(path)``. If ``opt_state`` contains several states of one kind (in
    :func:`optax.partition`, for example), the path of each state precedes its names.

    Args:
      opt_state: the state of :func:`tnt` or :func:`adaptive_tnt`, or any state that contains the state of
        :func:`scale_by_tnt` or :func:`scale_by_quadratic_model`: chained, masked, partitioned or injected.
      grads: None, or the gradients of the last step, a tree like the parameters. Not used without a :class:`TNTState`.
      updates: None, or the updates that ``update`` returned for them.

    Returns:
      A dictionary from names to arrays.

    Raises:
      ValueError: ``opt_state`` contains no state of this library, only one of ``grads`` and ``updates`` is given, or
        one of them has another structure or shape than the parameters.
      TypeError: ``opt_state`` is stacked.

    Example:
      >>> import jax.numpy as jnp, tnt_optax
      >>> tx, params = tnt_optax.tnt(0.03, fisher="empirical"), {"kernel": jnp.ones((4, 3))}
      >>> updates, opt_state = tx.update(params, tx.init(params), params)
      >>> values = tnt_optax.diagnostics(opt_state, grads=params, updates=updates)
      >>> int(values["tnt/steps"]), int(values["kernel/age"]), bool(values["kernel/mode_0/condition"] > 1)
      (1, 1, True)
    """
    if (grads is None) != (updates is None):
        given, missing = ("grads", "updates") if updates is None else ("updates", "grads")
        raise ValueError(f"{missing}: expected together with {given}, got None.")
    return sharding.replicated(_read)(opt_state, grads, updates)


def _read(opt_state: optax.OptState, grads: Any, updates: Any) -> dict[str, jax.Array]:
    found = find_states(opt_state, TNTState, QuadraticModelState)
    kinds = [type(state) for _, state in found]
    values: dict[str, jax.Array] = {}
    for path, state in found:
        if (shape := _array(state.count).shape) != ():
            raise TypeError(
                f"opt_state: expected the state of one optimizer, got a stack of shape {shape}: call diagnostics "
                "inside jax.vmap."
            )
        if isinstance(state, TNTState):
            numbers = _of_the_optimizer(state) | _of_the_factors(state) | _of_the_updates(state, grads, updates)
        else:
            numbers = _of_the_model(state)
        several = kinds.count(type(state)) > 1
        prefix = keystr(path, simple=True, separator="/") + "/" if several else ""
        values |= {prefix + name: value for name, value in numbers.items()}
    return values


def _of_the_model(state: QuadraticModelState) -> dict[str, jax.Array]:
    same = ("damping", "predicted_reduction", "true_reduction", "reduction_ratio", "bounded_steps", "rejected_steps")
    c = _array(state.coefficients)
    values = {"steps": _array(state.count), "learning_rate": c[0], "momentum": c[1] if len(c) > 1 else 0 * c[0]}
    values |= {name: _array(getattr(state, name)) for name in same}
    return {f"quadratic_model/{name}": value for name, value in values.items()}


def _of_the_optimizer(state: TNTState) -> dict[str, jax.Array]:
    rejected = ("rejected_gradients", "rejected_sampled_gradients", "rejected_inverses")
    fields = {"steps": "count", "absorbed": "statistics_count"}
    fields |= {name: name for name in ("damping", "bounded_steps", *rejected)}
    values = {f"tnt/{name}": _array(getattr(state, field)) for name, field in fields.items()}
    steps = as_float(jnp.maximum(values["tnt/steps"], 1))
    return values | {"tnt/bounded_share": as_float(values["tnt/bounded_steps"]) / steps}


def _of_the_factors(state: TNTState) -> dict[str, jax.Array]:
    described = [one for one in describe_state(state) if math.prod(one[0].shape)]
    blocks, contractions = [block for block, *_ in described], [c for _, c, _ in described]
    count, damping, values = _array(state.count), _array(state.damping), {}

    def of_factor(factor: Factor, matrix: jax.Array) -> dict[str, jax.Array]:
        return _of_a_factor(factor, matrix, damping.astype(matrix.dtype))

    for (block, _, refreshed_at), modes in zip(
        described, map_normalized_factors(of_factor, blocks, contractions), strict=True
    ):
        for mode, numbers in enumerate(modes):
            values |= {f"{_prefix(block)}mode_{mode}/{name}": value for name, value in numbers.items()}
        first = jnp.min(refreshed_at)  # Of a stack, the inverses that were updated first.
        values[f"{_prefix(block)}age"] = jnp.where(first < 0, -1, count - first)
    return values


def _of_the_updates(state: TNTState, grads: Any, updates: Any) -> dict[str, jax.Array]:
    if grads is None:
        return {}
    # Without momentum the shapes of the parameters are not known.
    shapes, like = state.momentum is not None, state.refreshed_at if state.momentum is None else state.momentum
    grads, updates = (
        jax.tree.leaves(checks.match(name, tree, like, "the optimizer's state", shapes=shapes))
        for name, tree in (("grads", grads), ("updates", updates))
    )
    values = {}
    for (block, *_), g, u in zip(describe_state(state), grads, updates, strict=True):
        if g.size:
            ratio, cosine = _compare(u, g)
            values |= {f"{_prefix(block)}update_to_gradient": ratio, f"{_prefix(block)}cosine": cosine}
    return values


def _prefix(block: Block) -> str:
    return f"{block.name}/" if block.name else ""


def _of_a_factor(factor: Factor, matrix: jax.Array, eps: jax.Array) -> dict[str, jax.Array]:
    spectrum, trace = factor.spectrum(matrix), factor.trace(matrix)
    smallest, largest = spectrum[0], spectrum[-1]
    return {
        "trace": trace,
        "mean_eigenvalue": trace / len(matrix),
        "smallest_eigenvalue": smallest,
        "largest_eigenvalue": largest,
        "condition": jnp.where(smallest > 0, largest / jnp.where(smallest > 0, smallest, 1), jnp.inf),
        "damped_condition": (largest + eps) / (smallest + eps),
        "share_below_damping": jnp.mean((spectrum < eps).astype(matrix.dtype)),
    }


def _compare(u: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """|u| / |g| and the cosine of u and g."""
    dtype = jnp.promote_types(float32_or_better(u), float32_or_better(g))
    (u, scale_u, norm_u), (g, scale_g, norm_g) = (_normed(x.astype(dtype)) for x in (u, g))
    ratio = jnp.where(norm_u > 0, (scale_u / scale_g) * (norm_u / norm_g), 0)
    cosine = jnp.vdot(u, g, precision=jax.lax.Precision.HIGHEST) / jnp.where(norm_u * norm_g > 0, norm_u * norm_g, 1)
    # An update that is NaN has no norm.
    return jnp.where(jnp.isnan(norm_u), norm_u, ratio), cosine


def _normed(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x = scale * y; y, scale, and |y|, which does not overflow."""
    largest = jnp.max(jnp.abs(x))
    scale = jnp.where(largest > 0, largest, 1)
    y = x / scale
    return y, scale, jnp.sqrt(jnp.sum(jnp.square(y)))


def _array(box: Any) -> jax.Array:
    """A counter, which may be in a box (a Flax variable)."""
    (array,) = jax.tree.leaves(box)
    return array
