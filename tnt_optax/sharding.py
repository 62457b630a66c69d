"""Meshes of devices: how the factors are sharded, and which device inverts which of them.

Everything here only annotates arrays for JAX's own partitioner. Without a mesh it has no effect.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tnt_optax.views import TensorView

AxisNames = str | tuple[str, ...]


def init_factors(x: Any, view: TensorView, shapes: Sequence[tuple[int, ...]], dtype: Any) -> tuple[jax.Array, ...]:
    """Zeros of the given shapes, (*batch, d, d) or (*batch, d) for each mode of `x`, on the devices of `x`.

    Rows are divided as the mode's axis is, columns over the mesh axes that divide the other modes, as far as these
    divide d evenly: so a factor is spread over as many devices as the parameter. Batch axes are sharded as in `x`. What
    is not known (the sharding of a traced array on a mesh with Auto axes) is left to JAX.
    """
    mesh, axes = _mesh_axes(x)
    of_modes = [sum((axes[axis] for axis in mode), ()) for mode in view.modes] or [()]
    arrays = []
    for mode, shape in enumerate(shapes):
        columns: tuple[str, ...] = ()
        for name in sum((names for other, names in enumerate(of_modes) if other != mode), ()):
            if shape[-1] % _devices(mesh, (*columns, name)) == 0:
                columns += (name,)
        entries = [*(axes[axis] for axis in view.batch_axes), of_modes[mode], columns][: len(shape)]
        spec = PartitionSpec(*(entry or None for entry in entries))
        arrays.append(jnp.zeros(shape, dtype, device=mesh and NamedSharding(mesh, spec)))
    return tuple(arrays)


def check_view(where: str, x: Any, view: TensorView) -> None:
    """An error for a mode that merges a sharded axis behind another, which would leave its parts on wrong devices."""
    mesh, axes = _mesh_axes(x)
    for mode in view.modes:
        longer = [axis for axis in mode if x.shape[axis] > 1]
        for axis in longer[1:]:
            if _devices(mesh, axes[axis]) > 1:
                raise ValueError(
                    f"{where}: the mode {mode} merges axis {axis}, which is divided over the mesh axes {axes[axis]}, "
                    f"behind axis {longer[0]}, and a merged axis cannot be divided like this. Make it the first of its "
                    f"mode, or a mode or a batch axis of its own, or shard another axis."
                )


def check_axis(axis: AxisNames) -> None:
    """An error for an `inverse_axis` that is not an axis of the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    for name in _names(axis):
        if name not in mesh.axis_names:
            has = f"has the axes {mesh.axis_names}" if mesh.axis_names else "has none: call it under jax.set_mesh(mesh)"
            raise ValueError(f"inverse_axis: expected an axis of the current mesh, got {name!r}; the mesh {has}.")


