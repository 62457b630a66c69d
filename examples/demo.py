"""Trains a deep autoencoder on handwritten digits with TNT, Adam and SGD with momentum, and compares them.

All start from the same parameters and see the same batches. The learning rate of TNT, Adam and SGD, and TNT's damping,
are first searched on one grid; then each is trained with its best setting and another seed. Adaptive TNT, whose steps
come from the quadratic model of each batch, has no learning rate: it is trained with its defaults, without a search.
"""

import argparse
import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optax
from common import data, report
from common.problems import autoencoder_problem
from common.training import Curve, Trainer
from rich.console import Console

import tnt_optax

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
DAMPINGS = (0.03, 0.1, 0.3)


@dataclasses.dataclass(frozen=True)
class Preset:
    """What fits a dataset."""

    widths: tuple[int, ...]
    batch_size: int
    epochs: int
    tuning_epochs: int


PRESETS = {
    "digits": Preset(widths=(128, 64, 32, 8), batch_size=128, epochs=40, tuning_epochs=40),
    "mnist": Preset(widths=(500, 250, 125, 30), batch_size=500, epochs=10, tuning_epochs=1),
}


def main() -> None:
    args = parse_args()
    console = Console()
    try:
        images = data.load(args.dataset, args.data_dir)
    except FileNotFoundError as error:
        raise SystemExit(f"--data-dir: {error}") from None
    problem = autoencoder_problem(images, args.widths, args.batch_size, seed=args.seed)
    title = f"{problem.name} on {args.dataset}"
    optimizers = make_optimizers(args)
    console.print(
        f"[bold]{title}[/bold]: {len(problem.train[0])} training and {len(problem.test[0])} test images, batches of "
        f"{problem.batch_size}, {problem.steps_per_epoch} steps an epoch."
    )
    console.print(
        f"Tuned on the same grid, {args.tuning_epochs} epochs each: learning rate in {list(args.learning_rates)} for "
        f"TNT, Adam and SGD, and damping in {list(args.dampings)} for TNT. The lowest training loss wins. Adaptive TNT "
        "has its defaults."
    )

    start = time.perf_counter()
    trainers = {name: Trainer(problem, optimizer) for name, (optimizer, _) in optimizers.items()}
    tuning: dict[str, list[dict[str, float]]] = {}
    curves: dict[str, Curve] = {}
    best: dict[str, dict[str, float]] = {}
    with report.progress_bar(console) as progress:
        for name, (_, grid) in optimizers.items():
            if not any(grid):  # Nothing to tune.
                best[name] = {}
                continue
            steps = args.tuning_epochs * problem.steps_per_epoch
            ticker = report.Ticker(progress, f"tune {name}", len(grid) * steps)
            tuning[name] = trainers[name].search(
                grid, args.tuning_epochs, seed=args.seed, on_step=ticker, on_trial=ticker.trials(steps)
            )
            winner = tuning[name][0]
            if not math.isfinite(winner["loss"]):
                raise SystemExit(f"{name} diverged on the whole grid: give it smaller --learning-rates.")
            best[name] = {key: value for key, value in winner.items() if key != "loss"}
        for name, trainer in trainers.items():
            ticker = report.Ticker(progress, f"train {name}", args.epochs * problem.steps_per_epoch)
            curves[name] = trainer.train(args.epochs, best[name], seed=args.seed + 1, on_step=ticker)

    print_results(console, args, curves, best, problem.steps_per_epoch)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"demo_{args.dataset}"
    report.plot_curves(stem.with_suffix(".png"), title, {name: [curve] for name, curve in curves.items()})
    report.save_json(
        stem.with_suffix(".json"),
        {
            "arguments": {key: value for key, value in vars(args).items() if not isinstance(value, Path)},
            "machine": report.machine(),
            "tuning": tuning,
            "chosen": best,
            "curves": {name: dataclasses.asdict(curve) for name, curve in curves.items()},
        },
    )
    console.print(
        f"Wrote {os.path.relpath(stem)}.png and .json. All in all {time.perf_counter() - start:.0f} s "
        f"on {os.cpu_count()} cores ({report.machine()['device']})."
    )


