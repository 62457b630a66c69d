"""Trains with labels that are sampled for a part of each batch only, and compares the losses.

The sampled gradient is a mean of independent terms of mean zero, so with `scale="fisher"` its covariance is the Fisher
matrix, whatever their number: a quarter of the batch estimates the same matrix, at a quarter of the cost.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import optax
from common import data, report
from common.problems import autoencoder_problem
from common.training import Curve, Trainer
from rich.console import Console

import tnt_optax

WIDTHS = {"digits": (128, 64, 32, 8), "mnist": (500, 250, 125, 30)}


def main() -> None:
    args = parse_args()
    console = Console()
    images = data.load(args.dataset, args.data_dir)
    curves: dict[int, list[Curve]] = {subsample: [] for subsample in args.subsamples}
    with report.progress_bar(console) as progress:
        for seed in range(args.seeds):
            problem = autoencoder_problem(images, WIDTHS[args.dataset], args.batch_size, seed=seed)
            for subsample in args.subsamples:
                trainer = Trainer(problem, tnt, subsample=subsample)
                ticker = report.Ticker(progress, f"{seed}: 1/{subsample}", args.epochs * problem.steps_per_epoch)
                hyperparams = {"learning_rate": args.learning_rate, "damping": args.damping}
                curves[subsample].append(trainer.train(args.epochs, hyperparams, seed=seed, on_step=ticker))
    rows = [
        [
            f"1/{subsample}",
            *(f"{np.mean([curve.train_loss[epoch] for curve in of_subsample]):.2f}" for epoch in epochs(args.epochs)),
            f"{np.mean([curve.test_loss[-1] for curve in of_subsample]):.2f}",
            f"{np.mean([curve.seconds[-1] for curve in of_subsample]):.1f}",
        ]
        for subsample, of_subsample in curves.items()
    ]
    columns = ["of a batch", *(f"epoch {epoch}" for epoch in epochs(args.epochs)), "test loss", "seconds"]
    report.print_table(console, f"Training loss in nats, mean of {args.seeds} seeds", columns, rows)
    args.out.mkdir(parents=True, exist_ok=True)
    report.save_json(
        args.out / f"fraction_{args.dataset}.json",
        {
            "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
            "machine": report.machine(),
            "curves": {
                f"1/{subsample}": [vars(curve) for curve in of_subsample] for subsample, of_subsample in curves.items()
            },
        },
    )


def tnt(learning_rate: Any, damping: Any) -> optax.GradientTransformation:
    return tnt_optax.tnt(learning_rate, damping=damping, trust_radius=0.1, statistics_period=1, inverse_period=20)


def epochs(last: int) -> list[int]:
    return sorted({max(1, last // 4), max(1, last // 2), last})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dataset", choices=tuple(WIDTHS), default="digits")
    parser.add_argument("--data-dir", type=Path, help="where tensorflow_datasets has already prepared MNIST")
    parser.add_argument(
        "--subsamples", type=int, nargs="+", default=(1, 2, 4, 8), help="labels are sampled for one in so many examples"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many, counted from 0")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step")
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
