"""How often TNT diverges with the paper's settings for its MNIST autoencoder, with and without a bound on its steps.

The paper: learning rate 1e-4, damping 0.1, momentum 0.9, batches of 1000, statistics at every step, inverses every 20
steps, a warm start of one pass over the data. The bound: trust_radius 0.0316, half a nat of KL divergence per image
and step. A training has diverged when a loss is not finite, or when it ends above the loss of the untrained model.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import optax
from common import data, report
from common.problems import autoencoder_problem
from common.training import Trainer
from rich.console import Console

import tnt_optax

WIDTHS = (1000, 500, 250, 30)


def main() -> None:
    args = parse_args()
    console = Console()
    images = data.load(args.dataset, args.data_dir)
    runs: list[dict[str, Any]] = []
    with report.progress_bar(console) as progress:
        for seed in range(args.seeds):
            problem = autoencoder_problem(images, args.widths, args.batch_size, seed=seed)
            for radius in (None, args.trust_radius):
                trainer = Trainer(problem, optimizer(args, radius), scale="mean")
                description = f"{seed} {'free' if radius is None else 'bounded'}"
                ticker = report.Ticker(progress, description, args.epochs * problem.steps_per_epoch)
                losses: list[float] = []

                def on_step(loss: float, losses: list[float] = losses, ticker: report.Ticker = ticker) -> None:
                    losses.append(loss)
                    ticker(loss)

                curve = trainer.train(
                    args.epochs,
                    {"learning_rate": args.learning_rate},
                    seed=seed,
                    warm_start=problem.steps_per_epoch,
                    on_step=on_step,
                )
                bad = [not math.isfinite(loss) for loss in losses]
                worse = not curve.train_loss[-1] <= curve.train_loss[0]
                runs.append(
                    {
                        "seed": seed,
                        "trust_radius": radius,
                        "diverged": any(bad) or worse,
                        "not_finite_at_step": bad.index(True) if any(bad) else None,
                        "largest_loss": max(loss for loss in losses if math.isfinite(loss)),
                        "train_loss": curve.train_loss,
                        "test_loss": curve.test_loss,
                        "losses": losses,
                    }
                )
                args.out.mkdir(parents=True, exist_ok=True)
                report.save_json(
                    args.out / "stability.json",
                    {
                        "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
                        "machine": report.machine(),
                        "runs": runs,
                    },
                )

    report.plot_runs(args.out / "stability.png", runs)
    columns = ["seed", "bound", "diverged", "largest loss", "after 1 epoch", f"after {args.epochs}"]
    rows = [
        [
            str(run["seed"]),
            "" if run["trust_radius"] is None else f"{run['trust_radius']:g}",
            "yes" if run["diverged"] else "",
            f"{run['largest_loss']:.4g}",
            f"{run['train_loss'][1]:.1f}",
            f"{run['train_loss'][-1]:.1f}",
        ]
        for run in runs
    ]
    report.print_table(console, "Losses, in nats per image", columns, rows)
    for radius in (None, args.trust_radius):
        diverged = sum(run["diverged"] for run in runs if run["trust_radius"] == radius)
        console.print(f"{'Without' if radius is None else 'With'} the bound {diverged} of {args.seeds} diverged.")


def optimizer(args: argparse.Namespace, trust_radius: float | None) -> Any:
    def tnt(learning_rate: Any) -> optax.GradientTransformation:
        return tnt_optax.tnt(
            learning_rate,
            damping=args.damping,
            trust_radius=trust_radius,
            statistics_period=1,
            inverse_period=20,
        )

    return tnt


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dataset", choices=("mnist", "digits"), default="mnist", help="digits: for a quick try")
    parser.add_argument("--data-dir", type=Path, help="where tensorflow_datasets has already prepared MNIST")
    parser.add_argument("--seeds", type=int, default=10, help="how many, counted from 0")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=1000, help="images a step")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="of the encoder's layers")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of both")
    parser.add_argument("--damping", type=float, default=0.1, help="of both")
    parser.add_argument("--trust-radius", type=float, default=0.0316, help="the bound")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON file and the picture")
    return parser.parse_args()


if __name__ == "__main__":
    main()
