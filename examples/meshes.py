"""The load of each device of a mesh: the largest share of an inverse update, and the bytes of parameters and state.

Nothing is trained. A share is the part of the inverses that `inverse_axis` assigns to one device. Its cost is counted
as in the library, by the sum of d^3 over its modes, and in the operations that XLA counts for the inverse of each mode,
which do not include LAPACK's. Bytes are those of parameters that are divided along one axis (FSDP), and of the state
that `init` makes for them, which needs types only, and no devices.
"""

import argparse
import functools
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from common import report
from common.models import gpt2
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from rich.console import Console

import tnt_optax
from tnt_optax import phases, sharding
from tnt_optax.blocks import Block, describe
from tnt_optax.factors import Dense

MAX_DIM = 8192  # The default of `tnt`.
Shapes = list[tuple[int, ...]]


def autoencoder() -> Shapes:
    """784-1000-500-250-30 and back."""
    widths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    return [shape for pair in itertools.pairwise(widths) for shape in (pair, pair[1:])]


def transformer() -> Shapes:
    return [shape for of_kind in gpt2().values() for shape in of_kind]


MODELS = {"MNIST autoencoder": autoencoder, "GPT-2 124M": transformer}


def modes_to_invert(shapes: Shapes) -> Counter[int]:
    """How many dense modes there are of each length."""
    pairs = (zip(block.factors, block.dims, strict=True) for block in blocks(shapes))
    return Counter(d for factor, d in itertools.chain.from_iterable(pairs) if factor == Dense())


def blocks(shapes: Shapes) -> list[Block]:
    params: Any = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return describe(params, None, MAX_DIM)


def largest_share(shapes: Shapes, devices: int) -> dict[str, float]:
    """Of an inverse update: the largest part by d^3 and in operations, the ideal part, and the part of one mode."""
    lengths = modes_to_invert(shapes)
    costs = [float(d) ** 3 for d in lengths]
    shares = sharding.equal_shares(list(lengths.values()), costs, devices)

    def largest_part(costs: list[float]) -> float:
        loads = [sum(len(tasks) * cost for tasks, cost in zip(share, costs, strict=True)) for share in shares]
        return max(loads) / sum(loads)

    return {
        "largest": largest_part(costs),
        "largest_in_operations": largest_part([operations(d) for d in lengths]),
        "ideal": 1 / devices,
        "one_mode": max(costs) / sum(lengths[d] * float(d) ** 3 for d in lengths),
    }


@functools.cache
def operations(d: int) -> float:
    """What XLA counts for Eq. (5) and the inverse of a mode of length d."""
    matrix, number = jax.ShapeDtypeStruct((d, d), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    invert = functools.partial(phases.damped_inverses, blocks([(d,)]), axis=None)
    return (jax.jit(invert).lower([(matrix,)], number).compile().cost_analysis() or {})["flops"]


def bytes_per_device(shapes: Shapes, devices: int) -> dict[str, int]:
    """Of parameters that are divided over all devices along the longest axis that allows it, and of TNT's state."""
    mesh = AbstractMesh((devices,), ("data",), axis_types=(AxisType.Explicit,))

    def place(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        along = max((d for d in shape if d % devices == 0), default=None)
        axis = shape.index(along) if along and devices > 1 else None
        spec = PartitionSpec(*("data" if i == axis else None for i in range(len(shape))))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    def size(tree: Any) -> int:
        # What is on no mesh, the counters, is on every device.
        shapes = [(x, x.sharding.shard_shape(x.shape) if x.sharding else x.shape) for x in jax.tree.leaves(tree)]
        return sum(math.prod(shape) * x.dtype.itemsize for x, shape in shapes)

    tx, params = tnt_optax.tnt(0.1, max_dim=MAX_DIM), [place(shape) for shape in shapes]
    with jax.sharding.use_abstract_mesh(mesh):
        return {"parameters": size(params), "state": size(jax.eval_shape(tx.init, params))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for what is written")
    args = parser.parse_args()
    console = Console()
    results: dict[str, Any] = {"machine": report.machine(), "models": {}}
    for name, make in MODELS.items():
        shapes, rows = make(), []
        for devices in args.devices:
            share, size = largest_share(shapes, devices), bytes_per_device(shapes, devices)
            rows.append({"devices": devices, **share, **size})
        results["models"][name] = rows
        report.print_table(
            console,
            name,
            ["devices", "largest share", "in operations", "ideal", "largest mode", "parameters, MB", "state, MB"],
            [
                [
                    str(row["devices"]),
                    *(f"{row[key]:.1%}" for key in ("largest", "largest_in_operations", "ideal", "one_mode")),
                    *(f"{row[key] / 1e6:.1f}" for key in ("parameters", "state")),
                ]
                for row in rows
            ],
        )
    args.out.mkdir(parents=True, exist_ok=True)
    report.save_json(args.out / "meshes.json", results)


if __name__ == "__main__":
    main()
