"""Where the states of this library's optimizers lie in the state of an optimizer that wraps them."""

import dataclasses
from typing import Any

import jax
import optax
from jax.tree_util import KeyPath

from tnt_optax.transform import HistoryState, RejectedState, TNTState


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


def _is_ours(node: Any) -> bool:
    return isinstance(node, TNTState | RejectedState | HistoryState)
