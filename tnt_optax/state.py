"""The optimizer's state, its checks, and how to find it inside the states of wrappers."""

import collections
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, keystr

from tnt_optax import checks
from tnt_optax.blocks import Block
from tnt_optax.factors import Dense, Diagonal
from tnt_optax.numerics import as_float, float32_or_better
from tnt_optax.views import TensorView


class TNTState(NamedTuple):
    r"""The state of :func:`scale_by_tnt`.

    Trees like the parameters are in float32 (float64 for float64 parameters). Counters are int32 scalars.

    Attributes:
      count: :math:`t`, the number of updates.
      statistics_count: :math:`n`, the number of sampled gradients in the contractions.
      momentum: :math:`m`, a tree like the parameters. None with ``momentum=None``.
      contractions: a tree like the parameters. For each parameter it has a tuple with an array for each mode: the
        moving average :math:`C_i` of the mode-:math:`i` second-moment matrix of the sampled gradients, of shape
        ``(..., d_i, d_i)``, or ``(..., d_i)`` for a diagonal mode.
      inverses: the same for the cached damped inverses :math:`P_i = (U_i + \epsilon I)^{-1}`. Zeros before the first
        inverse update.
      damping: a floating-point scalar, :math:`\epsilon` at the last inverse update (before the first: at step 0).
      refreshed_at: a tree like the parameters, of int32 arrays of the shape of the batch axes (without batch axes,
        scalars): :math:`t` at the last inverse update, -1 before the first.
      bounded_steps: the number of steps that the trust radius shortened.
      rejected_gradients: the number of steps whose gradient, direction or update was not finite. Their update was
        zero, and the momentum kept its value.
      rejected_sampled_gradients: the number of sampled gradients that were not finite. They are not in the
        contractions.
      rejected_inverses: the number of inverse updates, of single parameters or single tensors of a stack, that were not
        finite. The parameter kept its inverses.
    """

    count: jax.Array
    statistics_count: jax.Array
    momentum: Any
    contractions: Any
    inverses: Any
    damping: jax.Array
    refreshed_at: Any
    bounded_steps: jax.Array
    rejected_gradients: jax.Array
    rejected_sampled_gradients: jax.Array
    rejected_inverses: jax.Array


class QuadraticModelState(NamedTuple):
    r"""The state of :func:`scale_by_quadratic_model`.

    Counters are int32 scalars. Other scalars are in float32 or better.

    Attributes:
      count: :math:`t`, the number of updates.
      step: :math:`u_{t-1}`, the last step, a tree like the parameters in float32 or better. Zeros if there is none;
        None with ``use_momentum=False``.
      damping: :math:`\lambda` for the next step.
      slope: :math:`\langle g, u \rangle`, the slope of the loss of the last batch along the last step. The slope of the
        next batch is compared with it.
      coefficients: :math:`c_1` and :math:`c_2` of the last step, its learning rate and its momentum, of shape (2,);
        with ``use_momentum=False``, of shape (1,).
      predicted_reduction: :math:`-M(-u)`, the reduction of the loss of the batch that the model predicts for the last
        step.
      true_reduction: the measured reduction, of the last accepted step at which it was measured.
      reduction_ratio: ``true_reduction`` divided by the prediction of the model for the same step, with the gradient of
        the batch. Of the last step whose prediction exceeded the rounding error of the loss.
      bounded_steps: the number of steps that the trust radius shortened.
      rejected_steps: the number of steps that were not finite, whose model had no minimum, or after which the measured
        loss was higher by more than 1%. Their update was zero.
    """

    count: jax.Array
    step: Any
    damping: jax.Array
    slope: jax.Array
    coefficients: jax.Array
    predicted_reduction: jax.Array
    true_reduction: jax.Array
    reduction_ratio: jax.Array
    bounded_steps: jax.Array
    rejected_steps: jax.Array


def init_state(blocks: Any, momentum: Any, contractions: Any, damping: jax.Array) -> TNTState:
    """The state before the first step, with zero inverses and counters."""
    inverses = jax.tree.map(jnp.zeros_like, contractions)
    refreshed_at = jax.tree.map(lambda block: jnp.full(block.batch_shape, -1, jnp.int32), blocks)
    # An array for each counter, because a state that holds an array twice cannot be donated.
    t, n, *others = (jnp.zeros([], jnp.int32) for _ in range(6))
    return TNTState(t, n, momentum, contractions, inverses, damping, refreshed_at, *others)


def init_model_state(params: optax.Params, damping: jax.Array, use_momentum: bool) -> QuadraticModelState:
    """The state of a quadratic model before the first step. As in `init_state`, each field has an array of its own."""
    step = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=float32_or_better(x)), params) if use_momentum else None
    counters = [jnp.zeros([], jnp.int32) for _ in range(3)]
    coefficients = as_float(jnp.zeros(2 if use_momentum else 1))
    slope, *reductions = (as_float(jnp.zeros([])) for _ in range(4))
    # A copy: donating the state must not delete an array that the caller passed as damping.
    return QuadraticModelState(counters[0], step, jnp.array(damping), slope, coefficients, *reductions, *counters[1:])


