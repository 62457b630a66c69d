"""The static description of the parameters, made once per trace, and the order in which their inverses are updated."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from tnt_optax import factors, sharding
from tnt_optax.factors import Factor
from tnt_optax.numerics import float32_or_better
from tnt_optax.views import TensorView, ViewFn, resolve_view


@dataclasses.dataclass(frozen=True)
class Block:
    """What is static about one parameter: a stack of tensors of shape `dims`.

    Attributes:
      name: its path, for error messages.
      shape: of the parameter.
      dtype: of momentum, contractions and inverses.
      view: which axes form which mode.
      factors: how the factor of each mode is stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    view: TensorView
    factors: tuple[Factor, ...]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The lengths of the batch axes."""
        return tuple(self.shape[axis] for axis in self.view.batch_axes)

    @property
    def dims(self) -> tuple[int, ...]:
        """(d_1, ..., d_k), k >= 1: a scalar has the shape (1,)."""
        return tuple(math.prod(self.shape[axis] for axis in mode) for mode in self.view.modes) or (1,)

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the arrays that hold the factors of all modes, with batch axes."""
        return tuple((*self.batch_shape, *f.shape(d)) for f, d in zip(self.factors, self.dims, strict=True))

    @property
    def inverse_cost(self) -> float:
        """The number of operations of all its inverses, up to a constant."""
        of_one = sum(factor.inverse_cost(d) for factor, d in zip(self.factors, self.dims, strict=True))
        return math.prod(self.batch_shape) * of_one

    def to_tensor(self, x: jax.Array) -> jax.Array:
        """The parameter in the shape (*batch_shape, *dims)."""
        return jnp.transpose(x, self._order).reshape(self.batch_shape + self.dims)

    def from_tensor(self, tensor: jax.Array) -> jax.Array:
        """The inverse of `to_tensor`."""
        permuted = tensor.reshape(tuple(self.shape[axis] for axis in self._order))
        return jnp.transpose(permuted, sorted(range(len(self._order)), key=self._order.__getitem__))

    def over_batch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` of one tensor and its factors, mapped over the batch axes."""
        for _ in self.view.batch_axes:
            function = jax.vmap(function)
        return function

    def normalized(self, contractions: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Eq. (5) for all modes: the U_i, in the shapes of the C_i."""

        def of_one_tensor(contractions: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            order, size = len(self.dims), max(math.prod(self.dims), 1)
            pairs = zip(self.factors, contractions, strict=True)
            return tuple(factors.normalize_factor(factor, c, order, size) for factor, c in pairs)

        return self.over_batch(of_one_tensor)(tuple(contractions))

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.view.batch_axes, *itertools.chain.from_iterable(self.view.modes))


def describe(params: optax.Params, views: ViewFn | None, max_dim: int) -> Any:
    """A tree like the parameters (or their gradients), with a `Block` for each. It reads only shapes and dtypes."""

    def of_one(path: Any, x: Any) -> Block:
        view = resolve_view(views, path, x.shape)
        block = Block(keystr(path), x.shape, float32_or_better(x), view, ())
        stored = tuple(
            factors.Diagonal() if d > max_dim or mode in view.diagonal_modes else factors.Dense()
            for mode, d in enumerate(block.dims)
        )
        return dataclasses.replace(block, factors=stored)

    return jax.tree_util.tree_map_with_path(of_one, params)


def map_by_shape(
    function: Callable[[Factor, jax.Array], Any],
    blocks: Sequence[Block],
    matrices: Sequence[Sequence[jax.Array]],
    *,
    axis: sharding.AxisNames | None = None,
) -> list[tuple[Any, ...]]:
    """`function(factor, matrix)` for the matrices of all modes of all blocks, those of one shape in one call.

    Matrices of one shape are stacked, so that a model of many equal layers compiles as fast as a model of few, and an
    accelerator works on them side by side.

    Args:
      function: of a `Factor` and one matrix of its shape. It returns an array or a tree of arrays.
      blocks: the parameters.
      matrices: for each block one array per mode, of `block.factor_shapes`.
      axis: mesh axes whose devices divide the work by `Factor.inverse_cost`; the results must then be like the
      matrices.

    Returns:
      For each block a tuple with the result of each mode, whose arrays have the block's batch axes in front.
    """
    modes = [
        (block, factor, matrix)
        for block, of_block in zip(blocks, matrices, strict=True)
        for factor, matrix in zip(block.factors, of_block, strict=True)
    ]
    groups: dict[Any, list[int]] = {}
    for index, (_, factor, matrix) in enumerate(modes):
        groups.setdefault((factor, matrix.shape[-1], matrix.dtype), []).append(index)

    def stack(index: int) -> jax.Array:
        block, factor, matrix = modes[index]
        return matrix.reshape(math.prod(block.batch_shape), *factor.shape(matrix.shape[-1]))

    tasks = [
        sharding.Task(
            jax.vmap(functools.partial(function, factor)),
            jnp.concatenate([stack(index) for index in members]),
            factor.inverse_cost(d),
        )
        for (factor, d, _), members in groups.items()
    ]
    results: list[Any] = [None] * len(modes)
    for members, of_group in zip(groups.values(), sharding.distribute(tasks, axis), strict=True):
        start = 0
        for index in members:
            shape = modes[index][0].batch_shape
            end = start + math.prod(shape)
            results[index] = jax.tree.map(lambda x, a=start, b=end, s=shape: x[a:b].reshape(*s, *x.shape[1:]), of_group)
            start = end
    in_order = iter(results)
    return [tuple(next(in_order) for _ in block.factors) for block in blocks]


def equal_parts(blocks: Sequence[Block], number: int) -> list[slice]:
    """Divides the parameters into `number` runs whose inverses cost about the same. Some may be empty."""
    costs = [block.inverse_cost for block in blocks]
    total = sum(costs) or 1.0
    before = itertools.accumulate(costs, initial=0.0)
    places = [min(int(number * cost / total), number - 1) for cost, _ in zip(before, costs, strict=False)]
    return [
        slice(places.index(i), places.index(i) + places.count(i)) if i in places else slice(0) for i in range(number)
    ]
