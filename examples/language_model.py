"""Trains a transformer on Python's own source, byte by byte, with TNT, AdamW and Muon, and compares them.

The learning rate of each is first searched on the same grid, relative to what is usual for it; then each is trained
with its best one. All start from the same parameters, see the same batches and follow the same schedule.
"""

import argparse
import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Where other programs want the cores too, the threads of LAPACK wait for each other much longer than they compute: the
# inverses of one refresh took 2.4 s with two threads and 0.03 s with one. Read when JAX is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import data, report
from common.problems import PaddedProblem, language_problem
from common.training import Curve, Trainer
from rich.console import Console

import tnt_optax

USUAL_RATES = {"TNT": 0.1, "AdamW": 3e-3, "Muon": 3e-3}
WARM_START = 10  # batches
MEASURED_BYTES = 16_384
VIEWS = tnt_optax.flax_views(stacked=("blocks",))


def main() -> None:
    args = parse_args()
    console = Console()
    texts = data.python_sources(args.context)
    if len(texts.train) < args.batch_size:
        raise SystemExit(f"--batch-size: there are {len(texts.train)} sequences only.")
    console.print(
        f"[bold]Python's standard library[/bold]: {np.sum(texts.train >= 0):,} bytes to train on, and "
        f"{np.sum(texts.test >= 0):,} of other files for validation; batches of {args.batch_size} sequences of "
        f"{args.context} bytes."
    )
    rates = {name: [factor * USUAL_RATES[name] for factor in args.grid] for name in args.optimizers}
    for name, of_one in rates.items():
        console.print(f"Learning rates of {name}: {', '.join(f'{rate:g}' for rate in of_one)}.")

    start = time.perf_counter()
    tuning: dict[str, list[dict[str, float]]] = {}
    chosen: dict[str, dict[str, float]] = {}
    curves: dict[str, list[Curve]] = {}
    problem = make_problem(args, texts, seed=args.seed)
    trainers = {name: Trainer(problem, optimizer(args, name)) for name in args.optimizers}
    with report.progress_bar(console) as progress:
        for name, trainer in trainers.items():
            ticker = report.Ticker(progress, f"tune {name}", len(args.grid) * args.tuning_steps)
            tuning[name] = trainer.search(
                [{"learning_rate": rate, "steps": args.tuning_steps} for rate in rates[name]],
                args.tuning_steps // args.measure_every,
                seed=args.seed,
                warm_start=warm_start(name),
                on_step=ticker,
                on_trial=ticker.trials(args.tuning_steps),
            )
            if not math.isfinite(tuning[name][0]["loss"]):
                raise SystemExit(f"{name} diverged on the whole grid: give it a smaller --grid.")
            chosen[name] = {"learning_rate": tuning[name][0]["learning_rate"], "steps": args.steps}
        for name, trainer in trainers.items():
            ticker = report.Ticker(progress, f"train {name}", args.seeds * args.steps)
            curves[name] = [
                trainer.train(
                    args.steps // args.measure_every,
                    chosen[name],
                    seed=seed,
                    params=make_problem(args, texts, seed=seed).params,
                    warm_start=warm_start(name),
                    on_step=ticker,
                )
                for seed in range(args.seed + 1, args.seed + 1 + args.seeds)
            ]

    print_results(console, args, curves, chosen)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / "language_model"
    report.plot_curves(
        stem.with_suffix(".png"),
        f"{problem.name} on Python's standard library",
        curves,
        per="byte",
        epoch_steps=problem.epoch_steps,
    )
    report.save_json(
        stem.with_suffix(".json"),
        {
            "arguments": {key: value for key, value in vars(args).items() if not isinstance(value, Path)},
            "machine": {**report.machine(), "cores": os.cpu_count()},
            "parameters": sum(x.size for x in jax.tree.leaves(problem.params)),
            "bytes": {name: int(np.sum(texts_of >= 0)) for name, texts_of in texts._asdict().items()},
            "tuning": tuning,
            "chosen": chosen,
            "curves": {name: [dataclasses.asdict(curve) for curve in of_one] for name, of_one in curves.items()},
        },
    )
    console.print(
        f"Wrote {os.path.relpath(stem)}.png and .json. All in all {time.perf_counter() - start:.0f} s "
        f"on {os.cpu_count()} cores ({report.machine()['device']})."
    )


