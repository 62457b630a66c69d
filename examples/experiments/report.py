"""Tables and pictures of the documentation, made from JSON files of results."""

import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from experiments.workloads import WORKLOADS


class UsageError(Exception):
    """An error that the user can correct. Its message says how."""


def machine() -> dict[str, Any]:
    """The hardware and the software that numbers were measured with."""
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.devices()[0].platform,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` atomically: an interrupted program leaves the old file. NaN and infinity become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(plain(content)) + "\n")
    temporary.replace(path)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with text in the first column and numbers in the others."""
    alignment = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, alignment, *rows))


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """workload -> optimizer -> the content of its JSON file, if it has a complete training."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*/*.json")):
        if (content := json.loads(path.read_text()))["runs"]:
            found.setdefault(path.parent.name, {})[path.stem] = content
    return found


def tables(folder: Path) -> dict[str, str]:
    """The summary of each workload, the comparison, and the `tables` in the JSON files of other programs."""
    of_workloads = results(folder)
    found = {name: summary(of_workload) for name, of_workload in of_workloads.items()}
    found |= comparison(of_workloads) if of_workloads else {}
    for path in sorted(folder.glob("*.json")):
        found |= json.loads(path.read_text()).get("tables", {})
    if not found:
        raise UsageError(f"There are no results in {folder}.")
    return found


def show(name: str, table: str) -> None:
    """Prints a table in its full width: 80 columns would cut off numbers."""
    Console(width=150).print(Markdown(f"**{name}**\n\n{table}"))


def diverged(run: Mapping[str, Any]) -> bool:
    """Whether a loss is not finite, or the last one is above the first."""
    first, last = (run["epochs"][i]["train_loss"] for i in (0, -1))
    return "diverged_at" in run or last is None or not last <= first


def median(values: Sequence[float]) -> float:
    return float(np.median(values)) if len(values) else math.inf


def summary(of_workload: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each optimizer, with medians over the seeds, sorted by the last training loss."""
    rows = []
    for name, result in of_workload.items():
        runs = [run for run in result["runs"] if not diverged(run)]
        bad = len(result["runs"]) - len(runs)

        def at(key: str, share: float, runs: Any = runs) -> list[float]:
            return [run["epochs"][round(share * (len(run["epochs"]) - 1))][key] for run in runs]

        metrics = [key for key in result["runs"][0]["epochs"][0] if key not in STANDARD]
        losses = [median(at("train_loss", share)) for share in (0.25, 0.5, 1)]
        ms = [1e3 * run["epochs"][-1]["seconds"] / max(run["epochs"][-1]["step"], 1) for run in runs]
        cells = [
            name.replace("_", " "),
            f"{result['runs'][0]['learning_rate']:g}",
            str(len(result["tuning"])),
            *(f"{loss:.4g}" for loss in losses),
            f"{median(at('test_loss', 1)):.4g}",
            ", ".join(f"{key.replace('_', ' ')} {median(at(key, 1)):.3g}" for key in metrics),
            f"{median(at('seconds', 1)):.1f}",
            f"{median(ms):.2f}",
            f"{bad} of {len(result['runs'])}",
        ]
        rows.append((losses[-1], cells))
    columns = ["optimizer", "rate", "tuning runs", "loss at 1/4", "1/2", "end", "test loss", "metric", "s", "ms/step"]
    return markdown_table([*columns, "diverged"], [cells for _, cells in sorted(rows)])


STANDARD = ("step", "seconds", "train_loss", "test_loss")
OURS, *PEERS = ("adaptive_tnt", "adamw", "muon", "sgdm", "soap", "lbfgs", "adam_quadratic_model")


def decisive(workload: str) -> str:
    """The name of the loss or metric by which the optimizers of a workload are compared."""
    return WORKLOADS[workload].decisive if workload in WORKLOADS else "train_loss"


def final(result: Mapping[str, Any], key: str) -> float:
    """The median over the seeds at the end of the trainings. A training that diverged counts as infinity."""
    return median([math.inf if diverged(run) else run["epochs"][-1][key] for run in result["runs"]])


def comparison(of_workloads: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Three tables, with a row for each workload.

    `comparison` has the medians at the end of the trainings, with the number of tuning runs in brackets. `race` has the
    seconds that `adaptive_tnt` needs to reach and keep the final value of a peer, divided by the seconds of the peer.
    `equal_seconds` has, for the errors of solutions of equations, the final value of a peer divided by that of
    `adaptive_tnt` after the same seconds.
    """
    last, shares, ratios = [], [], []
    for workload, of_workload in of_workloads.items():
        key = decisive(workload)

        def end(name: str, of_workload: Any = of_workload, key: str = key) -> str:
            result = of_workload.get(name)
            return f"{final(result, key):.3g} ({len(result['tuning'])})" if result else ""

        def share(peer: str, of_workload: Any = of_workload, key: str = key) -> str:
            if not (peer in of_workload and OURS in of_workload):
                return ""
            goal = final(of_workload[peer], key)
            seconds = median([seconds_to(goal, key, run) for run in of_workload[OURS]["runs"]])
            seconds /= median([run["epochs"][-1]["seconds"] for run in of_workload[peer]["runs"]])
            return "not reached" if seconds == math.inf else f"{seconds:.2f}"

        def ratio(peer: str, of_workload: Any = of_workload, key: str = key) -> str:
            if not (peer in of_workload and OURS in of_workload):
                return ""
            seconds = median([run["epochs"][-1]["seconds"] for run in of_workload[peer]["runs"]])
            ours = median([value_after(seconds, key, run) for run in of_workload[OURS]["runs"]])
            return f"{final(of_workload[peer], key) / ours:.3g}"

        title = workload.replace("_", " ")
        if key == "l2_error":
            ratios.append([title, *map(ratio, PEERS)])
        last.append([f"{title}, {key.replace('_', ' ')}", *map(end, (OURS, *PEERS))])
        shares.append([title, *map(share, PEERS)])
    peers = [peer.replace("_", " ") for peer in PEERS]
    return {
        "comparison": markdown_table(["workload", OURS.replace("_", " "), *peers], last),
        "race": markdown_table(["workload", *peers], shares),
        "equal_seconds": markdown_table(["workload", *peers], ratios),
    }


def overview(path: Path, of_workloads: Mapping[str, Mapping[str, Any]]) -> None:
    """A picture with a row for each workload: the final values of the optimizers, divided by that of tuned AdamW."""
    import matplotlib.pyplot as plt

    shown = [(name, results) for name, results in of_workloads.items() if {OURS, "adamw"} <= results.keys()]
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.4 * len(shown)), layout="constrained")
    for index, optimizer in enumerate((*PEERS, OURS)):
        rows, values, tuned = [], [], False
        for row, (name, results) in enumerate(shown):
            if optimizer in results:
                rows.append(row)
                values.append(final(results[optimizer], decisive(name)) / final(results["adamw"], decisive(name)))
                tuned |= bool(results[optimizer]["tuning"])
        ours = optimizer == OURS
        style = {"color": "black", "s": 90, "marker": "D"} if ours else {"color": f"C{index}", "s": 45}
        label = optimizer.replace("_", " ") + (", tuned" if tuned else ", not tuned")
        axis.scatter(values, rows, label=label if rows else None, zorder=2 if ours else 3, **style)
    axis.set(xscale="log", xlabel="loss or error at the end, divided by that of tuned AdamW (less is better)")
    titles = [f"{name} ({decisive(name)})".replace("_", " ") for name, _ in shown]
    axis.set_yticks(range(len(shown)), titles)
    axis.invert_yaxis()
    axis.axvline(1, color="grey", linewidth=1)
    axis.grid(axis="y", alpha=0.3)
    if shown:
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def seconds_to(goal: float, key: str, run: Mapping[str, Any]) -> float:
    """The seconds to the first measurement from which on no value is above the goal; infinity if there is none."""
    seconds = math.inf
    for epoch in reversed(run["epochs"]):
        if epoch[key] is None or not epoch[key] <= goal:
            break
        seconds = run["warm_start_seconds"] + epoch["seconds"]
    return seconds


def value_after(seconds: float, key: str, run: Mapping[str, Any]) -> float:
    """The last measurement until then; NaN if it is not finite."""
    values = [epoch[key] for epoch in run["epochs"] if run["warm_start_seconds"] + epoch["seconds"] <= seconds]
    return math.nan if not values or values[-1] is None else values[-1]


def plot(path: Path, title: str, of_workload: Mapping[str, Mapping[str, Any]], log: bool) -> None:
    """Draws the training loss of each seed against steps and seconds. The test loss of the first seed is dotted."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    shown = []
    for index, (name, result) in enumerate(of_workload.items()):
        for run in result["runs"]:
            train, test, step, seconds = (
                [math.nan if epoch[key] is None else epoch[key] for epoch in run["epochs"]]
                for key in ("train_loss", "test_loss", "step", "seconds")
            )
            first = run is result["runs"][0]
            style = {
                "color": "black" if name == "adaptive_tnt" else plt.colormaps["tab20"](2 * index % 20 + index // 10),
                "linewidth": 1,
            }
            for axis, x in ((left, step), (right, [run["warm_start_seconds"] + s for s in seconds])):
                axis.plot(x, train, label=name.replace("_", " ") if first else None, **style)
                if first:
                    axis.plot(x, test, ":", **style)
            shown += train[1:]  # Without the first loss, which is far above the others.
    losses = np.array(shown)[np.isfinite(shown)]
    if losses.size:
        left.set_ylim(0.97 * losses.min(), 1.03 * np.quantile(losses, 0.98))
    left.set(xlabel="steps", ylabel="loss", yscale="log" if log else "linear")
    right.set(xlabel="seconds of steps, warm start included")
    if OURS in of_workload:  # Slower peers do not squeeze the other curves.
        ours = max(run["warm_start_seconds"] + run["epochs"][-1]["seconds"] for run in of_workload[OURS]["runs"])
        if 0 < 1.5 * ours < right.get_xlim()[1]:
            right.set_xlim(-0.05 * ours, 1.5 * ours)
    right.legend(fontsize="small", title="solid: training, dotted: test", title_fontsize="small")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def filled(page: Path, tables: Mapping[str, str]) -> str:
    """The text of a page, with new tables between `<!-- results NAME -->` and `<!-- /results -->`."""

    def table(match: re.Match[str]) -> str:
        if (name := match[1]) not in tables:
            raise UsageError(f"{page}: there are no results of {name!r}. There are: {', '.join(tables)}.")
        return f"<!-- results {name} -->\n\n{tables[name]}\n\n<!-- /results -->"

    pattern = r"<!-- results (\S+) -->.*?<!-- /results -->"
    return re.sub(pattern, table, page.read_text(), flags=re.DOTALL)