def make_optimizers(args: argparse.Namespace) -> dict[str, tuple[Callable[..., Any], list[dict[str, float]]]]:
    """Each one's factory, and the hyper-parameters to try."""

    def tnt(learning_rate: Any, damping: Any) -> optax.GradientTransformation:
        return tnt_optax.tnt(
            learning_rate,
            damping=damping,
            trust_radius=args.trust_radius,
            statistics_period=args.statistics_period,
            inverse_period=args.inverse_period,
        )

    def sgd_with_momentum(learning_rate: Any) -> optax.GradientTransformation:
        return optax.sgd(learning_rate, momentum=0.9)

    rates = [{"learning_rate": rate} for rate in args.learning_rates]
    with_damping = [{**rate, "damping": eps} for rate, eps in itertools.product(rates, args.dampings)]
    return {
        "Adaptive TNT": (lambda: tnt_optax.adaptive_tnt(), [{}]),
        "TNT": (tnt, with_damping),
        "Adam": (optax.adam, rates),
        "SGD-m": (sgd_with_momentum, rates),
    }


def print_results(
    console: Console, args: argparse.Namespace, curves: dict[str, Curve], best: dict[str, Any], steps_per_epoch: int
) -> None:
    rows = []
    for name, curve in curves.items():
        steps = (len(curve.seconds) - 1) * steps_per_epoch
        rows.append(
            [
                name,
                f"{best[name]['learning_rate']:g}" if "learning_rate" in best[name] else "",
                f"{best[name]['damping']:g}" if "damping" in best[name] else "",
                f"{curve.train_loss[-1]:.3f}",
                f"{curve.test_loss[-1]:.3f}",
                f"{curve.seconds[-1]:.2f}",
                f"{1000 * curve.seconds[-1] / steps:.2f}",
            ]
        )
    columns = ["optimizer", "rate", "damping", "train loss", "test loss", "seconds", "ms/step"]
    report.print_table(console, f"After {args.epochs} epochs (loss: nats per image)", columns, rows)
    ends = min(args.learning_rates), max(args.learning_rates)
    edges = {name for name in curves if best[name].get("learning_rate") in ends}
    if edges:
        console.print(f"The best learning rate of {', '.join(sorted(edges))} is on the edge of the grid: widen it.")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--dataset",
        choices=PRESETS,
        default="digits",
        help="digits: 1,797 8x8 images from scikit-learn, no download; "
        "mnist: 70,000 28x28 images, through tensorflow_datasets",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="where tensorflow_datasets has already prepared MNIST; it is only read, and the network not used "
        "(default: its own folder, downloading what is missing)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        help="passes over the training images with the tuned settings (default: 40 for digits, 10 for mnist)",
    )
    parser.add_argument(
        "--tuning-epochs", type=int, help="passes for each point of the grid (default: 40 for digits, 1 for mnist)"
    )
    parser.add_argument("--batch-size", type=int, help="images a step (default: 128 for digits, 500 for mnist)")
    parser.add_argument(
        "--widths",
        type=int,
        nargs="+",
        help="widths of the encoder's layers, the code's last; the decoder mirrors them",
    )
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=LEARNING_RATES, help="the grid for TNT, Adam and SGD"
    )
    parser.add_argument("--dampings", type=float, nargs="+", default=DAMPINGS, help="the grid for TNT's damping")
    parser.add_argument(
        "--trust-radius",
        type=float,
        default=0.1,
        help="bounds TNT's steps: each changes the predictions by a KL divergence of at most about half its square, "
        "in nats per image",
    )
    parser.add_argument("--statistics-period", type=int, default=4, help="T1: steps between statistics updates of TNT")
    parser.add_argument("--inverse-period", type=int, default=20, help="T2: steps between inverse updates of TNT")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the initial parameters, the batches and the sampled labels"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the picture and the JSON file")
    args = parser.parse_args()
    if args.data_dir and args.dataset != "mnist":
        parser.error("--data-dir goes with --dataset mnist: the digits come with scikit-learn.")
    for name, value in dataclasses.asdict(PRESETS[args.dataset]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    main()
