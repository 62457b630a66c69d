"""What a jaxpr consists of: for tests of what is computed, and of what is computed only inside a conditional."""

from collections.abc import Iterator
from typing import Any

import jax


def _inner(eqn: Any) -> Iterator[Any]:
    for leaf in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
        if hasattr(leaf, "eqns"):
            yield leaf
        elif hasattr(leaf, "jaxpr"):
            yield leaf.jaxpr


def count(jaxpr: Any, primitive: str, *, inside_cond: bool) -> int:
    """How often `primitive` stands in `jaxpr` (anywhere below), inside or outside of conditionals."""

    def walk(jaxpr: Any, in_cond: bool) -> int:
        total = 0
        for eqn in jaxpr.eqns:
            total += eqn.primitive.name == primitive and in_cond == inside_cond
            total += sum(walk(inner, in_cond or eqn.primitive.name == "cond") for inner in _inner(eqn))
        return total

    return walk(jaxpr.jaxpr, False)
