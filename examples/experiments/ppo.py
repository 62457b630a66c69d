"""Returns of PPO with TNT and with tuned Adam, against environment steps and seconds, with `policy_gradient.py`.

TNT has the settings of the program. Adam has the gradient clipping and the epsilon that are usual for PPO. Its learning
rate and its number of steps are the best of a grid, by the mean return over the whole training, which is high if the
agents learn fast, of seeds that the comparison does not use.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import typer
from policy_gradient import AGENTS, ENVIRONMENTS, Environment, natural_gradient, trainer

from experiments import report, runner

GOALS = {"cartpole": 475.0, "pendulum": -200.0}  # Gymnasium's own threshold; none is usual for the pendulum.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
PASSES = ((4, 4), (10, 32))  # Epochs and minibatches that are usual for a few and for many updates.
TUNING_SEEDS = (100, 101)


def adam(learning_rate: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(0.5), optax.adam(learning_rate, eps=1e-5))


def trainings(
    environment: Environment, tx: Any, seeds: Sequence[int], iterations: int, **settings: int
) -> list[dict[str, Any]]:
    """For each seed, the return after each iteration, and its seconds without compilation."""
    train, runs = trainer(environment, tx, **settings), []
    next(train(0))
    for seed in seeds:
        returns, seconds = runner.timed(train(seed), iterations)
        runs.append({"seed": seed, "returns": returns, "seconds": seconds})
    return runs


def tuned(environment: Environment, iterations: int, name: str) -> list[dict[str, Any]]:
    """Adam's settings that were tried, each with its mean return over the whole training."""
    scores: list[dict[str, Any]] = []

    def loss_of(rate: float) -> float:
        for epochs, minibatches in PASSES:
            settings = {"epochs": epochs, "minibatches": minibatches}
            runs = trainings(environment, adam(rate), TUNING_SEEDS, iterations, **settings)
            score = float(np.nanmean([run["returns"] for run in runs]))  # NaN before the first episode ends.
            scores.append({"learning_rate": rate, **settings, "score": score})
        return -max(score["score"] for score in scores[-len(PASSES) :])

    runner.tune(loss_of, RATES, f"{name}, Adam")
    return scores


def row(name: str, method: str, result: dict[str, Any], steps: int) -> list[str]:
    """A row of the table: medians over the seeds, and the mean return over the last quarter with its standard error."""
    goal, runs = GOALS[name], result["runs"]
    reached = [next((i for i, x in enumerate(run["returns"]) if x >= goal), None) for run in runs]
    numbers = [np.inf if i is None else steps * (i + 1) for i in reached]
    seconds = [np.inf if i is None else run["seconds"][i] for i, run in zip(reached, runs, strict=True)]
    last = np.array([np.mean(run["returns"][-(len(run["returns"]) // 4) :]) for run in runs])

    def shown(values: list[float], form: str) -> str:
        middle = float(np.median(values))
        return "not reached" if middle == np.inf else format(middle, form)

    return [
        f"{name}, {method}",
        str(len(result.get("tuning", ()))),
        f"{last.mean():.0f} ± {last.std(ddof=1) / len(last) ** 0.5:.0f}",
        shown(numbers, ",.0f"),
        shown(seconds, ".1f"),
        f"{np.median([run['seconds'][-1] for run in runs]):.1f}",
    ]


def draw(path: Path, environments: dict[str, Any], steps: int) -> None:
    """Mean returns, with bands of 95% confidence for the mean."""
    figure, axes = plt.subplots(len(environments), 2, figsize=(11, 3.4 * len(environments)), layout="constrained")
    for (name, methods), (left, right) in zip(environments.items(), np.atleast_2d(axes), strict=True):
        for method, result in methods.items():
            returns, seconds = (np.array([run[key] for run in result["runs"]]) for key in ("returns", "seconds"))
            mean, error = returns.mean(axis=0), 1.96 * returns.std(axis=0, ddof=1) / len(returns) ** 0.5
            style = {"color": "black" if method == "TNT" else "C0"}
            for axis, x in (
                (left, steps / 1000 * np.arange(1, returns.shape[1] + 1)),
                (right, np.median(seconds, axis=0)),
            ):
                axis.plot(x, mean, label=f"{method}, {'' if 'tuning' in result else 'not '}tuned", **style)
                axis.fill_between(x, mean - error, mean + error, alpha=0.2, linewidth=0, **style)
                axis.axhline(GOALS[name], color="grey", linewidth=0.8, linestyle=":")
                axis.grid(alpha=0.3)
        left.set(ylabel=f"{name}: return of an episode", xlabel="thousands of environment steps")
        right.set(xlabel="seconds, without compilation")
        left.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    seeds: Annotated[int, typer.Option(help="number of seeds")] = 10,
    iterations: Annotated[int, typer.Option(help="number of iterations of 200 steps of all agents")] = 60,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("results"),
) -> None:
    """Trains the agents of `policy_gradient.py` with TNT and with Adam, and writes returns, a table and a picture."""
    steps, environments = 200 * AGENTS, {}  # Of an iteration.
    for name, environment in ENVIRONMENTS.items():
        tuning = tuned(environment, iterations, name)
        best = dict(max(tuning, key=lambda settings: settings["score"]))
        best.pop("score")
        tnt = {"runs": trainings(environment, natural_gradient(), range(seeds), iterations)}
        peer = trainings(environment, adam(best.pop("learning_rate")), range(seeds), iterations, **best)
        environments[name] = {"TNT": tnt, "Adam": {"tuning": tuning, "runs": peer}}
        jax.clear_caches()
    columns = ["environment, optimizer", "tuning runs", "return at the end", "steps to the goal", "s to the goal", "s"]
    rows = [row(name, method, of, steps) for name, ms in environments.items() for method, of in ms.items()]
    table = report.markdown_table(columns, rows)
    content = {"machine": report.machine(), "environments": environments, "tables": {"policy_gradient": table}}
    report.write_json(out / "policy_gradient.json", content)
    draw(out / "policy_gradient.png", environments, steps)
    report.show("policy_gradient", table)


if __name__ == "__main__":
    typer.run(main)
