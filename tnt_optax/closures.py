"""Functions that can cross a `jit` boundary with the arrays that they close over."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
from jax.tree_util import register_pytree_node_class


class _Program(NamedTuple):
    """A traced function: its jaxpr, which of the common arrays are its constants, and the structure of its result."""

    jaxpr: Any
    constants: tuple[int, ...]
    result: Any

    def run(self, arrays: Sequence[jax.Array], args: tuple[Any, ...]) -> Any:
        constants = [arrays[index] for index in self.constants]
        return self.result.unflatten(jax.core.eval_jaxpr(self.jaxpr, constants, *jax.tree.leaves(args)))


@register_pytree_node_class
class Closures:
    """Functions by name, as a pytree whose leaves are the arrays that they close over, each of them once.

    The functions are called as they are. Only where the object is flattened, because it crosses a `jit` boundary for
    example, are they traced, so that whoever does not need them does not pay for it.

    Args:
      functions: for each name a function of trees of arrays, and arguments of the types with which it will be called.
    """

    def __init__(self, functions: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]]):  # noqa: D107
        self._functions = functions
        self._arrays: list[jax.Array] = []
        self._programs: tuple[tuple[str, _Program | Exception], ...] = ()

    def __contains__(self, name: str) -> bool:  # noqa: D105
        return name in self._functions or name in dict(self._programs)

    def call(self, name: str, *args: Any) -> Any:
        """The result of a function. An error that arose when it was traced is raised here."""
        if name in self._functions:
            return self._functions[name][0](*args)
        program = dict(self._programs)[name]
        if isinstance(program, Exception):
            raise program
        return program.run(self._arrays, args)

    def tree_flatten(self) -> tuple[list[jax.Array], Any]:  # noqa: D102
        if not self._programs:
            self._trace()
        return self._arrays, self._programs

    @classmethod
    def tree_unflatten(cls, programs: Any, arrays: Any) -> "Closures":  # noqa: D102
        new = cls({})
        new._arrays, new._programs = list(arrays), programs
        return new

    def _trace(self) -> None:
        places: dict[int, int] = {}
        programs: list[tuple[str, _Program | Exception]] = []
        for name, (function, args) in self._functions.items():
            try:
                closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
            except Exception as error:
                # Only who calls this function has to know. The traceback would keep tracers alive.
                error.__cause__ = error.__context__ = None
                programs.append((name, error.with_traceback(None)))
                continue
            for array in closed.consts:
                if id(array) not in places:
                    places[id(array)] = len(self._arrays)
                    self._arrays.append(array)
            constants = tuple(places[id(array)] for array in closed.consts)
            programs.append((name, _Program(closed.jaxpr, constants, jax.tree.structure(shapes))))
        self._programs = tuple(programs)
