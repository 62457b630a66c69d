"""What the states of this library's optimizers are, and where they lie in the state of an optimizer that wraps them."""

import dataclasses
from typing import Any, NamedTuple

import jax
import optax
from jax.tree_util import KeyPath, keystr

from tnt_optax.modes import Modes, batch_shape, mode_dims


class TNTState(NamedTuple):
    """The state of `scale_by_tnt`. All arrays are float32 (float64 for float64 parameters).

    Attributes:
      count: int32 scalar, t: how many updates were made.
      statistics_count: int32 scalar, n: how many sampled gradients the contractions have absorbed.
      momentum: a tree like the parameters, m.
      contractions: a tree like the parameters, which holds for each a tuple with one array for each mode: the
        moving average C_i of G^(i), of shape (*batch, d_i, d_i), or (*batch, d_i) for a mode that is longer than
        `max_dim`.
      inverses: the same for the cached P_i = (U_i + damping I)^-1.
    """

    count: jax.Array
    statistics_count: jax.Array
    momentum: Any
    contractions: Any
    inverses: Any


class RejectedState(NamedTuple):
    """How often `tnt` met numbers that are not finite; the second element of its state. All are int32 scalars.

    Such numbers never enter the `TNTState`, and training goes on.

    Attributes:
      gradients: steps whose gradient, direction or update was not finite: their update was zero.
      sampled_gradients: sampled gradients that were not absorbed.
      inverses: refreshes after which the inverses stayed as they were.
    """

    gradients: jax.Array
    sampled_gradients: jax.Array
    inverses: jax.Array


class HistoryState(NamedTuple):
    """What `diagnostics` tells of the past; the third element of `tnt`'s state. Nothing is computed from it.

    Attributes:
      bounded: int32 scalar, how many steps the trust radius shortened.
      refreshed: int32 array of shape (refresh_parts,), or (1,) without parts: the count t at which the inverses of each
        part were last computed and taken. -1: never, or the part has no parameters.
    """

    bounded: jax.Array
    refreshed: jax.Array


@dataclasses.dataclass(frozen=True)
class Found:
    """The state of one `tnt` or `scale_by_tnt`.

    Attributes:
      path: the place of the `TNTState`.
      tnt: the `TNTState` itself.
      rejected: the counters that stand beside it in the state of `tnt`; None for `scale_by_tnt`.
      history: the same.
    """

    path: KeyPath
    tnt: TNTState
    rejected: RejectedState | None = None
    history: HistoryState | None = None


def find(opt_state: optax.OptState) -> list[Found]:
    """All of them, in the order of `opt_state`, whatever they are chained with or wrapped in.

    Raises:
      ValueError: there is none.
    """
    found: list[Found] = []
    for path, node in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_is_ours):
        # The counters of `tnt` follow its TNTState: they are of the last one seen.
        if isinstance(node, TNTState):
            found.append(Found(path, node))
        elif isinstance(node, RejectedState):
            found[-1] = dataclasses.replace(found[-1], rejected=node)
        elif isinstance(node, HistoryState):
            found[-1] = dataclasses.replace(found[-1], history=node)
    if not found:
        raise ValueError(
            "opt_state: expected a TNTState somewhere in it, found none: is it the state of another optimizer?"
        )
    return found


def replace_statistics(old: optax.OptState, new: optax.OptState) -> optax.OptState:
    """`old`, with what tells of statistics and inverses from `new`: its `TNTState`s and `HistoryState`s."""

    def choose(o: Any, n: Any) -> Any:
        return n if isinstance(o, TNTState | HistoryState) else o

    return jax.tree.map(choose, old, new, is_leaf=_is_ours)


def in_tuples(name: str, matrices: Any, params: Any, view: Any) -> Any:
    """The matrices of each parameter as a tuple, or an error if they are not those of its view."""

    def of_one(path: KeyPath, x: jax.Array, v: Modes, some: Any) -> tuple[jax.Array, ...]:
        # After a step, flax.nnx.Optimizer holds them as mappings {0: C_1, 1: C_2}; a checkpoint may hold lists.
        leaves = tuple(jax.tree.leaves(some))
        batch, dims, shapes = batch_shape(v, x.shape), mode_dims(v, x.shape), [leaf.shape for leaf in leaves]
        fits = [shape in ((*batch, d), (*batch, d, d)) for shape, d in zip(shapes, dims, strict=False)]
        if len(shapes) != len(dims) or not all(fits):
            raise ValueError(
                f"state: expected, for the parameter {keystr(path)} of shape {x.shape} viewed by {v}, {name} of the "
                f"shapes {[(*batch, d, d) for d in dims]}, got {shapes}: is it the state of another model, or of other "
                f"`modes`?"
            )
        return leaves

    return jax.tree_util.tree_map_with_path(of_one, params, view, matrices)


def _is_ours(node: Any) -> bool:
    return isinstance(node, TNTState | RejectedState | HistoryState)
