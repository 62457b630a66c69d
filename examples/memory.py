"""How much state TNT keeps, and whether less would do.

First, by `jax.eval_shape` and so without any memory, the bytes of state for GPT-2's 124,439,808 parameters: of TNT at
several `max_dim`, with all factors of the biases and norms and with their diagonals only, and of other optimizers.
SOAP is a formula: the two moments of AdamW, and for each mode of a matrix that is no longer than 10,000 the average
of a covariance and its eigenbasis; nothing besides the moments for vectors.

Second, measured: the digits autoencoder, trained with state that is bfloat16 between steps, or that keeps no
contractions at all.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import data, report
from common.baselines import shampoo
from common.models import Shapes, gpt2
from common.problems import autoencoder_problem
from common.training import Trainer
from rich.console import Console

import tnt_optax
from tnt_optax import TensorView, TNTState

MAX_DIMS = (256, 512, 768, 1024, 2048, 3072, 4096, 8192)
WIDTHS = (128, 64, 32, 8)
FLOAT = 4  # bytes
SOAP_MAX_DIM = 10_000


def diagonal_vectors(path: Any, shape: tuple[int, ...]) -> TensorView | None:
    """Keeps only the diagonal of the factor of a vector, whatever `max_dim`."""
    del path
    return TensorView(((0,),), diagonal_modes=(0,)) if len(shape) == 1 else None


def state_bytes(tx: optax.GradientTransformation, shapes: Sequence[tuple[int, ...]]) -> int:
    state = jax.eval_shape(tx.init, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def soap_bytes(shapes: Sequence[tuple[int, ...]]) -> int:
    """By the formula above."""
    return FLOAT * sum(
        2 * math.prod(shape) + sum(2 * d * d for d in shape if len(shape) > 1 and d <= SOAP_MAX_DIM) for shape in shapes
    )


def table(shapes: Shapes, max_dims: Sequence[int]) -> list[dict[str, Any]]:
    """Bytes of state of each optimizer, by kind of parameter and in all."""

    def of(tx: optax.GradientTransformation) -> Callable[[Sequence[tuple[int, ...]]], int]:
        return lambda shapes: state_bytes(tx, shapes)

    optimizers = {
        "AdamW": of(optax.adamw(1e-3)),
        "Muon": of(optax.contrib.muon(1e-3)),
        "SOAP": soap_bytes,
        "Shampoo": of(shampoo(1e-3)),
        **{f"TNT, max_dim={d}": of(tnt_optax.tnt(1e-3, max_dim=d)) for d in max_dims},
        **{
            f"TNT, max_dim={d}, vectors diagonal": of(tnt_optax.tnt(1e-3, max_dim=d, views=diagonal_vectors))
            for d in max_dims
        },
    }
    parameters = sum(math.prod(shape) for of_kind in shapes.values() for shape in of_kind)
    rows = []
    for name, count in optimizers.items():
        by_kind = {kind: count(of_kind) for kind, of_kind in shapes.items()}
        total = sum(by_kind.values())
        rows.append({"optimizer": name, "bytes": by_kind, "total": total, "per_parameter": total / parameters})
    return rows


def stored(
    tx: optax.GradientTransformationExtraArgs,
    narrow: Callable[[TNTState], TNTState],
    widen: Callable[[TNTState], TNTState],
) -> optax.GradientTransformationExtraArgs:
    """`tx`, whose `TNTState` is narrowed between steps, and widened before each."""

    def change(function: Callable[[TNTState], TNTState], state: Any) -> Any:
        def is_ours(node: Any) -> bool:
            return isinstance(node, TNTState)

        return jax.tree.map(lambda x: function(x) if is_ours(x) else x, state, is_leaf=is_ours)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        updates, state = tx.update(updates, change(widen, state), params, **extra_args)
        return updates, change(narrow, state)

    return optax.GradientTransformationExtraArgs(lambda params: change(narrow, tx.init(params)), update)


def cast(*fields: str, dtype: Any) -> Callable[[TNTState], TNTState]:
    return lambda state: state._replace(**{name: optax.tree.cast(getattr(state, name), dtype) for name in fields})


def in_bfloat16(*fields: str) -> Callable[..., Any]:
    narrow, widen = cast(*fields, dtype=jnp.bfloat16), cast(*fields, dtype=jnp.float32)
    return lambda tx: stored(tx, narrow, widen)


def without_contractions(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """For `statistics_decay=0` and inverses that are updated with the statistics: the old contractions are not used."""
    return stored(
        tx,
        lambda state: state._replace(contractions=None),
        lambda state: state._replace(contractions=jax.tree.map(jnp.zeros_like, state.inverses)),
    )


# What is kept, and the settings that it needs.
EVERY_STEP = {"statistics_period": 1, "inverse_period": 20}
EVERY_PERIOD = {"statistics_period": 20, "inverse_period": 20}
STORAGES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "float32": (lambda tx: tx, EVERY_STEP),
    "contractions bfloat16": (in_bfloat16("contractions"), EVERY_STEP),
    "contractions, inverses bfloat16": (in_bfloat16("contractions", "inverses"), EVERY_STEP),
    "float32, T1 = 20": (lambda tx: tx, EVERY_PERIOD),
    "no contractions, T1 = 20": (without_contractions, {**EVERY_PERIOD, "statistics_decay": 0.0}),
}


def optimizer(storage: str, **options: Any) -> Callable[..., Any]:
    wrap, settings = STORAGES[storage]

    def make(learning_rate: Any, damping: Any) -> optax.GradientTransformation:
        return wrap(tnt_optax.tnt(learning_rate, damping=damping, trust_radius=0.1, **settings, **options))

    return make


def main() -> None:
    args = parse_args()
    console = Console()
    shapes = gpt2()
    rows = table(shapes, args.max_dims)
    columns = ["optimizer", *(f"{kind}, MB" for kind in shapes), "all, GB", "bytes / parameter"]
    cells = [
        [
            row["optimizer"],
            *(f"{count / 1e6:.0f}" for count in row["bytes"].values()),
            f"{row['total'] / 1e9:.2f}",
            f"{row['per_parameter']:.1f}",
        ]
        for row in rows
    ]
    report.print_table(console, "State for GPT-2, 124M parameters", columns, cells)

    everything = [shape for of_kind in shapes.values() for shape in of_kind]
    storages = {
        name: state_bytes(optimizer(name, views=diagonal_vectors, max_dim=4096)(1e-3, 0.1), everything)
        for name in STORAGES
    }
    runs: list[dict[str, Any]] = []
    images = data.digits()
    with report.progress_bar(console) as progress:
        for seed in range(args.seeds):
            problem = autoencoder_problem(images, WIDTHS, args.batch_size, seed=seed)
            for name in STORAGES:
                trainer = Trainer(problem, optimizer(name))
                for damping in args.dampings:
                    ticker = report.Ticker(progress, f"{seed}: {name}", args.epochs * problem.steps_per_epoch)
                    hyperparams = {"learning_rate": args.learning_rate, "damping": damping}
                    curve = trainer.train(args.epochs, hyperparams, seed=seed, on_step=ticker)
                    runs.append({"storage": name, "damping": damping, "seed": seed, **vars(curve)})
    cells = [
        [
            name,
            f"{storages[name] / 1e9:.2f}",
            *(f"{mean_loss(runs, name, damping, -1):.2f}" for damping in args.dampings),
        ]
        for name in STORAGES
    ]
    columns = ["between steps", "GPT-2, GB", *(f"loss, damping {damping:g}" for damping in args.dampings)]
    report.print_table(console, f"Training loss after {args.epochs} epochs, mean of {args.seeds} seeds", columns, cells)
    args.out.mkdir(parents=True, exist_ok=True)
    plot(args.out / "memory.png", rows, runs)
    report.save_json(
        args.out / "memory.json",
        {
            "arguments": {key: value for key, value in vars(args).items() if not isinstance(value, Path)},
            "machine": report.machine(),
            "parameters": sum(math.prod(shape) for shape in everything),
            "state": rows,
            "storages": storages,
            "runs": runs,
        },
    )


def mean_loss(runs: Sequence[Mapping[str, Any]], storage: str, damping: float, epoch: int) -> float:
    """Of the training data, over the seeds; NaN or infinity where one diverged."""
    chosen = [run for run in runs if run["storage"] == storage and run["damping"] == damping]
    return float(np.mean([run["train_loss"][epoch] for run in chosen]))


def plot(path: Path, rows: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> None:
    """Bytes for each parameter by kind on the left, the loss by what is stored on the right, one for each damping."""
    dampings = sorted({run["damping"] for run in runs}, reverse=True)
    figure = plt.figure(figsize=(6 + 4 * len(dampings), 5), layout="constrained")
    left, *others = figure.subplots(1, 1 + len(dampings), width_ratios=[6, *[4] * len(dampings)])
    shown = [row for row in rows[::-1] if row["optimizer"] != "Shampoo"]  # Its vocabulary is as long as all the others.
    start = np.zeros(len(shown))
    for kind in shown[0]["bytes"]:
        scale = [row["per_parameter"] / row["total"] for row in shown]
        values = np.multiply(scale, [row["bytes"][kind] for row in shown])
        left.barh([row["optimizer"] for row in shown], values, left=start, label=kind)
        start += values
    left.set(title="GPT-2, 124M parameters", xlabel="bytes of state for each parameter")
    left.legend()
    for axis, damping in zip(others, dampings, strict=True):
        for name, style in zip(STORAGES, itertools.cycle(("-", "--", ":")), strict=False):
            chosen = [run["train_loss"] for run in runs if run["storage"] == name and run["damping"] == damping]
            axis.plot(np.mean(list(zip(*chosen, strict=False)), axis=1), style, label=name)
        axis.set(title=f"digits autoencoder, damping {damping:g}", xlabel="epochs", ylabel="training loss, nats")
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The memory of TNT's state beside other optimizers', and what less of it does to a training.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--max-dims", type=int, nargs="+", default=MAX_DIMS, help="of TNT")
    parser.add_argument("--seeds", type=int, default=3, help="how many, counted from 0")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step")
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--dampings", type=float, nargs="+", default=(0.1, 0.03))
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the picture and the JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
