"""What a GPU is for: the cost of a step, CIFAR-10, and a transformer in bfloat16, in pieces of under ten minutes.

Needs JAX, Flax, Optax and `cifar10.npz` (see `pack_cifar10`), and neither TFDS, Matplotlib nor an installation:
`PYTHONPATH=.. python -m experiments gpu --out DIR --data-dir FOLDER_OF_CIFAR10_NPZ`, inside `examples/`. Started
again, it resumes.
"""

import time
from pathlib import Path
from typing import Any

from experiments import runner

CIFAR10 = ("adaptive_tnt", "tnt_published_cifar10", "sgdm_published_cifar10")
LANGUAGE = ("adaptive_tnt", "adamw", "muon")


def run(
    out: Path,
    data_dir: Path | None = None,
    minutes: float = 9.0,
    epochs: int = 40,
    steps: int = 1500,
    tiny: bool = False,
) -> None:
    """Runs the pieces that are not done, for so many minutes; the same command resumes.

    Args:
      out: folder of the results.
      data_dir: folder of `cifar10.npz`.
      minutes: no piece and no epoch begins after so many.
      epochs: of CIFAR-10.
      steps: of the transformer.
      tiny: models so small that a CPU runs everything in a minute, for a test.
    """
    from benchmarks import step

    deadline = time.monotonic() + 60 * minutes
    shapes: dict[str, Any] = {"width": 512, "layers": 6, "heads": 8, "length": 256, "batch": 32, "dtype": "bfloat16"}
    images: dict[str, Any] = {"blocks": 5, "examples": 50_000}
    if tiny:
        shapes |= {"width": 16, "layers": 2, "heads": 2, "length": 16, "batch": 4}
        images = {"blocks": 1, "channels": 2, "examples": 256}
        epochs, steps = 1, 50
    images["data_dir"] = data_dir
    for model in step.MODELS:
        if not (path := out / f"step_{model}.json").exists() and time.monotonic() < deadline:
            step.measure([model], path, width=shapes["width"], dtype=shapes["dtype"], tiny=tiny)
    try:
        for name in CIFAR10:
            budget = runner.Budget(epochs, falling=True)
            runner.run("cifar10", name, out, budget=budget, options=images, deadline=deadline)
        for name in LANGUAGE:
            budget = runner.Budget(steps // 50, falling=True)
            runner.run(
                "transformer",
                name,
                out,
                budget=budget,
                tuning_epochs=min(2, steps // 50),
                options=shapes,
                deadline=deadline,
            )
    except runner.DeadlineError:
        print("Not done yet: run the same command again.")
        return
    print(f"All done: {out}.")