def make_problem(args: argparse.Namespace, texts: data.Texts, *, seed: int) -> PaddedProblem:
    return language_problem(
        texts,
        width=args.width,
        layers=args.layers,
        heads=args.heads,
        batch_size=args.batch_size,
        epoch_steps=args.measure_every,
        measured=-(-MEASURED_BYTES // args.context),
        dtype=jnp.dtype(args.dtype),
        seed=seed,
    )


def warm_start(name: str) -> int:
    return WARM_START if name == "TNT" else 0


def optimizer(args: argparse.Namespace, name: str) -> Callable[..., optax.GradientTransformation]:
    """The optimizer of that name, as a function of its highest learning rate and the number of steps.

    The rate rises over the first tenth of the steps, and falls to zero along a cosine.
    """

    # Optax's own schedule has to know the number of steps when it is made. Here that is injected, like the rate, so
    # that tuning and training share one compiled step.
    def schedule(highest: Any, steps: Any) -> Callable[[Any], Any]:
        def rate(count: Any) -> Any:
            done = (count + 1) / steps
            return highest * jnp.minimum(10 * done, (1 + jnp.cos(jnp.pi * jnp.clip((done - 0.1) / 0.9, 0, 1))) / 2)

        return rate

    def tnt(learning_rate: Any, steps: Any) -> optax.GradientTransformation:
        return tnt_optax.tnt(
            schedule(learning_rate, steps),
            damping=args.damping,
            statistics_decay=0.95,
            trust_radius=args.trust_radius,
            statistics_period=args.statistics_period,
            inverse_period=args.inverse_period,
            views=VIEWS,
        )

    def adamw(learning_rate: Any, steps: Any) -> optax.GradientTransformation:
        return optax.adamw(schedule(learning_rate, steps), b2=0.95)

    def muon(learning_rate: Any, steps: Any) -> optax.GradientTransformation:
        return optax.contrib.muon(
            schedule(learning_rate, steps),
            # As long as the steps of Adam, which it takes for embeddings and vectors, so that one rate fits all.
            consistent_rms=0.2,
            adam_b2=0.95,
            muon_weight_dimension_numbers=matrices,
        )

    return {"TNT": tnt, "AdamW": adamw, "Muon": muon}[name]


def matrices(params: Any) -> Any:
    """Muon's argument: the axes of each matrix in TNT's view, but for embeddings; None where Muon uses Adam."""

    def dimensions(path: Any, x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        view = VIEWS(path, x.shape)
        embedding = jax.tree_util.keystr(path[-1:], simple=True) == "embedding"
        if view is None or embedding or len(view.modes) != 2:
            return None
        return optax.contrib.MuonDimensionNumbers(*view.modes)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def print_results(
    console: Console,
    args: argparse.Namespace,
    curves: Mapping[str, Sequence[Curve]],
    chosen: Mapping[str, Mapping[str, float]],
) -> None:
    rows = []
    for name, of_seeds in curves.items():
        train, test, seconds = (
            np.mean([getattr(curve, key)[-1] for curve in of_seeds]) for key in ("train_loss", "test_loss", "seconds")
        )
        rows.append(
            [
                name,
                f"{chosen[name]['learning_rate']:g}",
                f"{train:.3f}",
                f"{test:.3f}",
                f"{test / math.log(2):.3f}",
                f"{seconds:.1f}",
                f"{1000 * seconds / args.steps:.0f}",
            ]
        )
    columns = ["optimizer", "rate", "train, nats", "validation, nats", "validation, bits", "seconds", "ms/step"]
    title = f"After {args.steps} steps (loss per byte; means over {args.seeds} seed{'s' * (args.seeds > 1)})"
    report.print_table(console, title, columns, rows)
    edges = {
        name
        for name, of_one in chosen.items()
        if len(args.grid) > 1
        # The very products that were tried: a quotient may be off by a rounding.
        and of_one["learning_rate"] in (min(args.grid) * USUAL_RATES[name], max(args.grid) * USUAL_RATES[name])
    }
    if edges:
        console.print(f"The best learning rate of {', '.join(sorted(edges))} is on the edge of the grid: widen it.")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=_integer, default=300, help="with the tuned learning rates")
    parser.add_argument("--tuning-steps", type=_integer, default=100, help="for each point of the grid")
    parser.add_argument("--measure-every", type=_integer, default=50, help="steps between two measured losses")
    parser.add_argument("--width", type=_integer, default=64, help="of the transformer")
    parser.add_argument("--layers", type=_integer, default=4, help="of the transformer")
    parser.add_argument("--heads", type=_integer, default=4, help="of the attention; they divide --width")
    parser.add_argument("--context", type=_integer, default=128, help="bytes of a sequence")
    parser.add_argument("--batch-size", type=_integer, default=8, help="sequences a step")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the parameters and the activations"
    )
    parser.add_argument(
        "--optimizers", nargs="+", choices=USUAL_RATES, default=list(USUAL_RATES), help="which ones are compared"
    )
    parser.add_argument(
        "--grid",
        type=_positive,
        nargs="+",
        default=[0.3, 1.0, 3.0],
        help="factors of each optimizer's usual learning rate: "
        + ", ".join(f"{rate:g} for {name}" for name, rate in USUAL_RATES.items()),
    )
    parser.add_argument("--damping", type=_positive, default=0.03, help="TNT's")
    parser.add_argument(
        "--trust-radius",
        type=_positive,
        default=0.05,
        help="bounds TNT's steps: each changes the predictions by a KL divergence of at most about half its square, "
        "in nats per byte",
    )
    parser.add_argument(
        "--statistics-period", type=_integer, default=2, help="T1: steps between statistics updates of TNT"
    )
    parser.add_argument("--inverse-period", type=_integer, default=20, help="T2: steps between inverse updates of TNT")
    parser.add_argument("--seeds", type=_integer, default=1, help="how many trainings with the tuned learning rates")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the initial parameters, the batches and the sampled labels while tuning; the trainings take the next",
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the picture and the JSON file")
    args = parser.parse_args()
    if args.width % args.heads:
        parser.error(f"--heads: {args.heads} do not divide a --width of {args.width}.")
    for name in ("steps", "tuning_steps"):
        if (steps := getattr(args, name)) % args.measure_every:
            parser.error(
                f"--measure-every: {args.measure_every} does not divide the {steps} --{name.replace('_', '-')}."
            )
    return args


def _integer(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text}")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"expected a finite number > 0, got {text}")
    return value


if __name__ == "__main__":
    main()
