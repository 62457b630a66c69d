"""How often `adaptive_tnt` diverges: with its defaults, and with dampings that are ten times larger or smaller.

A training *diverges* if a loss is not finite, if a mean of five successive losses is above the first loss, or if the
last mean is above twice its median over the seeds. If all steps have the same data, single losses replace the means.
"""

import itertools
import json
import math
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich.progress import track

import tnt_optax
from experiments import report, runner
from experiments.optimizers import Optimizer
from experiments.workloads import WORKLOADS, Problem

STEPS, MEAN = 150, 5
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "ε = 0.1": {"damping": 0.1},
    "ε = 0.001": {"damping": 0.001},
    "λ = 1": {"initial_model_damping": 1.0},
    "λ = 0.01": {"initial_model_damping": 0.01},
}
Numbers = dict[str, float]


def train(workload: str, seeds: int, settings: dict[str, Any], options: dict[str, Any], about: str) -> list[Numbers]:
    """The first, the highest and the last loss of each seed (see above); NaN if a loss is not finite."""

    def make(factor: Any, problem: Problem) -> Any:
        return tnt_optax.adaptive_tnt(factor, views=problem.views, **settings)

    trainer, trainings = None, []
    for seed in track(range(seeds), about):
        problem = WORKLOADS[workload].make(seed, **options)
        # Only the losses of the steps are used: the runner evaluates one test example.
        problem = problem._replace(test=jax.tree.map(lambda x: x[:1], problem.test))
        trainer = trainer or runner.Trainer(problem, Optimizer(make, adaptive=True), False, MEAN)
        run = trainer.train(problem, 1.0, seed, epochs=STEPS // MEAN, measured=1)
        losses = np.array(run["losses"])
        means = losses.reshape(-1, MEAN).mean(axis=1) if problem.batch_size else losses
        fails = "diverged_at" in run
        trainings.append(
            {
                "initial": run["losses"][0],
                "highest": math.nan if fails else float(means.max()),
                "last": math.nan if fails else float(means[-1]),
            }
        )
    return trainings


def diverged(trainings: list[Numbers]) -> int:
    numbers = np.array([list(training.values()) for training in trainings], float)
    initial, highest, last = np.nan_to_num(numbers, nan=math.inf).T  # A null is NaN.
    return int(np.sum(~((highest <= initial) & (last <= 2 * np.median(last)))))


def measure(
    workloads: Annotated[list[str], typer.Argument(help="names of workloads (see `list`)")],
    seeds: Annotated[int, typer.Option(help="number of seeds with the defaults")] = 20,
    fewer: Annotated[int, typer.Option(help="number of seeds with each other damping")] = 5,
    data_dir: Annotated[
        Path | None, typer.Option(help="folder of the data, for workloads that read files (default: a download)")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("results"),
) -> None:
    """Counts the trainings of `adaptive_tnt` that diverge, with 150 steps each, by workload and damping."""
    runner.known(workloads, WORKLOADS, "workload")
    with runner.exclusive(out):
        content = fill(out / "robustness.json", workloads, seeds, fewer, data_dir)
    report.show("robustness", content["tables"]["robustness"])


def fill(path: Path, workloads: list[str], seeds: int, fewer: int, data_dir: Path | None) -> dict[str, Any]:
    """Runs the trainings that the file does not have yet, writes it after each setting, and returns its content."""
    content = json.loads(path.read_text()) if path.exists() else {"machine": report.machine(), "trainings": {}}
    trainings = content["trainings"]
    for name, (setting, values) in itertools.product(workloads, SETTINGS.items()):
        if setting in (done := trainings.setdefault(name, {})):
            continue
        options = {"data_dir": data_dir} if WORKLOADS[name].needs_data else {}
        done[setting] = train(name, fewer if values else seeds, values, options, f"{name}, {setting}")
        rows = [
            [workload, *(f"{diverged(done[s])} of {len(done[s])}" if s in done else "" for s in SETTINGS)]
            for workload, done in trainings.items()
        ]
        content["tables"] = {"robustness": report.markdown_table(["workload", *SETTINGS], rows)}
        report.write_json(path, content)
    return content
