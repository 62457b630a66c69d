"""Energies of variational Monte Carlo with TNT, tuned Adam and dense stochastic reconfiguration.

The problem is that of `variational_monte_carlo.py`: two electrons in a trap, with the energy 3. All methods have the
same network and walkers. TNT has the settings of the program. The learning rates of the others are tuned, by the mean
energy over the last quarter of a training with a seed that the comparison does not use.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import typer
from jax.flatten_util import ravel_pytree
from variational_monte_carlo import log_psi, natural_gradient, step_of, trainer

from experiments import report, runner

EXACT, TUNING_SEED = 3.0, 100
METHODS = {"TNT": (1.0,), "Adam": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1), "dense": (1e-2, 3e-2, 1e-1, 3e-1, 1.0)}


def method(name: str, learning_rate: float) -> tuple[Any, Any]:
    """The functions `init` and `step` of `trainer`."""
    if name == "dense":
        return lambda params: None, dense_step(learning_rate)
    tx = natural_gradient() if name == "TNT" else optax.adam(learning_rate)
    return tx.init, step_of(tx)


def dense_step(learning_rate: float, shift: float = 1e-4) -> Callable[..., Any]:
    """Stochastic reconfiguration: theta <- theta - learning_rate (S + shift I)^-1 g / 2, with the dense matrix S."""

    def step(params: Any, opt_state: Any, walkers: jax.Array, energies: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        del key
        flat, as_tree = ravel_pytree(params)
        jacobian = jax.vmap(jax.grad(lambda flat, r: log_psi(as_tree(flat), r)), (None, 0))(flat, walkers)
        jacobian -= jnp.mean(jacobian, axis=0)
        gradient = 2 * jacobian.T @ energies / len(walkers)
        matrix = jacobian.T @ jacobian / len(walkers) + shift * jnp.eye(len(flat))
        direction = jax.scipy.linalg.solve(matrix, gradient / 2, assume_a="pos")
        return as_tree(flat - learning_rate * direction), opt_state

    return step


def trainings(name: str, learning_rate: float, seeds: Sequence[int], steps: int) -> list[dict[str, Any]]:
    """For each seed the energies, their standard errors, and the seconds without compilation."""
    train, runs = trainer(*method(name, learning_rate)), []
    next(train(0))
    for seed in seeds:
        values, seconds = runner.timed(train(seed), steps)
        energies, errors = np.array(values, float).T.tolist()
        runs.append({"seed": seed, "energies": energies, "errors": errors, "seconds": seconds})
    return runs


def last(run: dict[str, Any], key: str) -> float:
    """The mean over the last quarter of a training; infinity if it is not finite."""
    value = float(np.mean(run[key][-(len(run[key]) // 4) :]))
    return value if np.isfinite(value) else np.inf


def main(
    seeds: Annotated[int, typer.Option(help="number of seeds")] = 5,
    steps: Annotated[int, typer.Option(help="number of steps")] = 400,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("results"),
) -> None:
    """Trains the wave function with all methods, and writes the energies, a table and a picture."""
    results, rows = {}, []
    for name, grid in METHODS.items():
        scores: dict[float, float] = {}

        def energy(rate: float, name: str = name, scores: dict[float, float] = scores) -> float:
            scores[rate] = last(trainings(name, rate, [TUNING_SEED], steps)[0], "energies")
            return scores[rate]

        rate = runner.tune(energy, grid, name) if len(grid) > 1 else grid[0]
        runs = trainings(name, rate, range(seeds), steps)
        results[name] = {"learning_rate": rate, "tuning": scores, "runs": runs}
        above = np.array([last(run, "energies") - EXACT for run in runs])
        # The walkers of successive steps are correlated: the error is that of the mean over the seeds.
        error = above.std(ddof=1) / len(above) ** 0.5
        deviation = np.median([last(run, "errors") for run in runs])
        row = [f"{rate:g}", str(len(scores)), f"{1e3 * above.mean():.2f} ± {1e3 * error:.2f}", f"{1e3 * deviation:.2f}"]
        rows.append([name, *row, f"{np.median([run['seconds'][-1] for run in runs]):.1f}"])
    columns = ["method", "rate", "tuning runs", "10³ (energy − 3)", "10³ error of a batch", "s"]
    table = report.markdown_table(columns, rows)
    content = {"machine": report.machine(), "results": results, "tables": {"variational_monte_carlo": table}}
    report.write_json(out / "variational_monte_carlo.json", content)
    draw(out / "variational_monte_carlo.png", results)
    report.show("variational_monte_carlo", table)


def draw(path: Path, results: dict[str, Any], window: int = 20) -> None:
    """The energies minus the exact one against steps, and the errors of a batch against seconds.

    Both are means over `window` steps and the seeds. The bars are standard errors over the seeds.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for index, (name, result) in enumerate(results.items()):
        style: dict[str, Any] = {"color": "black" if name == "TNT" else f"C{index}", "linewidth": 1}
        style["label"] = f"{name}, {'' if result['tuning'] else 'not '}tuned"
        steps = np.arange(window, len(result["runs"][0]["energies"]) + 1, window)
        seconds = np.median([run["seconds"] for run in result["runs"]], axis=0)
        for axis, key, shift, x in (left, "energies", EXACT, steps), (right, "errors", 0, seconds[steps - 1]):
            values = np.array([run[key][: steps[-1]] for run in result["runs"]])
            means = values.reshape(len(values), -1, window).mean(axis=2) - shift
            axis.errorbar(x, means.mean(axis=0), means.std(axis=0, ddof=1) / len(means) ** 0.5, **style)
    left.set(xlabel="steps", ylabel="energy minus exact energy")
    left.set_yscale("symlog", linthresh=1e-3)
    right.set(xlabel="seconds, without compilation", ylabel="standard error of a batch", yscale="log")
    left.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
