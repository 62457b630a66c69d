"""Statistics before the first step: the paper's warm start."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.core
import optax
from jax.tree_util import Partial

from tnt_optax import checks, states
from tnt_optax.transform import WarmStart


def warm_start(
    tx: optax.GradientTransformation,
    opt_state: optax.OptState,
    params: optax.Params,
    sampled_grads: Iterable[Any],
) -> optax.OptState:
    """Estimates the statistics before the first step, and computes the inverses from them.

    The contractions become the plain mean over all sampled gradients (together with what they had absorbed before).
    The paper makes one pass over the data at the initial parameters; ten batches already serve.

    Args:
      tx: the optimizer; the `TNTState` may lie inside chained, masked, partitioned or injected states.
      opt_state: its state. Only the statistics and the inverses in it change, and when these were computed.
      params: the parameters at which the sampled gradients were taken.
      sampled_grads: an iterable, best a generator, of trees like `params` or of the functions that
        `value_and_sampled_grad` returns. It is read one by one, so that only one is alive at a time.

    Returns:
      The new `opt_state`.

    Raises:
      ValueError: `sampled_grads` is empty, `opt_state` holds no `TNTState`, or `tx` did not hand it on to it; and
        what `update` raises for a sampled gradient that does not fit.
    """
    if (
        checks.is_function(sampled_grads)
        or not isinstance(sampled_grads, Iterable)
        or isinstance(sampled_grads, Mapping)
    ):
        raise TypeError(
            "sampled_grads: expected an iterable of sampled gradients, for example a list or a generator, got "
            f"{type(sampled_grads).__name__}."
        )
    before = states.find(opt_state)
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        raise ValueError(
            "tx: expected a GradientTransformationExtraArgs, which hands sampled gradients on to its TNTState, got "
            f"{type(tx).__name__}. {_WARM_START_INSIDE}"
        )

    empty = True
    for gradient in sampled_grads:
        empty = False
        # A Partial is a pytree, and so compiled with the rest; another function has to be called first.
        if checks.is_function(gradient) and not isinstance(gradient, Partial):
            gradient = gradient()
        opt_state = _advance(tx, opt_state, params, gradient, "absorb")
    if empty:
        raise ValueError("sampled_grads: expected at least one sampled gradient, got an empty iterable.")
    opt_state = _advance(tx, opt_state, params, None, "refresh")

    for old, new in zip(before, states.find(opt_state), strict=True):
        traced = isinstance(new.tnt.statistics_count, jax.core.Tracer)
        if not traced and int(new.tnt.statistics_count) == int(old.tnt.statistics_count):
            raise ValueError(
                "tx: expected an optimizer that updates its TNTState, but it absorbed none of the sampled gradients. "
                f"Either none of them was finite, or a wrapper did not hand them on. {_WARM_START_INSIDE}"
            )
    return opt_state


# Not inside of `warm_start`, so that another start of the same optimizer, from another seed, compiles nothing.
@functools.partial(jax.jit, static_argnames=("tx", "stage"))
def _advance(tx: Any, opt_state: optax.OptState, params: optax.Params, gradient: Any, stage: WarmStart) -> Any:
    _, new = tx.update(optax.tree.zeros_like(params), opt_state, params, sampled_grads=gradient, warm_start=stage)
    # Nothing else: whatever counts steps (schedules, say) has not seen one.
    return states.replace_statistics(opt_state, new)


_WARM_START_INSIDE = (
    "Warm-start the transformation inside it with its own state (for optax.MultiSteps: the wrapped optimizer with "
    "`opt_state.inner_opt_state`)."
)
