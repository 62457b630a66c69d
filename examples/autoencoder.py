"""The paper's autoencoders (Section 6.1, Figure 2): TNT beside KFAC, Shampoo, Adam and SGD with momentum.

"TNT" and the baselines have the settings that its authors published for MNIST, statistics at every step, inverses every
20, and a warm start of one pass over the data; "TNT, bounded" has this library's `scale="fisher"`, a `trust_radius`
that falls, and a period of its own for the inverses.
An interrupted run resumes from its last epoch.
"""

import argparse
import csv
import dataclasses
import itertools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from common import data, report
from common.methods import PUBLISHED, Bound, methods
from common.problems import autoencoder_problem
from common.training import Curve
from rich.console import Console

import tnt_optax


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What fits a dataset."""

    widths: tuple[int, ...]
    batch_size: int
    epochs: int
    predictive: Any
    bound: Bound


DATASETS = {
    "digits": Dataset((128, 64, 32, 8), 128, 40, tnt_optax.Bernoulli(), Bound(((0, 0.1),))),
    "mnist": Dataset(
        (1000, 500, 250, 30),
        1000,
        20,
        tnt_optax.Bernoulli(),
        Bound(((0, 1.0), (300, 0.2), (1200, 0.2), (1800, 0.04)), 5),
    ),
    "faces": Dataset((2000, 1000, 500, 30), 1000, 10, tnt_optax.Normal(), Bound(((0, 1.0), (300, 0.2)))),
}


def main() -> None:
    args = parse_args()
    console = Console()
    try:
        images = data.load(args.dataset, args.data_dir)
    except FileNotFoundError as error:
        raise SystemExit(f"--data-dir: {error}") from None
    line_up = methods(statistics_period=args.statistics_period, inverse_period=args.inverse_period, bound=args.bound)
    predictive = DATASETS[args.dataset].predictive
    settings = {name: dict(PUBLISHED[name]) for name in args.optimizers}
    tuning: dict[str, list[dict[str, float]]] = {}
    curves: dict[str, list[Curve]] = {name: [] for name in args.optimizers}
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"autoencoder_{args.dataset}"
    title = ""
    for seed in range(args.seeds):
        problem = autoencoder_problem(images, args.widths, args.batch_size, seed=seed, predictive=predictive)
        title = f"{problem.name} on {args.dataset}"
        if seed == 0:
            console.print(
                f"[bold]{title}[/bold]: {len(problem.train[0])} training and {len(problem.test[0])} test images, "
                f"batches of {args.batch_size}, {problem.steps_per_epoch} steps an epoch."
            )
        batches = problem.steps_per_epoch if args.warm_start is None else args.warm_start
        with report.progress_bar(console) as progress:
            for name in args.optimizers:
                method, trainer = line_up[name], line_up[name].trainer(problem)
                warm_start = batches if method.warm_start else 0
                if args.grid and seed == 0:
                    grid = around(settings[name], args.grid)
                    steps = args.tuning_epochs * problem.steps_per_epoch
                    ticker = report.Ticker(progress, f"tune {name}", len(grid) * steps)
                    tuning[name] = trainer.search(
                        grid, args.tuning_epochs, warm_start=warm_start, on_step=ticker, on_trial=ticker.trials(steps)
                    )
                    if not math.isfinite(tuning[name][0]["loss"]):
                        raise SystemExit(f"{name} diverged on the whole grid: give smaller factors to --grid.")
                    settings[name] = {key: value for key, value in tuning[name][0].items() if key != "loss"}
                ticker = report.Ticker(progress, f"{seed} {name}", args.epochs * problem.steps_per_epoch)
                curves[name].append(
                    trainer.train(
                        args.epochs,
                        settings[name],
                        seed=seed,
                        warm_start=warm_start,
                        max_seconds=args.seconds,
                        folder=folder_of_run(args, problem.name, name, settings[name], warm_start, seed),
                        on_step=ticker,
                        on_epoch=lambda epoch, t=ticker, steps=problem.steps_per_epoch: t.skip_to(epoch * steps, ""),
                    )
                )
                write(stem, args, settings, tuning, curves)
    report.plot_curves(stem.with_suffix(".png"), title, curves, log=True)
    print_results(console, args, settings, curves)
    console.print(f"Wrote {os.path.relpath(stem)}.json, .csv and .png.")


def bound_of(text: str) -> Bound:
    *knots, period = text.split(",")
    radii = tuple((int(step), float(radius)) for step, radius in (knot.split(":") for knot in knots))
    if not radii or list(radii) != sorted(radii) or min(radius for _, radius in radii) <= 0:
        raise argparse.ArgumentTypeError(f"expected positive radii at growing steps, and then T2, got {text!r}")
    return Bound(radii, int(period))


def around(settings: dict[str, float], factors: list[float]) -> list[dict[str, float]]:
    """The settings with each of their numbers multiplied by each of the factors."""
    names = list(settings)
    return [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*([factor * settings[name] for factor in factors] for name in names))
    ]


def folder_of_run(
    args: argparse.Namespace, problem: str, name: str, settings: dict[str, float], warm_start: int, seed: int
) -> Path:
    """Where the checkpoints of this run are: all that makes it what it is, is in the name."""
    numbers = "_".join(f"{value:g}" for value in settings.values())
    bound = ""
    if name == "TNT, bounded":
        radii = "".join(f"_{radius:g}at{step}" for step, radius in args.bound.radii)
        bound = f"{radii}_T{args.bound.inverse_period}"
    run = f"{problem}_batch{args.batch_size}_T{args.statistics_period}_{args.inverse_period}_warm{warm_start}"
    return args.out / "checkpoints" / run.replace(" ", "_") / f"{name}_{numbers}{bound}_seed{seed}".replace(" ", "_")


def write(stem: Path, args: argparse.Namespace, settings: Any, tuning: Any, curves: dict[str, list[Curve]]) -> None:
    report.save_json(
        stem.with_suffix(".json"),
        {
            "arguments": {
                **{key: value for key, value in vars(args).items() if not isinstance(value, Path)},
                "bound": dataclasses.asdict(args.bound),
            },
            "machine": report.machine(),
            "settings": settings,
            "tuning": tuning,
            "curves": {name: [vars(curve) for curve in of_seeds] for name, of_seeds in curves.items()},
        },
    )
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["optimizer", "seed", "epoch", "train_loss", "test_loss", "seconds", "seconds_with_warm_start"])
        for name, of_seeds in curves.items():
            for seed, curve in enumerate(of_seeds):
                rows = zip(curve.train_loss, curve.test_loss, curve.seconds, strict=True)
                for epoch, (train, test, seconds) in enumerate(rows):
                    writer.writerow([name, seed, epoch, train, test, seconds, seconds + curve.warm_start_seconds])


def print_results(
    console: Console, args: argparse.Namespace, settings: dict[str, dict[str, float]], curves: dict[str, list[Curve]]
) -> None:
    epochs = sorted({epoch for epoch in (1, 5, 10, 20, 50, args.epochs) if epoch <= args.epochs})
    rows = []
    for name, of_seeds in curves.items():
        last = [curve for curve in of_seeds if math.isfinite(curve.final)]
        diverged = len(of_seeds) - len(last)

        def median(values: list[float]) -> str:
            return f"{np.median(values):.2f}" if values else ""

        rows.append(
            [
                name,
                *(f"{settings[name][key]:g}" if key in settings[name] else "" for key in ("learning_rate", "damping")),
                *(median([c.train_loss[epoch] for c in last if epoch < len(c.train_loss)]) for epoch in epochs),
                median([c.test_loss[-1] for c in last]),
                median([c.seconds[-1] for c in last]),
                median([c.warm_start_seconds for c in last]),
                str(diverged or ""),
            ]
        )
    columns = [
        "optimizer",
        "rate",
        "damping",
        *(f"epoch {e}" for e in epochs),
        "test",
        "s",
        "warm start, s",
        "diverged",
    ]
    report.print_table(console, f"Training loss in nats per image, median of {args.seeds} seeds", columns, rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    every = tuple(methods())
    parser.add_argument(
        "--dataset",
        choices=DATASETS,
        default="digits",
        help="digits: 1,797 8x8 images from scikit-learn; mnist: 70,000 28x28 images, through tensorflow_datasets; "
        "faces: 144,900 25x25 images made of the 400 Olivetti faces",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="where tensorflow_datasets has already prepared MNIST, or where olivetti_faces.npz is; it is only read",
    )
    parser.add_argument("--optimizers", nargs="+", choices=every, default=every)
    parser.add_argument(
        "--grid",
        type=float,
        nargs="+",
        metavar="FACTOR",
        help="search the learning rate and the damping of every optimizer: the published ones times these factors",
    )
    parser.add_argument("--tuning-epochs", type=int, default=5, help="of each point of the grid")
    parser.add_argument("--seeds", type=int, default=1, help="how many, counted from 0")
    parser.add_argument("--epochs", type=int, help="passes over the training images (default: what fits)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no other epoch begins after so many")
    parser.add_argument("--batch-size", type=int, help="images a step (default: what fits)")
    parser.add_argument("--widths", type=int, nargs="+", help="of the encoder's layers (default: what fits)")
    parser.add_argument("--statistics-period", type=int, default=1, help="T1")
    parser.add_argument("--inverse-period", type=int, default=20, help='T2, but of "TNT, bounded"')
    parser.add_argument(
        "--bound",
        type=bound_of,
        metavar="STEP:RADIUS,...,PERIOD",
        help='of "TNT, bounded": its trust radius, which changes exponentially from each of these steps to the next; '
        "its T2 (default: what fits)",
    )
    parser.add_argument("--warm-start", type=int, help="of how many batches (default: of one pass over the data)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for what is written")
    args = parser.parse_args()
    if args.data_dir and args.dataset == "digits":
        parser.error("--data-dir goes with --dataset mnist or faces: the digits come with scikit-learn.")
    for name in ("widths", "batch_size", "epochs", "bound"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(DATASETS[args.dataset], name))
    return args


if __name__ == "__main__":
    main()
