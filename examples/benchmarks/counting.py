"""Benchmarks that count: operations, bytes, and the shares of devices. Nothing is run or allocated."""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
import typer
from experiments import report
from experiments.baselines import shampoo, soap
from experiments.optimizers import OPTIMIZERS
from experiments.report import machine, markdown_table, write_json
from experiments.workloads import WORKLOADS
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from rich.progress import track

import tnt_optax
from tnt_optax import TensorView, blocks, factors, options, phases, sharding

Shape = tuple[int, ...]
DEVICES, MAX_DIMS = [1, 2, 4, 8, 16, 64], [256, 512, 768, 1024, 2048, 3072, 4096, 8192]
SHAPES: list[Shape] = [(128,), (1024,), (64, 32), (256, 128), (784, 1000), (2048, 512)]
KERNELS: list[Shape] = [(3, 3, 16, 32), (3, 3, 128, 256), (5, 5, 256, 512)]  # The spatial axes are one mode.
FOUR_MODES: list[Shape] = [(6, 8, 10, 12), (3, 3, 128, 256), (16, 24, 32, 40)]
FOUR = TensorView(((0,), (1,), (2,), (3,)))
CASES = [(shape, None) for shape in SHAPES + KERNELS] + [(shape, FOUR) for shape in FOUR_MODES]
WIDTHS = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
AUTOENCODER: list[Shape] = [shape for pair in itertools.pairwise(WIDTHS) for shape in (pair, pair[1:])]
# By kind. The embedding is tied. q, k and v are one matrix. The vectors of a layer are four biases and two norms.
GPT2: dict[str, list[Shape]] = {
    "embeddings": [(50257, 768), (1024, 768)],
    "matrices": 12 * [(768, 2304), (768, 768), (768, 3072), (3072, 768)],
    "vectors": 12 * [(2304,), (768,), (3072,), (768,), *[(768,)] * 4] + [(768,)] * 2,
}
GPT2_SHAPES = [*itertools.chain(*GPT2.values())]
array: Callable[..., Any] = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


def state_bytes(tx: Any, params: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(tx.init, params)))


def flops(function: Callable[..., Any], *args: Any) -> float:
    """Operations as XLA counts them: the larger branch of a conditional, one turn of a loop, no LAPACK calls."""
    return float((jax.jit(function).lower(*args).compile().cost_analysis() or {}).get("flops", math.nan))


def lapack_flops(jaxpr: Any) -> float:
    """Operations of Cholesky factorizations, d^3/3, and of triangular systems with n right-hand sides, d^2 n."""
    total, formulas = 0.0, {"cholesky": lambda a: a[-1] ** 3 / 3, "triangular_solve": lambda a, b: a[-1] * math.prod(b)}
    for equation in jaxpr.eqns:
        if formula := formulas.get(equation.primitive.name):
            total += formula(*(variable.aval.shape for variable in equation.invars))
        inner = jax.tree.leaves([*equation.params.values()], is_leaf=lambda x: hasattr(x, "eqns"))
        total += sum(lapack_flops(x) for x in inner if hasattr(x, "eqns"))
    return total


def panels(number: int, width: float = 5) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # `step.measure` works without it.

    figure = Figure(figsize=(number * width, 4.5), layout="constrained")
    return figure, figure.subplots(1, number, squeeze=False)[0]


