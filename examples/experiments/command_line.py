"""Trains workloads with optimizers, and makes tables and pictures of the results. (For a GPU: the command `gpu`.)"""

import inspect
import itertools
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import data, report, robustness, runner
from experiments.optimizers import OPTIMIZERS
from experiments.workloads import WORKLOADS

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
app.command("robustness")(robustness.measure)


@app.command("list")
def list_all() -> None:
    """Lists the workloads with their options, and the optimizers with their learning rates."""
    rows = []
    for name, workload in WORKLOADS.items():
        options = list(inspect.signature(workload.make).parameters.values())[1:]
        rows.append([name, workload.about, " ".join(f"{p.name}={p.default}" for p in options)])
    report.show("workloads", report.markdown_table(["workload", "about", "options"], rows))
    grids = [[name, ", ".join(f"{x:g}" for x in o.grid) or "nothing to tune"] for name, o in OPTIMIZERS.items()]
    report.show("optimizers", report.markdown_table(["optimizer", "learning rates"], grids))


@app.command()
def run(
    workload: Annotated[str, typer.Argument(help="name of a workload (see `list`)")],
    optimizers: Annotated[
        list[str],
        typer.Option("--optimizers", "-o", help="names of optimizers (see `list`), separated by commas; repeatable"),
    ],
    seeds: Annotated[int, typer.Option(help="number of seeds; the seeds are 0, 1, ...")] = 1,
    epochs: Annotated[
        int | None, typer.Option(help="number of epochs of each training (default: the workload's)")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="number of steps, in place of --epochs, for workloads whose epochs are numbers of steps"),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="time limit of each training in seconds of steps, checked after each epoch")
    ] = math.inf,
    tuning_epochs: Annotated[
        int | None, typer.Option(help="number of epochs of each tuning run (default: the workload's)")
    ] = None,
    falling: Annotated[
        bool | None, typer.Option(help="falling or constant learning rates (default: the workload's)")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="learning rate, in place of tuning")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="folder of the data, for workloads that read files (default: a download)")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="option of the workload, as name=value; repeatable")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("results"),
) -> None:
    """Tunes learning rates, and trains a workload with optimizers. The same command resumes an interrupted run."""
    names = [name for text in optimizers for name in text.split(",")]
    runner.known([workload], WORKLOADS, "workload")
    runner.known(names, OPTIMIZERS, "optimizer")
    what = WORKLOADS[workload]
    options = parsed(workload, option or [])
    if what.needs_data:
        options["data_dir"] = data_dir
    elif data_dir:
        raise runner.UsageError(f"--data-dir: {workload} needs no data.")
    if steps is not None:
        if not what.epoch_steps or steps % what.epoch_steps:
            expected = f"a multiple of {what.epoch_steps}" if what.epoch_steps else "--epochs in its place"
            raise runner.UsageError(f"--steps: expected {expected} for {workload}, got {steps}.")
        epochs = steps // what.epoch_steps
    budget = runner.Budget(
        what.epochs if epochs is None else epochs, seconds, what.falling if falling is None else falling
    )
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}")]
    with runner.exclusive(out), Progress(*columns, TimeRemainingColumn()) as progress:

        def on_training(name: str, steps: int) -> Any:
            task = progress.add_task(name, total=steps, status="")

            def on_step(step: int, loss: float) -> None:
                speed = progress.tasks[task].speed or math.nan
                progress.update(task, completed=step, status=f"loss {loss:.4g}, {speed:.1f} steps/s")

            return on_step

        for name in names:
            runner.run(
                workload,
                name,
                out,
                budget=budget,
                tuning_epochs=tuning_epochs,
                seeds=range(seeds),
                learning_rate=learning_rate,
                options=options,
                on_training=on_training,
            )
    report.show(workload, report.summary(report.results(out)[workload]))


def parsed(workload: str, texts: list[str]) -> dict[str, Any]:
    """The options of a workload, with the types of their defaults."""
    parameters = list(inspect.signature(WORKLOADS[workload].make).parameters.values())[1:]
    defaults = {p.name: p.default for p in parameters if p.name != "data_dir"}
    options: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in defaults:
            raise runner.UsageError(
                f"--set {text}: {workload} has no option {name!r}. It has: {', '.join(defaults) or 'none'}."
            )
        try:
            options[name] = type(defaults[name])(value)
        except ValueError:
            raise runner.UsageError(f"--set {text}: expected a value like {defaults[name]}.") from None
    return options


@app.command("report")
def make_report(
    folder: Annotated[Path, typer.Argument(help="folder of the results")] = Path("results"),
    pages: Annotated[
        list[Path] | None, typer.Option("--page", help="page, or folder of pages, with tables to replace; repeatable")
    ] = None,
) -> None:
    """Draws pictures of the results into their folder, and prints their tables or replaces those of pages."""
    tables, of_workloads = report.tables(folder), report.results(folder)
    for name, of_workload in of_workloads.items():
        workload = WORKLOADS.get(name)
        log = workload is None or workload.log
        report.plot(folder / f"{name}.png", f"{name}: {workload.about}" if workload else name, of_workload, log)
    report.overview(folder / "overview.png", of_workloads)
    print(f"The pictures are {folder}/*.png.")
    for name, table in tables.items() if not pages else ():
        report.show(name, table)
    for page in itertools.chain.from_iterable(x.rglob("*.md") if x.is_dir() else [x] for x in pages or []):
        page.write_text(report.filled(page, tables))


@app.command()
def pack_cifar10(
    path: Annotated[Path, typer.Argument(help="file to write")],
    data_dir: Annotated[Path | None, typer.Option(help="folder of the TFDS datasets (default: a download)")] = None,
) -> None:
    """Writes CIFAR-10 to one file of 20 MB for machines without TFDS: name it `cifar10.npz`, in their `--data-dir`."""
    data.pack_cifar10(data_dir, path)
