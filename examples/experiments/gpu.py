"""Experiments for a GPU: the cost of a step, CIFAR-10, and a transformer in bfloat16, in pieces that resume.

It needs JAX, Flax, Optax and the file that `python -m experiments pack-cifar10` writes. It needs no TFDS, Matplotlib or
command-line library, and no installation of this package: run, inside `examples/`,
`PYTHONPATH=.. python -m experiments gpu --out DIR --data-dir DIR`.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmarks.step

from experiments import data, runner

CIFAR10 = ("adaptive_tnt", "tnt_published_cifar10", "sgdm_published_cifar10")
LANGUAGE = ("adaptive_tnt", "adamw", "muon")


def run(
    out: Path,
    data_dir: Path | None = None,
    minutes: float = 8.0,
    epochs: int = 40,
    steps: int = 1500,
    tiny: bool = False,
) -> bool:
    """Runs the experiments that are not done yet, and returns whether all are done.

    Args:
      out: folder of the results.
      data_dir: folder of `cifar10.npz`.
      minutes: time limit. After it, no other experiment and no other epoch begins; the same call resumes.
      epochs: number of epochs on CIFAR-10.
      steps: number of steps of the transformer, a multiple of 50.
      tiny: whether the models are so small that a CPU runs everything in minutes, for a test.
    """
    data.cifar10(data_dir)  # Missing data raise an error before the benchmarks run.
    deadline = time.monotonic() + 60 * minutes
    shapes: dict[str, Any] = {"width": 512, "layers": 6, "heads": 8, "length": 256, "batch": 32, "dtype": "bfloat16"}
    images: dict[str, Any] = {"blocks": 5, "examples": 50_000}
    if tiny:
        shapes |= {"width": 16, "layers": 2, "heads": 2, "length": 16, "batch": 4}
        images, epochs, steps = {"blocks": 1, "channels": 2, "examples": 128}, 1, 50
    pieces = [("cifar10", name, epochs, {**images, "data_dir": data_dir}) for name in CIFAR10]
    pieces += [("transformer", name, steps // 50, shapes) for name in LANGUAGE]
    for model in benchmarks.step.MODELS:
        path = out / f"step_{model}.json"
        if not path.exists():
            if time.monotonic() > deadline:
                return False
            options = {"width": shapes["width"], "dtype": shapes["dtype"], "tiny": tiny, "steps": 20 if tiny else 100}
            benchmarks.step.measure([model], path, **options)
    for workload, name, length, options in pieces:
        budget, tuning = runner.Budget(length, falling=True), min(2, length)
        try:
            runner.run(workload, name, out, budget=budget, tuning_epochs=tuning, options=options, deadline=deadline)
        except runner.DeadlineError:
            return False
    return True


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments gpu",
        description="Runs the experiments for a GPU, within a time limit. The same command resumes them.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--data-dir", type=Path, help="folder of cifar10.npz")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="time limit, checked after each epoch (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=40, help="number of epochs on CIFAR-10 (default: %(default)s)")
    parser.add_argument(
        "--steps",
        type=int,
        default=1500,
        help="number of steps of the transformer, a multiple of 50 (default: %(default)s)",
    )
    parser.add_argument("--tiny", action="store_true", help="small models, for tests")
    done = run(**vars(parser.parse_args(arguments)))
    print("All is done." if done else "Not all is done: run the same command again.")
