"""The warm start of the paper: statistics before the first step."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.core
import optax

from tnt_optax.sampled_grad import is_function
from tnt_optax.state import TNTState, find_states
from tnt_optax.transform import WarmStart


def warm_start(
    tx: optax.GradientTransformation,
    opt_state: optax.OptState,
    params: optax.Params,
    sampled_grads: Iterable[Any],
) -> optax.OptState:
    """Estimates the statistics before the first step, and computes the inverses from them.

    The contractions become the plain mean over all sampled gradients, including those that they already contain. The
    paper makes one pass over the data, at the initial parameters. Ten batches are usually enough.

    Args:
      tx: the optimizer. Its :class:`TNTState` may be inside chained, masked, partitioned or injected states.
      opt_state: its state.
      params: the parameters at which the sampled gradients were computed.
      sampled_grads: an iterable, preferably a generator, of :class:`SampledGrad` objects or of trees like ``params``.
        They are read one by one, so that only one is in memory at a time.

    Returns:
      The new ``opt_state``. Only the :class:`TNTState` changes, without its momentum and its number of steps.

    Raises:
      TypeError: ``sampled_grads`` is a single sampled gradient or function, not an iterable.
      ValueError: ``sampled_grads`` is empty, ``opt_state`` contains no :class:`TNTState`, or ``tx`` does not update it.
        The errors of ``update`` for a sampled gradient that does not fit are raised too.

    Example:
      >>> import jax, jax.numpy as jnp, tnt_optax
      >>> forward = lambda params, inputs: inputs @ params
      >>> value_and_grads = jax.jit(tnt_optax.value_and_sampled_grad(forward, tnt_optax.Categorical()))
      >>> params, batches = jnp.ones((4, 3)), [(jnp.eye(4), jnp.array([0, 1, 2, 0]))] * 5
      >>> keys = jax.random.split(jax.random.key(0), 5)
      >>> sampled_grads = (value_and_grads(params, *batch, key)[2] for batch, key in zip(batches, keys))
      >>> tx = tnt_optax.adaptive_tnt()
      >>> opt_state = tnt_optax.warm_start(tx, tx.init(params), params, sampled_grads)
      >>> int(opt_state[0].statistics_count)
      5

    References:
      Ren and Goldfarb, `Tensor Normal Training for Deep Learning Models <https://arxiv.org/abs/2106.02925>`_, 2021.
    """
    if is_function(sampled_grads) or not isinstance(sampled_grads, Iterable) or isinstance(sampled_grads, Mapping):
        raise TypeError(
            "sampled_grads: expected an iterable of sampled gradients, for example a list or a generator, got "
            f"{type(sampled_grads).__name__}."
        )
    before = [state.statistics_count for _, state in find_states(opt_state, TNTState)]
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        raise ValueError(
            "tx: expected a GradientTransformationExtraArgs, which forwards sampled gradients to its TNTState, got "
            f"{type(tx).__name__}. {_WARM_START_INSIDE}"
        )

    empty = True
    for gradient in sampled_grads:
        empty = False
        # A SampledGrad is a pytree, and so compiled with the rest; any other function is called first.
        if is_function(gradient) and jax.tree_util.all_leaves([gradient]):
            gradient = gradient()
        opt_state = _advance(tx, opt_state, params, gradient, "absorb")
    if empty:
        raise ValueError("sampled_grads: expected at least one sampled gradient, got an empty iterable.")
    opt_state = _advance(tx, opt_state, params, None, "refresh")

    for old, (_, state) in zip(before, find_states(opt_state, TNTState), strict=True):
        if not isinstance(state.statistics_count, jax.core.Tracer) and int(old) == int(state.statistics_count):
            raise ValueError(
                "tx: expected an optimizer that updates its TNTState, but it absorbed none of the sampled gradients. "
                f"Either none of them was finite, or a wrapper did not forward them. {_WARM_START_INSIDE}"
            )
    return opt_state


# At module level, so that another warm start of the same optimizer compiles nothing.
@functools.partial(jax.jit, static_argnames=("tx", "phase"))
def _advance(tx: Any, opt_state: optax.OptState, params: optax.Params, gradient: Any, phase: WarmStart) -> Any:
    _, new = tx.update(optax.tree.zeros_like(params), opt_state, params, sampled_grads=gradient, warm_start=phase)
    # The states of other transformations, which count steps, must not change.
    is_ours = lambda node: isinstance(node, TNTState)  # noqa: E731
    return jax.tree.map(lambda o, n: n if is_ours(o) else o, opt_state, new, is_leaf=is_ours)


_WARM_START_INSIDE = (
    "Warm-start the transformation inside it with its own state (for optax.MultiSteps: the wrapped optimizer with "
    "`opt_state.inner_opt_state`)."
)
