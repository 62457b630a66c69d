"""The static description of the parameters, made once per trace, and the order in which their inverses are updated."""

import bisect
import dataclasses
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
    def tensors(self) -> int:
        """The number of tensors in the stack."""
        return math.prod(self.batch_shape)

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
        return self.tensors * of_one

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


def map_normalized_factors(
    function: Callable[[Factor, jax.Array], Any],
    blocks: Sequence[Block],
    contractions: Sequence[Sequence[jax.Array]],
    *,
    axis: sharding.AxisNames | None = None,
) -> list[tuple[Any, ...]]:
    """`function(factor, U_i)` for the U_i of Eq. (5) of all modes of all blocks, those of one shape in one call.

    Factors of one shape are stacked, so that a model of many equal layers compiles as fast as a model of few, and an
    accelerator works on them side by side.

    Args:
      function: of a `Factor` and one array of its shape. It returns a tree of arrays.
      blocks: the parameters.
      contractions: for each block the C_i of its modes, of `block.factor_shapes`.
      axis: mesh axes whose devices divide the work by `Factor.inverse_cost`.

    Returns:
      For each block a tuple with the result of each mode, whose arrays have the block's batch axes in front.
    """
    modes = [
        (block, factor, contraction)
        for block, of_block in zip(blocks, contractions, strict=True)
        for factor, contraction in zip(block.factors, of_block, strict=True)
    ]
    groups: dict[Any, list[int]] = {}
    for index, (_, factor, contraction) in enumerate(modes):
        groups.setdefault((factor, contraction.shape[-1], contraction.dtype), []).append(index)

    def task(kind: tuple[Factor, int, Any], members: list[int]) -> sharding.Task:
        factor, d, dtype = kind

        def of_one_mode(contraction: jax.Array, order: jax.Array, size: jax.Array) -> Any:
            return function(factor, factors.normalize_factor(factor, contraction, order, size))

        stacks = [modes[index][2].reshape(modes[index][0].tensors, *factor.shape(d)) for index in members]
        owners = [block for block, *_ in map(modes.__getitem__, members) for _ in range(block.tensors)]
        orders = jnp.asarray([len(block.dims) for block in owners], dtype)
        sizes = jnp.asarray([max(math.prod(block.dims), 1) for block in owners], dtype)
        return sharding.Task(jax.vmap(of_one_mode), (jnp.concatenate(stacks), orders, sizes), factor.inverse_cost(d))

    results: list[Any] = [None] * len(modes)
    tasks = [task(kind, members) for kind, members in groups.items()]
    for members, of_group in zip(groups.values(), sharding.distribute(tasks, axis), strict=True):
        start = 0
        for index in members:
            block, end = modes[index][0], start + modes[index][0].tensors
            results[index] = jax.tree.map(
                lambda x, a=start, b=end, shape=block.batch_shape: x[a:b].reshape(*shape, *x.shape[1:]), of_group
            )
            start = end
    in_order = iter(results)
    return [tuple(next(in_order) for _ in block.factors) for block in blocks]


def equal_parts(blocks: Sequence[Block], number: int) -> list[slice]:
    """Divides the parameters into `number` runs whose inverses cost about the same. Some may be empty."""
    costs = [block.inverse_cost for block in blocks]
    total = sum(costs) or 1.0
    before = itertools.accumulate(costs, initial=0.0)
    places = [min(int(number * cost / total), number - 1) for cost, _ in zip(before, costs, strict=False)]
    starts = [bisect.bisect_left(places, part) for part in range(number + 1)]
    return list(map(slice, starts, starts[1:]))
