"""Table 1 of the paper, measured: the memory of an optimizer, and the arithmetic of its update, for one tensor.

Nothing is run. The memory is that of the state which `init` would make. The arithmetic is what XLA counts in the
compiled program (`cost_analysis`): a multiplication and an addition are one operation each. Three things about that
count: a conditional counts with its dearer branch, the body of a loop counts once however often it turns, and a call
of LAPACK counts nothing. Hence each part of TNT's update is compiled alone, an inverse for each mode, and LAPACK's
textbook counts are added: d^3/3 for a Cholesky factorization, d^2 n for a triangular system with n right-hand sides.
"""

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import report
from common.baselines import shampoo
from rich.console import Console

import tnt_optax
from tnt_optax import TensorView, phases
from tnt_optax.blocks import Block, describe
from tnt_optax.factors import Dense
from tnt_optax.options import MAX_DIM

FLOAT = 4  # bytes


class Case(NamedTuple):
    """A parameter, and how it is viewed; None: as the library does by default."""

    shape: tuple[int, ...]
    view: TensorView | None = None

    def block(self) -> Block:
        return describe(_array(self.shape), lambda path, shape: self.view, MAX_DIM)

    def dims(self) -> tuple[int, ...]:
        return self.block().dims


FOUR = TensorView(((0,), (1,), (2,), (3,)))
CASES = (
    Case((128,)),
    Case((1024,)),
    Case((64, 32)),
    Case((256, 128)),
    Case((784, 1000)),
    Case((2048, 512)),
    Case((3, 3, 16, 32)),
    Case((3, 3, 128, 256)),
    Case((5, 5, 256, 512)),
    Case((6, 8, 10, 12), FOUR),
    Case((3, 3, 128, 256), FOUR),
    Case((16, 24, 32, 40), FOUR),
)


def optimizers(case: Case) -> dict[str, optax.GradientTransformation]:
    """Each with everything due at every step."""
    tnt = tnt_optax.tnt(1e-3, statistics_period=1, inverse_period=1, views=lambda path, shape: case.view)
    result: dict[str, Any] = {"TNT": tnt, "Adam": optax.adam(1e-3)}
    if case.view is None:  # It has no other views.
        result["Shampoo"] = shampoo(1e-3, statistics_period=1, inverse_period=1)
    return result


def memory_formula(name: str, dims: Sequence[int]) -> int:
    """Floats: momentum, and two matrices for each mode; or Adam's two moments."""
    size = math.prod(dims)
    return 2 * size if name == "Adam" else size + 2 * sum(d**2 for d in dims)


def state_bytes(tx: optax.GradientTransformation, case: Case) -> int:
    state = jax.eval_shape(tx.init, _array(case.shape))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def flops(function: Callable[..., Any], *args: Any) -> float:
    """As XLA counts them, without calls of LAPACK."""
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    return float((analysis or {}).get("flops", math.nan))


def lapack_flops(function: Callable[..., Any], *args: Any) -> float:
    """Of the Cholesky factorizations and triangular systems in `function`, by the textbook."""

    def of_equation(equation: Any) -> float:
        shapes = [variable.aval.shape for variable in equation.invars]
        if equation.primitive.name == "cholesky":
            return shapes[0][-1] ** 3 / 3
        if equation.primitive.name == "triangular_solve":
            return shapes[0][-1] * math.prod(shapes[1])
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        return sum(of_jaxpr(x) for x in inner if hasattr(x, "eqns"))

    def of_jaxpr(jaxpr: Any) -> float:
        return sum(of_equation(equation) for equation in jaxpr.eqns)

    return of_jaxpr(jax.make_jaxpr(function)(*args))


def parts(case: Case) -> dict[str, float]:
    """Operations of each part of TNT's update, which are the terms of Table 1."""
    block, gradient, number = case.block(), _array(case.shape), _array(())
    matrices, inverse = tuple(map(_array, block.factor_shapes)), Dense().inverse

    def statistics(gradient: jax.Array, averages: Any, weight: jax.Array) -> Any:
        tensor, modes = block.to_tensor(gradient), enumerate(zip(block.factors, averages, strict=True))
        return [(1 - weight) * c + weight * factor.contraction(tensor, mode) for mode, (factor, c) in modes]

    return {
        "statistics": flops(statistics, gradient, matrices, number),
        "preconditioning": flops(functools.partial(phases.precondition, block), matrices, gradient),
        "inverses": sum(flops(inverse, u, number) + lapack_flops(inverse, u, number) for u in matrices),
    }


def part_formulas(dims: Sequence[int]) -> dict[str, float]:
    """The terms of Table 1 with constants.

    A product with a matrix is a multiplication and an addition for each number. An inverse without blocks (d <= 256) is
    a Cholesky factorization, d^3/3, a triangular system, d^3, and a product of matrices, 2 d^3.
    """
    products = 2.0 * sum(dims) * math.prod(dims)
    return {"statistics": products, "preconditioning": products, "inverses": 10 / 3 * sum(d**3 for d in dims)}


def sampled_pass(case: Case, batch_size: int) -> float:
    """Operations of the sampled gradient for a dense layer with that kernel: the backward pass that TNT adds."""
    value_and_grads = tnt_optax.value_and_sampled_grad(lambda w, x: x @ w, tnt_optax.Normal(), scale="mean")
    inputs, outputs = ((batch_size, d) for d in case.shape)
    key = jax.eval_shape(lambda: jax.random.key(0))
    sampled_grads = jax.eval_shape(value_and_grads, _array(case.shape), _array(inputs), _array(outputs), key)[2]
    return flops(lambda function: function(), sampled_grads)


