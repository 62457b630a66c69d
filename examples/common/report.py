"""Progress bars, tables, pictures and JSON files of the examples."""

import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from common.training import Curve

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {
    "Adaptive TNT": "black",
    "TNT": "tab:red",
    "TNT, bounded": "tab:purple",
    "TNT-EF": "tab:pink",
    "TNT-MLE": "tab:gray",
    "KFAC": "tab:orange",
    "Shampoo": "tab:brown",
    "Adam": "tab:blue",
    "AdamW": "tab:blue",
    "Muon": "tab:olive",
    "SGD-m": "tab:green",
}


def progress_bar(console: Console) -> Progress:
    """A bar whose tasks have a field `status`, for the loss and the steps per second."""
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=console,
    )


class Ticker:
    """Called after every step: moves a progress bar, and shows the loss or another number, and the steps per second."""

    def __init__(self, progress: Progress, description: str, steps: int, shows: str = "loss"):
        self.shows = shows
        self.progress, self.task = progress, progress.add_task(description, total=steps, status="compiling")
        self.done, self.start, self.shown = 0, 0.0, 0.0

    def __call__(self, value: float) -> None:
        now = time.perf_counter()
        self.start = self.start or now
        self.done += 1
        if now - self.shown > 0.1:  # Drawing takes time too.
            self.shown = now
            rate = self.done / max(now - self.start, 1e-9)
            self.skip_to(self.done, f"{self.shows} {value:8.3f}  {rate:6.1f} steps/s")

    def trials(self, steps: int) -> Callable[[Sequence[Mapping[str, float]]], None]:
        """For `Trainer.search`, whose every trial is so many steps, or fewer where it diverged."""
        return lambda trials: self.skip_to(len(trials) * steps, f"best loss {min(t['loss'] for t in trials):.3f}")

    def skip_to(self, steps: int, status: str) -> None:
        self.done = steps
        self.progress.update(self.task, completed=steps, status=status)


def print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column is text, and the others numbers."""
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def plot_curves(
    path: Path,
    title: str,
    curves: Mapping[str, Sequence[Curve]],
    *,
    log: bool = False,
    per: str = "image",
    epoch_steps: int | None = None,
) -> None:
    """The training loss (solid, with a band of one standard deviation) and the test loss (dotted), both as means over
    the seeds that did not diverge, against epochs (or steps, if there are `epoch_steps` of them in one) and against
    seconds; `per` says what the loss is the mean over."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    shown = []
    for name, of_seeds in curves.items():
        of_seeds = [curve for curve in of_seeds if np.isfinite(curve.final)] or of_seeds
        train, test, seconds = (
            # A budget in seconds ends some trainings before others.
            np.array(list(zip(*(getattr(curve, key) for curve in of_seeds), strict=False)))
            for key in ("train_loss", "test_loss", "seconds")
        )
        mean, deviation = train.mean(axis=1), train.std(axis=1)
        # The first loss, of the untrained model, would squeeze all the others together.
        shown.append(np.concatenate([train[1:].ravel(), test[1:].ravel()]))
        for axis, x in ((left, (epoch_steps or 1) * np.arange(len(train))), (right, seconds.mean(axis=1))):
            axis.plot(x, mean, color=COLORS.get(name), label=name)
            axis.plot(x, test.mean(axis=1), color=COLORS.get(name), linestyle=":", linewidth=1)
            axis.fill_between(x, mean - deviation, mean + deviation, color=COLORS.get(name), alpha=0.2, linewidth=0)
    losses = np.concatenate(shown)
    losses = losses[np.isfinite(losses)]
    if losses.size:
        left.set_ylim(0.97 * losses.min(), 1.03 * np.quantile(losses, 0.99))
    left.set(
        xlabel="steps" if epoch_steps else "epochs", ylabel=f"loss per {per}, nats", yscale="log" if log else "linear"
    )
    right.set(xlabel="seconds of training steps")
    right.legend(title="solid: training, dotted: test", loc="upper right")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content`; numbers that are not finite become null, because JSON has none."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value

    path.write_text(json.dumps(finite(content), indent=1) + "\n")


def plot_bench(path: Path, result: Mapping[str, Any]) -> None:
    """Bars of each optimizer's step for every model, and the growth with width and depth where it was measured."""
    models, growth = result["models"], result.get("growth", {})
    figure = plt.figure(figsize=(5 * max(len(models), len(growth)), 8 if growth else 4), layout="constrained")
    upper, *lower = figure.subfigures(2 if growth else 1, 1, squeeze=False).ravel()
    for axis, (name, entry) in zip(upper.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        rows = [row for row in entry["race"] if "ratio" in row][::-1]
        colors = ["tab:red" if row["optimizer"].startswith("TNT") else "tab:gray" for row in rows]
        bars = axis.barh([row["optimizer"] for row in rows], [row["ratio"] for row in rows], color=colors)
        axis.bar_label(bars, fmt="%.2f", padding=2)
        axis.set(title=f"{name}, batch {entry['batch']}", xlabel="step / step of SGD-m")
        axis.margins(x=0.2)
    for below in lower:
        for axis, (name, rows) in zip(below.subplots(1, len(growth)), growth.items(), strict=True):
            x = [row[name] for row in rows]
            lines = {"TNT": "tnt_ms", "TNT, refreshing": "tnt_refresh_ms", "Adam": "adam_ms"}
            for (label, key), style in zip(lines.items(), ("-", "--", "-"), strict=True):
                axis.loglog(x, [row[key] for row in rows], style, color=COLORS[label.partition(",")[0]], label=label)
            axis.set(title=f"an update alone, by {name}", xlabel=name, ylabel="ms")
            axis.set_xticks(x, [str(value) for value in x])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_runs(path: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """The loss at every step of runs with a bound on the step (a `trust_radius`) and without."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    labels = {True: "without a bound", False: "with the bound"}
    for run in runs:
        free = run["trust_radius"] is None
        losses = [math.nan if loss is None else loss for loss in run["losses"]]
        axis.plot(losses, color="tab:gray" if free else "tab:red", linewidth=1, label=labels.pop(free, None))
        if run["not_finite_at_step"] is not None:
            place = (run["not_finite_at_step"], 0.95)
            axis.annotate(f" seed {run['seed']} diverges", place, xycoords=("data", "axes fraction"))
    axis.set(xlabel="step", ylabel="loss per image, nats", ylim=(0.9 * axis.dataLim.ymin, 800))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