def show(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Prints a table of the numbers and texts of the rows, whose keys are the columns, and returns it."""
    columns = list(dict.fromkeys(key for row in rows for key in row if isinstance(row[key], int | float | str)))
    cells = [[row.get(column, "") for column in columns] for row in rows]
    cells = [[f"{x / 1e6:.1f} M" if isinstance(x, int) and x >= 1e6 else x for x in row] for row in cells]
    texts = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in cells]
    table = markdown_table([column.replace("_", " ") for column in columns], texts)
    report.show(name, table)
    return table


def save(path: Path, result: Mapping[str, Any], figure: Any = None) -> None:
    write_json(path, {"machine": machine(), **result})
    if figure:
        figure.savefig(path.with_suffix(".png"), dpi=120)


def count(shape: Shape, view: TensorView | None, batch_size: int) -> dict[str, Any]:
    """Operations of the parts of an update, and bytes of state, for one tensor: pairs of a count and its formula."""
    gradient, number, inverse = array(shape), array(()), factors.Dense().inverse
    block = blocks.describe(gradient, lambda *_: view, options.MAX_DIM)
    dims, size, matrices = block.dims, math.prod(shape), tuple(map(array, block.factor_shapes))
    squares, cubes = sum(d**2 for d in dims), sum(d**3 for d in dims)
    products = 2.0 * sum(dims) * size  # A multiplication and an addition for each number and each row of a matrix.

    def statistics(gradient: jax.Array, averages: Any, weight: jax.Array) -> Any:
        tensor, modes = block.to_tensor(gradient), enumerate(zip(block.factors, averages, strict=True))
        return [(1 - weight) * c + weight * factor.contraction(tensor, mode) for mode, (factor, c) in modes]

    def of_update(tx: Any) -> float:
        update, state = optax.with_extra_args_support(tx).update, jax.eval_shape(tx.init, gradient)
        return flops(lambda g, s: update(g, s, sampled_grads=g), gradient, state)

    tnt, adam = tnt_optax.tnt(1e-3, views=lambda *_: view), optax.adam(1e-3)
    inverses = sum(flops(inverse, u, number) + lapack_flops(jax.make_jaxpr(inverse)(u, number)) for u in matrices)
    counts: dict[str, Any] = {
        "modes": " × ".join(map(str, dims)),
        "statistics": (flops(statistics, gradient, matrices, number), products),
        "preconditioning": (flops(lambda m, g: phases.precondition(block, m, g), matrices, gradient), products),
        "inverses": (inverses, 10 / 3 * cubes),  # If d <= 256: Cholesky d^3/3, triangular system d^3, product 2 d^3.
        "Adam": (of_update(adam), 12 * size),  # Two moments, 3 each; two corrections; root, eps, quotient, rate.
        "TNT, bytes": (state_bytes(tnt, gradient), 4 * (size + 2 * squares)),
        "Adam, bytes": (state_bytes(adam, gradient), 4 * 2 * size),
    }
    if view is None:  # Shampoo has no other views. One turn of its Newton iteration is counted.
        p, tx = 2 * len(dims), shampoo(1e-3, statistics_period=1, inverse_period=1)
        power = p.bit_length() + p.bit_count() - 2  # Products of matrices, by repeated squaring.
        counts["Shampoo"] = (of_update(tx), 2 * products + 2 * (power + 2) * cubes)
        counts["Shampoo, bytes"] = (state_bytes(tx, gradient), 4 * (size + 2 * squares))
    if len(shape) == 2:  # The kernel of a dense layer.
        value_and_grads = tnt_optax.value_and_sampled_grad(lambda w, x: x @ w, tnt_optax.Normal(), scale="mean")
        batch, key = [array((batch_size, d)) for d in shape], jax.eval_shape(lambda: jax.random.key(0))
        function = jax.eval_shape(value_and_grads, gradient, *batch, key)[2]
        counts["sampled pass"] = (flops(lambda function: function(), function), 2 * batch_size * size)
    return counts


def complexity(
    batch_size: Annotated[int, typer.Option(help="number of examples in a batch")] = 128,
    max_dim: Annotated[int, typer.Option(help="length of the longest axis of a tensor")] = 2048,
    out: Annotated[Path, typer.Option(help="file of the results")] = Path("results/complexity.json"),
) -> None:
    """Counts Table 1 of the paper in compiled programs: memory and arithmetic of TNT, Shampoo and Adam."""
    cases = [(shape, view) for shape, view in CASES if max(shape) <= max_dim]
    rows = [{"shape": [*x], **count(x, v, batch_size)} for x, v in track(cases, "shapes")]
    ratios = [{k: x[0] / x[1] if isinstance(x, tuple) else x for k, x in row.items()} for row in rows]
    figure, axes = panels(2)
    for name in [*dict.fromkeys(itertools.chain(*rows))][2:]:
        pairs = zip(*(row[name][::-1] for row in rows if name in row), strict=True)
        axes[int("bytes" in name)].loglog(*pairs, "o", label=name, alpha=0.7, fillstyle="none")
    for axis, unit in zip(axes, ("operations", "bytes"), strict=True):
        axis.axline((1e4, 1e4), (1e6, 1e6), color="gray", linewidth=1, zorder=0)
        axis.set(xlabel=f"formula, {unit}", ylabel=f"counted {unit}")
        axis.legend(fontsize="small")
    tables = {"complexity": show("complexity", ratios)}
    save(out, {"batch_size": batch_size, "rows": rows, "tables": tables}, figure)


def load(shapes: list[Shape], devices: int) -> dict[str, float]:
    """The largest share of one device in the work d^3 of an inverse update, and bytes on a device on a mesh."""
    mesh = AbstractMesh((devices,), ("data",), axis_types=(AxisType.Explicit,))
    pairs = [zip(x.factors, x.dims, strict=True) for x in blocks.describe([*map(array, shapes)], None, options.MAX_DIM)]
    lengths = Counter(d for factor, d in itertools.chain(*pairs) if factor == factors.Dense())
    costs = [float(d) ** 3 for d in lengths]
    shares = sharding.equal_shares([*lengths.values()], costs, devices)
    loads = [sum(len(tasks) * cost for tasks, cost in zip(share, costs, strict=True)) for share in shares]

    def place(shape: Shape) -> Any:
        longest = max((d for d in shape if d % devices == 0), default=0)
        spec = [None] * shape.index(longest) + ["data"] if longest else []
        return array(shape, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def size(tree: Any) -> int:  # Counters are on no mesh: each device has them.
        local = [(x.sharding.shard_shape(x.shape) if x.sharding else x.shape, x.dtype) for x in jax.tree.leaves(tree)]
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in local)

    result = {"largest": max(loads) / sum(loads), "ideal": 1 / devices, "one_mode": max(costs) / sum(loads)}
    with jax.sharding.use_abstract_mesh(mesh):
        params = [*map(place, shapes)]
        return result | {"parameters": size(params), "state": size(jax.eval_shape(tnt_optax.tnt(0.1).init, params))}


def meshes(
    devices: Annotated[list[int], typer.Option(help="number of devices; repeatable")] = DEVICES,
    out: Annotated[Path, typer.Option(help="file of the results")] = Path("results/meshes.json"),
) -> None:
    """Counts the load of a device of a mesh: its share of an inverse update, and bytes of parameters and state."""
    models = {"autoencoder": AUTOENCODER, "gpt2": GPT2_SHAPES}
    results = {name: [{"devices": n} | load(shapes, n) for n in devices] for name, shapes in models.items()}
    tables = {f"meshes-{name}": show(f"meshes-{name}", rows) for name, rows in results.items()}
    save(out, {"models": results, "tables": tables})


def memory(
    max_dims: Annotated[list[int], typer.Option(help="`max_dim` of TNT; repeatable")] = MAX_DIMS,
    out: Annotated[Path, typer.Option(help="file of the results")] = Path("results/memory.json"),
) -> None:
    """Counts the bytes of state, of TNT with several `max_dim` and of other optimizers.

    The models are GPT-2 (124M parameters) and the workload `transformer_wide`.
    """
    optimizers: dict[str, Any] = {"AdamW": optax.adamw(1e-3), "Muon": optax.contrib.muon(1e-3)}
    optimizers |= {"SOAP": soap(1e-3), "Shampoo": shampoo(1e-3)}
    for label, view in {"": None, ", vectors diagonal": TensorView(((0,),), diagonal_modes=(0,))}.items():
        views = functools.partial(lambda view, path, shape: view if len(shape) == 1 else None, view)
        optimizers |= {f"TNT, max_dim={d}{label}": tnt_optax.tnt(1e-3, max_dim=d, views=views) for d in max_dims}
    rows, parameters = [], sum(map(math.prod, GPT2_SHAPES))
    for name, tx in optimizers.items():
        of_kind = {kind: state_bytes(tx, [*map(array, shapes)]) for kind, shapes in GPT2.items()}
        total = sum(of_kind.values())
        rows.append({"optimizer": name, **of_kind, "total": total, "per_parameter": total / parameters})
    figure, (axis,) = panels(1, width=7)
    shown = [row for row in rows[::-1] if row["optimizer"] != "Shampoo"]  # Its bar would make all others short.
    for kinds in ([*GPT2][:end] for end in (3, 2, 1)):  # Cumulative sums: the longest bar is drawn first.
        sums = [sum(row[kind] for kind in kinds) / parameters for row in shown]
        axis.barh([row["optimizer"] for row in shown], sums, label=kinds[-1])
    axis.legend()
    axis.set(title="GPT-2, 124M parameters", xlabel="bytes of state for each parameter")
    problem, of_workload = WORKLOADS["transformer_wide"].make(0), []
    parameters_of_workload = sum(x.size for x in jax.tree.leaves(problem.params))
    for name in ("adaptive_tnt", "adamw", "muon", "soap"):
        total = state_bytes(OPTIMIZERS[name].make(1e-3, problem), problem.params)
        row = {"optimizer": name.replace("_", " "), "state": total, "per_parameter": total / parameters_of_workload}
        of_workload.append(row)
    models = {"memory": rows, "memory-transformer_wide": of_workload}
    tables = {name: show(name, of_model) for name, of_model in models.items()}
    save(out, {"parameters": parameters, "state": rows, "tables": tables}, figure)
