"""Trains without a learning rate: TNT's and Adam's directions with the step of the quadratic model.

Autoencoders of digits and of MNIST, and a physics-informed network for Poisson's equation, all with default arguments.
Writes the numbers, and the table and the picture of the documentation.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from common import data, report
from common.problems import autoencoder_problem, poisson_problem
from common.training import Trainer
from rich.console import Console

import tnt_optax


def falls_in_the_second_half(steps: int) -> optax.Schedule:
    """1, and then linearly to 0."""
    return optax.linear_schedule(1.0, 0.0, steps // 2, transition_begin=steps // 2)


# Functions of the number of steps.
OPTIMIZERS = {
    "adaptive TNT": lambda steps: tnt_optax.adaptive_tnt(),
    "adaptive TNT, factor falls": lambda steps: tnt_optax.adaptive_tnt(falls_in_the_second_half(steps)),
    "Adam's direction": lambda steps: optax.chain(
        optax.scale_by_adam(), tnt_optax.scale_by_quadratic_model(), optax.scale_by_learning_rate(1.0)
    ),
}
# The factor falls where batches are drawn at random; Adam's direction is left out on MNIST.
USED = {
    "digits": list(OPTIMIZERS),
    "mnist": ["adaptive TNT", "adaptive TNT, factor falls"],
    "poisson": ["adaptive TNT", "Adam's direction"],
}
COLORS = dict(zip(OPTIMIZERS, ("black", "tab:red", "tab:blue"), strict=True))
AUTOENCODERS = {
    "digits": {"widths": (128, 64, 32, 8), "batch_size": 128, "epochs": 40},
    "mnist": {"widths": (1000, 500, 250, 30), "batch_size": 1000, "epochs": 10},
}


def train_autoencoder(dataset: str, data_dir: Path | None, optimizer: str, seed: int) -> dict[str, Any]:
    options = dict(AUTOENCODERS[dataset])
    epochs = options.pop("epochs")
    problem = autoencoder_problem(data.load(dataset, data_dir), **options, seed=seed)
    make = functools.partial(OPTIMIZERS[optimizer], epochs * problem.steps_per_epoch)
    curve = Trainer(problem, make).train(epochs, {}, seed=seed)
    steps = [epoch * problem.steps_per_epoch for epoch in range(epochs + 1)]
    return {"steps": steps, **dataclasses.asdict(curve)}


def train_poisson(optimizer: str, seed: int, max_seconds: float) -> dict[str, Any]:
    """Until the time is over, without the compilation."""
    problem, tx = poisson_problem(seed=seed), OPTIMIZERS[optimizer](0)
    value_and_grads = tnt_optax.value_and_sampled_grad(problem.forward, problem.predictive)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads, sampled_grads = value_and_grads(params, problem.inputs, problem.targets, key)
        updates, opt_state = tx.update(grads, opt_state, params, sampled_grads=sampled_grads)
        return optax.apply_updates(params, updates), opt_state, loss

    params: Any = problem.params
    opt_state, key = tx.init(params), jax.random.key(seed)
    compiled = step.lower(params, opt_state, key).compile()
    run: dict[str, Any] = {"steps": [], "train_loss": [], "seconds": []}
    count, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < max_seconds:
        params, opt_state, loss = compiled(params, opt_state, jax.random.fold_in(key, count))
        count += 1
        for name, value in (("steps", count), ("train_loss", float(loss)), ("seconds", seconds)):
            run[name].append(value)
    places = sorted({*range(0, count, max(count // 200, 1)), count - 1})  # Enough for a picture.
    return {name: [values[i] for i in places] for name, values in run.items()} | {"error": float(problem.error(params))}


def table(result: Mapping[str, Any]) -> str:
    """The rows of the documentation, from the numbers that were written."""
    lines = [
        "| problem | optimizer | steps | training loss of each seed | seconds |",
        "| --- | --- | ---: | --- | ---: |",
    ]
    for problem, optimizers in result["problems"].items():
        for share in (0.2, 1.0):  # After a fifth of the training, and at its end.
            for optimizer, runs in optimizers.items():
                places = [np.searchsorted(run["steps"], share * run["steps"][-1]) for run in runs]
                steps, seconds, losses = (
                    [run[key][place] for run, place in zip(runs, places, strict=True)]
                    for key in ("steps", "seconds", "train_loss")
                )
                shown = ", ".join(f"{loss:.4g}" for loss in losses)
                cells = problem, optimizer, f"{np.mean(steps):,.0f}", shown, f"{np.mean(seconds):.1f}"
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path: Path, result: Mapping[str, Any]) -> None:
    problems = result["problems"]
    figure, axes = report.plt.subplots(1, len(problems), figsize=(4 * len(problems), 3.5), layout="constrained")
    for axis, (problem, optimizers) in zip(np.atleast_1d(axes), problems.items(), strict=True):
        for optimizer, runs in optimizers.items():
            for index, run in enumerate(runs):
                label, color = None if index else optimizer, COLORS[optimizer]
                axis.plot(run["steps"][1:], run["train_loss"][1:], color=color, linewidth=1, label=label)
        axis.set(title=problem, xlabel="steps", ylabel="training loss", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--problems", nargs="+", choices=("digits", "mnist", "poisson"), default=("digits", "poisson"))
    parser.add_argument("--seeds", type=int, default=2, help="how many: of parameters, batches and sampled labels")
    parser.add_argument("--seconds", type=float, default=25.0, help="for Poisson's equation")
    parser.add_argument("--data-dir", type=Path, help="where tensorflow_datasets has prepared MNIST (default: its own)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON file and the picture")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": report.machine(), "problems": {}}
    for problem in args.problems:
        runs = result["problems"][problem] = {}
        for name in USED[problem]:
            runs[name] = [
                train_poisson(name, seed, args.seconds)
                if problem == "poisson"
                else train_autoencoder(problem, args.data_dir, name, seed)
                for seed in range(args.seeds)
            ]
    args.out.mkdir(parents=True, exist_ok=True)
    report.save_json(args.out / "quadratic_model.json", result)
    plot(args.out / "quadratic_model.png", result)
    Console(soft_wrap=True).print(table(result))


if __name__ == "__main__":
    main()
