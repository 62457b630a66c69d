"""Parameters on a mesh of devices: how their factors lie on it, and which device inverts which of them.

All of it is annotations for JAX's own partitioner: without a mesh they say nothing, and the program is the same.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tnt_optax.modes import Modes

AxisNames = str | tuple[str, ...]


def zeros_beside(x: Any, view: Modes, mode: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """A factor of a mode of the parameter `x`, all zero: of shape (*batch, d, d) or (*batch, d), on the devices of `x`.

    Its rows are divided as the mode's axis is, its columns over the mesh axes that divide the other modes, as far as
    these divide d evenly: so it is spread over as many devices as the parameter. Stacking axes lie as in `x`. What is
    not known (how a traced array lies on a mesh whose axes are Auto) is left to JAX.
    """
    sharding = _sharding(x)
    if not isinstance(sharding, NamedSharding):
        return jnp.zeros(shape, dtype)
    axes = [_names(entry) for entry in (*sharding.spec, *[None] * len(x.shape))[: len(x.shape)]]
    of_modes = [tuple(name for axis in group for name in axes[axis]) for group in view.groups] or [()]
    columns: tuple[str, ...] = ()
    for name in (name for other, names in enumerate(of_modes) if other != mode for name in names):
        if shape[-1] % math.prod(sharding.mesh.shape[one] for one in (*columns, name)) == 0:
            columns += (name,)
    entries = [*(axes[axis] for axis in view.batch), of_modes[mode], columns][: len(shape)]
    spec = PartitionSpec(*(entry or None for entry in entries))
    return jnp.zeros(shape, dtype, device=NamedSharding(sharding.mesh, spec))


def check_modes(where: str, x: Any, view: Modes) -> None:
    """An error for a mode that merges a sharded axis behind another, which would leave its parts on wrong devices."""
    sharding = _sharding(x)
    if not isinstance(sharding, NamedSharding):
        return
    for group in view.groups:
        longer = [axis for axis in group if x.shape[axis] > 1]
        for axis in longer[1:]:
            names = _names(sharding.spec[axis]) if axis < len(sharding.spec) else ()
            if math.prod(sharding.mesh.shape[name] for name in names) > 1:
                raise ValueError(
                    f"{where}: the mode {group} merges axis {axis}, which is divided over the mesh axis "
                    f"{sharding.spec[axis]!r}, behind axis {longer[0]}, and the merged axis cannot be divided so. Make "
                    f"it the first of its group, or a mode or a batch axis of its own, or shard another axis."
                )


def check_axis(axis: AxisNames) -> None:
    """An error for a `refresh_axis` that the mesh in context has not."""
    mesh = jax.sharding.get_abstract_mesh()
    for name in _names(axis):
        if name not in mesh.axis_names:
            has = f"has the axes {mesh.axis_names}" if mesh.axis_names else "has none: call it under jax.set_mesh(mesh)"
            raise ValueError(f"refresh_axis: expected an axis of the mesh in context, got {name!r}; the mesh {has}.")


def keeping(function: Callable[..., Any], like: Any) -> Callable[..., Any]:
    """`function`, partitioned by the compiler, whose results lie on the mesh as the arrays of `like` do.

    Where the axes of the mesh are Explicit, JAX would else ask at every product how its result is to be divided.

    Raises:
      ValueError: `like` lies on a mesh with Explicit axes, but no mesh is in context.
    """
    shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, like)
    if explicit := _explicit_axes(jax.sharding.get_abstract_mesh()):
        # Not the shardings themselves: an array made before the mesh, a counter say, has another mesh or none.
        specs = jax.tree.map(lambda one: one.spec, shardings)
        return jax.sharding.auto_axes(function, axes=explicit, out_sharding=specs)
    for one in jax.tree.leaves(shardings):
        if _explicit_axes(one.mesh):
            raise ValueError(
                f"state: expected, on a mesh with the Explicit axes {_explicit_axes(one.mesh)}, a mesh in context, got "
                f"none: call it under jax.set_mesh(mesh)."
            )
    return function


def everywhere(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, partitioned by the compiler, whose results are on every device of the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    if explicit := _explicit_axes(mesh):
        function = jax.sharding.auto_axes(function, axes=explicit, out_sharding=PartitionSpec())
    if AxisType.Auto not in mesh.axis_types:
        return function
    return lambda *args: _replicated(function(*args))


@jax.jit  # Which also takes arrays that were made before the mesh.
def _replicated(tree: Any) -> Any:
    return lax.with_sharding_constraint(tree, PartitionSpec())


def over_devices(
    function: Callable[..., jax.Array], stacks: Sequence[Any], costs: Sequence[float], axis: AxisNames | None
) -> list[jax.Array]:
    """[function(*stack) for stack in stacks], the work being divided over the devices of a mesh axis.

    Args:
      function: of arrays with a common leading axis; gives an array like the first of them, each slice of it made from
        the slices of the others alone.
      stacks: the tuples of arrays.
      costs: of one slice of each stack.
      axis: the mesh axis, or several; None: every device does everything.
    """
    if axis is None:
        return [function(*stack) for stack in stacks]
    check_axis(axis)
    mesh = jax.sharding.get_abstract_mesh()
    shares = equal_shares(
        [len(stack[0]) for stack in stacks], costs, math.prod(mesh.shape[name] for name in _names(axis))
    )
    # Devices whose shares have the same sizes run the same branch, so that a large mesh needs few of them.
    sizes = [tuple(map(len, share)) for share in shares]
    branches = sorted(set(sizes))
    branch_of = np.asarray([branches.index(size) for size in sizes])
    members = [_padded([share[index] for share in shares]) for index in range(len(stacks))]

    def on_one_device(stacks: Sequence[Any]) -> list[jax.Array]:
        device = lax.axis_index(axis)

        def of_share(size: tuple[int, ...]) -> list[jax.Array]:
            results = []
            for stack, table, number in zip(stacks, members, size, strict=True):
                result = jnp.zeros_like(stack[0])
                if number:
                    mine = jnp.asarray(table)[device, :number]
                    result = result.at[mine].set(function(*(x[mine] for x in stack)))
                results.append(result)
            return results

        runs = [lambda size=size: of_share(size) for size in branches]
        # Where a device has nothing it adds 0: the sum gives every device the results of all.
        return lax.psum(lax.switch(jnp.asarray(branch_of)[device], runs), axis)

    replicated = PartitionSpec()
    divided = jax.shard_map(on_one_device, in_specs=replicated, out_specs=replicated, check_vma=False)
    return divided(list(stacks))


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


def _sharding(x: Any) -> Any:
    """Of an array or a `jax.ShapeDtypeStruct`; of a traced array what its type says."""
    return jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