_OTHER_STATE = "Is it the state of another optimizer, or of tnt_optax 0.1, whose states cannot be used any more?"


def check_state(state: Any) -> TNTState:
    """`state`, or an error if it is not a `TNTState`."""
    if isinstance(state, TNTState):
        return state
    fields = f" with the fields {state._fields}" if hasattr(state, "_fields") else ""
    raise TypeError(
        f"state: expected a TNTState with the fields {TNTState._fields}, got {type(state).__name__}{fields}. "
        f"{_OTHER_STATE} Make a new one with tx.init(params)."
    )


def check_model_state(state: Any, use_momentum: bool) -> QuadraticModelState:
    """`state`, or an error if it is not a `QuadraticModelState` with, or without, the step before."""
    if not isinstance(state, QuadraticModelState):
        raise TypeError(f"state: expected a QuadraticModelState, got {type(state).__name__}: call tx.init(params).")
    if use_momentum == (state.step is None):
        raise TypeError(f"state: expected one for use_momentum={use_momentum}, got another: call tx.init(params).")
    return state


def match_updates(updates: optax.Updates, state: TNTState) -> optax.Updates:
    """`updates` in the structure of the state; for the errors, see `checks.match`."""
    if state.momentum is not None:
        return checks.match("updates", updates, state.momentum, "the optimizer's state")
    # `match_factors` compares the shapes.
    return checks.match("updates", updates, state.refreshed_at, "the optimizer's state", shapes=False)


def match_factors(blocks: Any, state: TNTState) -> TNTState:
    """The state with its factors as one tuple for each of the blocks, which form a tree like the updates.

    After a step, flax.nnx.Optimizer holds the tuples as mappings {0: C_1, 1: C_2}; a checkpoint may hold lists.

    Raises:
      ValueError: the factors are not those of the blocks.
    """
    leaves, structure = jax.tree.flatten(blocks)

    def of_field(name: str) -> list[tuple[jax.Array, ...]]:
        try:
            arrays = [tuple(jax.tree.leaves(tree)) for tree in structure.flatten_up_to(getattr(state, name))]
        except (ValueError, TypeError):
            raise ValueError(f"updates: expected the structure of the optimizer's state, got {structure}.") from None
        for block, of_block in zip(leaves, arrays, strict=True):
            expected = (block.batch_shape,) if name == "refreshed_at" else block.factor_shapes
            if (shapes := tuple(x.shape for x in of_block)) != expected:
                raise ValueError(
                    f"state: expected, for the parameter {block.name} of shape {block.shape} viewed by {block.view}, "
                    f"{name} of the shapes {expected}, got {shapes}. Is it the state of another model, or of other "
                    f"`views` or another `max_dim`?"
                )
        return arrays

    times = [time for (time,) in of_field("refreshed_at")]
    contractions, inverses = of_field("contractions"), of_field("inverses")
    fields = ("contractions", contractions), ("inverses", inverses), ("refreshed_at", times)
    return state._replace(**{name: structure.unflatten(values) for name, values in fields})


def describe_state(state: TNTState) -> list[tuple[Block, tuple[jax.Array, ...], jax.Array]]:
    """What a state alone tells about each parameter: a `Block`, its contractions, and when it was refreshed.

    The names are unique. The view has the batch axes first, and then one axis for each mode.
    """
    times, structure = jax.tree.flatten(state.refreshed_at)
    described = []
    for name, time, tree in zip(_names(state), times, structure.flatten_up_to(state.contractions), strict=True):
        arrays, batch = tuple(jax.tree.leaves(tree)), time.ndim
        shape = (*time.shape, *(x.shape[-1] for x in arrays))
        view = TensorView(tuple((batch + mode,) for mode in range(len(arrays))), tuple(range(batch)))
        stored = tuple(Dense() if x.ndim == batch + 2 else Diagonal() for x in arrays)
        described.append((Block(name, shape, arrays[0].dtype, view, stored), arrays, time))
    return described


def _names(state: TNTState) -> list[str]:
    """The path of every parameter, such as "dense/kernel"; in full where two would be the same."""
    # flax.nnx.Optimizer's own state has every array in a box, a variable, which is no part of a parameter's path.
    ((box, _),) = jax.tree_util.tree_leaves_with_path(state.count)
    paths = [path[: len(path) - len(box)] for path, _ in jax.tree_util.tree_leaves_with_path(state.refreshed_at)]
    simple = [keystr(path, simple=True, separator="/") for path in paths]
    often = collections.Counter(simple)
    return [keystr(path) if often[name] > 1 else name for path, name in zip(paths, simple, strict=True)]


def find_states(opt_state: optax.OptState, *kinds: type[Any]) -> list[tuple[KeyPath, Any]]:
    """All states of these kinds in `opt_state` and their paths, whatever they are chained with or wrapped in.

    Raises:
      ValueError: there is none.
    """
    nodes = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=lambda node: isinstance(node, kinds))
    found = [(path, node) for path, node in nodes if isinstance(node, kinds)]
    if not found:
        names = " or a ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"opt_state: expected a {names} in it, found none. {_OTHER_STATE}")
    return found