def update(tx: Any, case: Case) -> float:
    """Operations of one update, as XLA counts them."""
    gradient = _array(case.shape)
    state = jax.eval_shape(tx.init, gradient)
    return flops(lambda g, s: optax.with_extra_args_support(tx).update(g, s, sampled_grads=g), gradient, state)


def update_formula(name: str, dims: Sequence[int]) -> float:
    """Of an update of Adam, or of Shampoo with one turn of the Newton iteration of each of its inverse roots."""
    if name == "Adam":
        return 12.0 * math.prod(dims)  # Two moments, 3 each; two corrections; root, eps, quotient, learning rate.
    p = 2 * len(dims)
    power = p.bit_length() + p.bit_count() - 2  # Products of matrices in a power, by repeated squaring.
    return 4.0 * sum(dims) * math.prod(dims) + 2 * (power + 2) * sum(d**3 for d in dims)


def _array(shape: tuple[int, ...]) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def measure(cases: Sequence[Case], batch_size: int, on_case: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    rows = []
    for case in cases:
        row: dict[str, Any] = {"shape": list(case.shape), "dims": list(case.dims())}
        row["memory"] = {
            name: {"bytes": state_bytes(tx, case), "formula": FLOAT * memory_formula(name, case.dims())}
            for name, tx in optimizers(case).items()
        }
        formulas = part_formulas(case.dims())
        row["parts"] = {name: {"flops": n, "formula": formulas[name]} for name, n in parts(case).items()}
        if len(case.shape) == 2:
            formula = 2 * batch_size * math.prod(case.shape)
            row["parts"]["sampled pass"] = {"flops": sampled_pass(case, batch_size), "formula": formula}
        row["updates"] = {
            name: {"flops": update(tx, case), "formula": update_formula(name, case.dims())}
            for name, tx in optimizers(case).items()
            if name != "TNT"
        }
        rows.append(row)
        on_case()
    return rows


def main() -> None:
    args = parse_args()
    console = Console()
    cases = [case for case in CASES if max(case.dims()) <= args.max_dim]
    with report.progress_bar(console) as progress:
        task = progress.add_task("shapes", total=len(cases), status="")
        rows = measure(cases, args.batch_size, lambda: progress.advance(task))
    names = ["TNT", "Shampoo", "Adam"]
    table = [[*_title(row), *(_bytes(row["memory"].get(name)) for name in names)] for row in rows]
    report.print_table(console, "Bytes of state: formula + rest", ["modes", *names], table)
    columns = ["modes", "statistics", "precond.", "inverses", "sampled", "Shampoo", "Adam"]
    table = [
        [
            *_title(row),
            *(_ratio(row["parts"].get(name)) for name in ("statistics", "preconditioning", "inverses", "sampled pass")),
            *(_ratio(row["updates"].get(name)) for name in ("Shampoo", "Adam")),
        ]
        for row in rows
    ]
    report.print_table(console, "Operations / formula, TNT's by part", columns, table)
    args.out.mkdir(parents=True, exist_ok=True)
    plot(args.out / "complexity.png", rows)
    report.save_json(
        args.out / "complexity.json",
        {
            "arguments": {key: value for key, value in vars(args).items() if not isinstance(value, Path)},
            "machine": report.machine(),
            "rows": rows,
        },
    )


def _title(row: dict[str, Any]) -> list[str]:
    return ["x".join(map(str, row["dims"]))]


def _bytes(entry: dict[str, int] | None) -> str:
    return "" if entry is None else f"{entry['formula']:,} + {entry['bytes'] - entry['formula']}"


def _ratio(entry: dict[str, float] | None) -> str:
    return "" if entry is None else f"{entry['flops'] / entry['formula']:.3f}"


def plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Measured against the formula: memory on the left, operations on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, kinds, measured in ((left, ["memory"], "bytes"), (right, ["parts", "updates"], "flops")):
        points: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            for kind in kinds:
                for name, entry in row[kind].items():
                    label = f"TNT: {name}" if kind == "parts" else name
                    points.setdefault(label, []).append((entry["formula"], entry[measured]))
        for (label, pairs), marker in zip(points.items(), "osv^xd", strict=False):
            axis.loglog(*np.transpose(pairs), marker, label=label, alpha=0.7, fillstyle="none")
        ends = [f([x for pairs in points.values() for x, _ in pairs]) for f in (min, max)]
        axis.loglog(ends, ends, color="gray", linewidth=1, zorder=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    left.set(title="optimizer state", xlabel="formula, bytes", ylabel="measured, bytes")
    right.set(title="operations", xlabel="formula", ylabel="counted in the compiled program")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Table 1 of the paper, measured: memory and arithmetic of TNT, Shampoo and Adam.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--batch-size", type=int, default=128, help="m, of the sampled gradient of a dense layer")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the picture and the JSON file")
    parser.add_argument("--max-dim", type=int, default=2048, help="leave out shapes with longer modes")
    args = parser.parse_args()
    if args.max_dim < min(max(case.dims()) for case in CASES):
        parser.error(f"--max-dim: no shape is left with {args.max_dim}.")
    if args.batch_size < 1:
        parser.error(f"--batch-size: expected a positive number, got {args.batch_size}.")
    return args


if __name__ == "__main__":
    main()
