"""Trains with several dampings, and prints the diagnostics and the losses of each.

The model is the autoencoder of the digits that `demo.py` trains. Initial parameters, batches and labels are the same
for all dampings.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import data, report
from common.problems import autoencoder_problem
from common.training import Problem, batches
from rich.console import Console

import tnt_optax


@dataclasses.dataclass
class Run:
    """A training; the lists have an entry for each time it was measured.

    Attributes:
      damping: eps.
      epoch: the number of epochs until then.
      train_loss: over all training images, in nats per image.
      test_loss: over all test images.
      share_below_damping: of the eigenvalues of all factors.
      bounded_share: of all steps until then, those that the trust radius shortened.
      cosine: of the direction with the gradient, in the last step; the mean over all parameters.
      mean_eigenvalue: of the factors, the median over all parameters.
      condition: of the damped factors, the median.
    """

    damping: float
    epoch: list[int] = dataclasses.field(default_factory=list)
    train_loss: list[float] = dataclasses.field(default_factory=list)
    test_loss: list[float] = dataclasses.field(default_factory=list)
    share_below_damping: list[float] = dataclasses.field(default_factory=list)
    bounded_share: list[float] = dataclasses.field(default_factory=list)
    cosine: list[float] = dataclasses.field(default_factory=list)
    mean_eigenvalue: list[float] = dataclasses.field(default_factory=list)
    condition: list[float] = dataclasses.field(default_factory=list)


class Training:
    """A training step that is compiled once: the damping is an argument."""

    def __init__(self, problem: Problem, args: argparse.Namespace):
        self.problem, self.seed = problem, args.seed
        value_and_grads = tnt_optax.value_and_sampled_grad(problem.forward, problem.predictive)

        def optimizer(damping: Any) -> optax.GradientTransformationExtraArgs:
            return tnt_optax.tnt(
                args.learning_rate,
                damping=damping,
                trust_radius=args.trust_radius,
                statistics_period=args.statistics_period,
                inverse_period=args.inverse_period,
            )

        @jax.jit
        def step(params: Any, opt_state: Any, batch: tuple[jax.Array, jax.Array], key: jax.Array, damping: Any) -> Any:
            _, grads, sampled_grads = value_and_grads(params, *batch, key)
            updates, opt_state = optimizer(damping).update(grads, opt_state, params, sampled_grads=sampled_grads)
            return optax.apply_updates(params, updates), opt_state, grads, updates

        @jax.jit
        def read(opt_state: Any, grads: Any, updates: Any) -> dict[str, jax.Array]:
            return tnt_optax.diagnostics(opt_state, grads=grads, updates=updates)

        self._init, self._step, self._read = optimizer(1.0).init, step, read
        self._loss = jax.jit(lambda params, x, y: problem.predictive.loss(problem.forward(params, x), y))

    def run(
        self, damping: float, epochs: int, every: int, on_epoch: Callable[[], None]
    ) -> tuple[Run, dict[str, np.ndarray]]:
        """The run, and the diagnostics at its end."""
        run, eps, key = Run(damping), jnp.float32(damping), jax.random.key(self.seed)
        params, values, grads, updates = self.problem.params, {}, None, None
        opt_state = self._init(params)
        for epoch in range(1, epochs + 1):
            for batch in batches(self.problem, epoch, self.seed):
                key, subkey = jax.random.split(key)
                params, opt_state, grads, updates = self._step(params, opt_state, batch, subkey, eps)
            on_epoch()
            if epoch % every and epoch < epochs:
                continue
            values = {name: np.asarray(x) for name, x in self._read(opt_state, grads, updates).items()}
            run.epoch.append(epoch)
            run.train_loss.append(float(self._loss(params, *self.problem.train)))
            run.test_loss.append(float(self._loss(params, *self.problem.test)))
            run.share_below_damping.append(share_of_all(values))
            run.bounded_share.append(float(values["tnt/bounded_share"]))
            run.cosine.append(-np.mean(of_all(values, "cosine")).item())  # The update is negated.
            run.mean_eigenvalue.append(np.median(of_all(values, "mean_eigenvalue")).item())
            run.condition.append(np.median(of_all(values, "damped_condition")).item())
        return run, values


def of_all(values: dict[str, np.ndarray], what: str) -> list[np.ndarray]:
    """One number of each parameter, or of each of its modes."""
    return [value for name, value in values.items() if name.rpartition("/")[2] == what]


def share_of_all(values: dict[str, np.ndarray]) -> float:
    """Of all eigenvalues; a factor has tr U / (mean eigenvalue) of them."""
    lengths = np.array(of_all(values, "trace")) / np.maximum(of_all(values, "mean_eigenvalue"), 1e-30)
    return np.average(of_all(values, "share_below_damping"), weights=lengths).item()


def main() -> None:
    args = parse_args()
    console = Console()
    problem = autoencoder_problem(data.load("digits"), args.widths, args.batch_size, seed=args.seed)
    training, runs = Training(problem, args), []
    args.out.mkdir(parents=True, exist_ok=True)
    with report.progress_bar(console) as progress:
        bar = progress.add_task("training", total=len(args.dampings) * args.epochs, status="compiling")
        for damping in args.dampings:
            run, values = training.run(
                damping, args.epochs, args.every, lambda eps=damping: progress.update(bar, advance=1, status=f"{eps:g}")
            )
            runs.append(run)
            if damping == args.draw:
                figure = tnt_optax.draw_diagnostics(values)
                figure.savefig(args.out / "diagnostics_digits.png", dpi=100)

    rows = [
        [
            f"{run.damping:g}",
            f"{run.mean_eigenvalue[-1]:.2g}",
            f"{run.share_below_damping[-1]:.0%}",
            f"{run.condition[-1]:.0f}",
            f"{run.cosine[-1]:.2f}",
            f"{run.bounded_share[-1]:.0%}",
            f"{run.train_loss[-1]:.2f}",
            f"{run.test_loss[-1]:.2f}",
        ]
        for run in runs
    ]
    columns = ["damping", "mean", "below", "condition", "cosine", "bounded", "train loss", "test loss"]
    report.print_table(console, f"{problem.name} after {args.epochs} epochs", columns, rows)
    report.save_json(
        args.out / "diagnostics_digits.json",
        {
            "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
            "machine": report.machine(),
            "runs": [dataclasses.asdict(run) for run in runs],
        },
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dampings", type=float, nargs="+", default=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0))
    parser.add_argument("--draw", type=float, default=0.1, help="the damping whose factors at the end are drawn")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--trust-radius", type=float, default=0.1)
    parser.add_argument("--statistics-period", type=int, default=4)
    parser.add_argument("--inverse-period", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training images")
    parser.add_argument("--every", type=int, default=10, help="epochs between two measurements")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=(128, 64, 32, 8), help="of the encoder's layers, the code's last"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the parameters, the batches and the sampled labels")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the picture and the JSON file")
    args = parser.parse_args()
    if args.draw not in args.dampings:
        parser.error(f"--draw: expected one of the --dampings, got {args.draw:g}.")
    return args


if __name__ == "__main__":
    main()