def with_shardings_like(like: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, partitioned by the compiler, with results sharded as the arrays of `like`.

    Where the axes of the mesh are Explicit, JAX would otherwise ask at every product how to shard its result.

    Raises:
      ValueError: `like` is sharded over Explicit axes, but there is no current mesh.
    """
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, like)
    if explicit := _explicit_axes(jax.sharding.get_abstract_mesh()):
        # Not the shardings themselves: an array made before the mesh, a counter say, has another mesh or none.
        specs = jax.tree.map(lambda one: one.spec, shardings)
        return jax.sharding.auto_axes(function, axes=explicit, out_sharding=specs)
    for one in jax.tree.leaves(shardings):
        if _explicit_axes(one.mesh):
            raise ValueError(
                f"state: expected a current mesh, because the state is sharded over the Explicit axes "
                f"{_explicit_axes(one.mesh)}, got none: call it under jax.set_mesh(mesh)."
            )
    return function


def replicated(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, partitioned by the compiler, with results on every device of the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if explicit := _explicit_axes(mesh):
        function = jax.sharding.auto_axes(function, axes=explicit, out_sharding=PartitionSpec())
    if AxisType.Auto not in mesh.axis_types:
        return function
    return lambda *args: _replicate(function(*args))


@jax.jit  # Under jit, arrays that were made before the mesh are accepted too.
def _replicate(tree: Any) -> Any:
    return lax.with_sharding_constraint(tree, PartitionSpec())


class Task(NamedTuple):
    """A function of stacked arrays that treats each element of the stack alone, and its cost.

    Attributes:
      function: takes arrays with a leading axis, and returns a tree of arrays with the same leading axis.
      stacks: the arrays.
      cost: of one element of the stack.
    """

    function: Callable[..., Any]
    stacks: tuple[jax.Array, ...]
    cost: float


def distribute(tasks: Sequence[Task], axis: AxisNames | None) -> list[Any]:
    """[task.function(*task.stacks) for task in tasks], with the work divided over the devices of a mesh axis.

    Args:
      tasks: what is to be computed.
      axis: the mesh axis, or several; None: every device does all the work.
    """
    if axis is None:
        return [task.function(*task.stacks) for task in tasks]
    check_axis(axis)
    counts, costs = [len(task.stacks[0]) for task in tasks], [task.cost for task in tasks]
    shares = equal_shares(counts, costs, _devices(jax.sharding.get_abstract_mesh(), axis))
    # Devices whose shares have the same sizes run the same branch, so that a large mesh needs few branches.
    sizes = [tuple(map(len, share)) for share in shares]
    branches = sorted(set(sizes))
    branch_of = np.asarray([branches.index(size) for size in sizes])
    members = [_padded([share[index] for share in shares]) for index in range(len(tasks))]

    def on_one_device(all_stacks: list[tuple[jax.Array, ...]]) -> list[Any]:
        device = lax.axis_index(axis)

        def of_share(size: tuple[int, ...]) -> list[Any]:
            results = []
            for task, stacks, table, count in zip(tasks, all_stacks, members, size, strict=True):
                shapes = jax.eval_shape(task.function, *stacks)
                result = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
                if count:
                    mine = jnp.asarray(table)[device, :count]
                    new = task.function(*(x[mine] for x in stacks))
                    result = jax.tree.map(lambda x, y, mine=mine: x.at[mine].set(y), result, new)
                results.append(result)
            return results

        runs = [lambda size=size: of_share(size) for size in branches]
        # Each device leaves 0 where it has no share: the sum gives every device all results.
        return lax.psum(lax.switch(jnp.asarray(branch_of)[device], runs), axis)

    everywhere = PartitionSpec()
    divided = jax.shard_map(on_one_device, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    return divided([task.stacks for task in tasks])


def equal_shares(counts: Sequence[int], costs: Sequence[float], number: int) -> list[list[list[int]]]:
    """Divides counts[i] tasks of each kind i into `number` shares of about equal cost, the most expensive tasks first.

    Returns:
      For each share and kind the indices of its tasks.
    """
    shares: list[list[list[int]]] = [[[] for _ in counts] for _ in range(number)]
    loads = [0.0] * number
    for kind in sorted(range(len(counts)), key=lambda kind: -costs[kind]):
        for task in range(counts[kind]):
            least = loads.index(min(loads))
            shares[least][kind].append(task)
            loads[least] += costs[kind]
    return shares


def _padded(rows: list[list[int]]) -> np.ndarray:
    table = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table


def _explicit_axes(mesh: Any) -> tuple[str, ...]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def _mesh_axes(x: Any) -> tuple[Any, list[tuple[str, ...]]]:
    """The mesh of an array or a `jax.ShapeDtypeStruct`, None if not known, and the mesh axes that divide each axis."""
    # For a traced array, the sharding of its type.
    sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None, [()] * len(x.shape)
    return sharding.mesh, [_names(entry) for entry in (*sharding.spec, *[None] * len(x.shape))[: len(x.shape)]]


def _devices(mesh: Any, axis: AxisNames) -> int:
    return math.prod(mesh.shape[name] for name in _names(axis))


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
