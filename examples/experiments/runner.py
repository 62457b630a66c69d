"""Trains workloads with optimizers: tunes learning rates, measures seconds, resumes, and writes all numbers as JSON.

A folder of results has the files `WORKLOAD/OPTIMIZER.json`. The checkpoint of a training in progress is in the same
folder as its file. It is written after each epoch.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization

from experiments.optimizers import OPTIMIZERS, Optimizer
from experiments.report import UsageError, machine, write_json
from experiments.workloads import WORKLOADS, Problem, loss_and_metrics

EVALUATED = 1000  # The number of examples that are evaluated together.
WIDENINGS = 8


class DeadlineError(Exception):
    """The time limit is reached. The same command resumes the training."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """The length of a training, and the schedule of its learning rate.

    Attributes:
      epochs: number of epochs. The losses are measured after each. An epoch is a pass over the data, or has the
        workload's `epoch_steps`.
      seconds: time limit, in seconds of steps. After it, no other epoch begins.
      falling: whether the learning rate rises in the first tenth of all steps and falls to 0 along a cosine. (For an
        adaptive optimizer it is a factor, which falls linearly in the last half.) Otherwise it is constant.
    """

    epochs: int
    seconds: float = math.inf
    falling: bool = False


def schedule(highest: Any, steps: Any, falling: bool, adaptive: bool) -> optax.Schedule:
    """See `Budget`. `highest` and `steps` may be traced, so that tuning and training share one compiled step."""

    def factor(count: Any) -> Any:
        if not falling:
            return jnp.ones(())
        if adaptive:
            return jnp.clip(2 - 2 * count / steps, 0, 1)
        done = (count + 1) / steps
        return jnp.minimum(10 * done, (1 + jnp.cos(jnp.pi * jnp.clip((done - 0.1) / 0.9, 0, 1))) / 2)

    return lambda count: highest * factor(count)


def known(names: Sequence[str], there_are: Any, kind: str) -> None:
    if unknown := [name for name in names if name not in there_are]:
        raise UsageError(f"Unknown {kind} {', '.join(unknown)}. There are: {', '.join(there_are)}.")


class Trainer:
    """Trains one workload with one optimizer, any number of times. The step is compiled once."""

    def __init__(self, problem: Problem, optimizer: Optimizer, falling: bool, epoch_steps: int | None):
        examples, size = len(jax.tree.leaves(problem.train)[0]), problem.batch_size
        self.optimizer, self.steps = optimizer, epoch_steps or (examples // size if size else 1)
        if (size and self.steps * size > examples) or not self.steps:
            raise UsageError(f"An epoch of {self.steps} batches of {size} is not in {examples} training examples.")

        # The hyper-parameters are in the optimizer's state, so that one compiled step works for all their values.
        def make(highest: Any, steps: Any) -> optax.GradientTransformation:
            return optimizer.make(schedule(highest, steps, falling, optimizer.adaptive), problem)

        self.tx = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)

        def grads_of(params: Any, state: Any, data: Any, key: jax.Array, indices: jax.Array | None) -> Any:
            augment, labels = jax.random.split(key)
            inputs, targets = data if indices is None else jax.tree.map(lambda x: x[indices], data)
            value_and_grads = optimizer.value_and_grads(problem, targets)
            inputs = problem.augment(augment, inputs) if problem.augment else inputs
            return value_and_grads(params, (inputs, state), targets, labels)

        @functools.partial(jax.jit, static_argnames="tx", donate_argnames="carry")
        def step(carry: Any, data: Any, key: jax.Array, count: Any, indices: Any, *, tx: Any) -> Any:
            params, state, opt_state = carry
            key = jax.random.fold_in(key, count)
            (loss, new_state), grads, statistics = grads_of(params, state, data, key, indices)
            predictive, outputs_fn = problem.predictive(data[1]), lambda p: problem.forward(p, data[0], state)[0]
            extra = {
                "sampled_grads": statistics,  # Computed only if the optimizer uses it.
                "value": loss,
                "grad": grads,
                "value_fn": lambda p: predictive.loss(outputs_fn(p), data[1]),
                "residuals_fn": lambda p: jax.tree.map(jnp.subtract, outputs_fn(p), data[1]),
            }
            used = {name: extra[name] for name in optimizer.full_batch or ("sampled_grads",)}
            updates, opt_state = tx.update(grads, opt_state, params, **used)
            return (optax.apply_updates(params, updates), new_state, opt_state), loss

        self.step: Any = step
        self.compiled: Any = None
        self.compile_seconds = 0.0
        self.statistics = jax.jit(lambda *args: grads_of(*args)[2]())
        self.evaluate = jax.jit(functools.partial(loss_and_metrics, problem))

    def batches(self, problem: Problem, seed: int, epoch: int) -> Iterator[Any]:
        """The indices of the batches of an epoch, the same for each optimizer; None stands for all examples."""
        number, size = len(jax.tree.leaves(problem.train)[0]), problem.batch_size
        order = np.random.default_rng([seed, epoch]).permutation(number).astype(np.int32)
        for i in range(self.steps):
            yield order[i * size : (i + 1) * size] if size else None

    def means(self, problem: Problem, carry: Any, data: Any) -> dict[str, float]:
        """The mean loss and metrics of the data, computed in parts that fit into memory."""
        total = len(jax.tree.leaves(data)[0])
        size = EVALUATED if problem.batch_size else total
        sums: dict[str, float] = {}
        for start in range(0, total, size):
            part = jax.tree.map(lambda x: x[start : start + size], data) if size < total else data  # noqa: B023
            for name, value in self.evaluate(*carry[:2], *part).items():
                sums[name] = sums.get(name, 0.0) + min(size, total - start) / total * float(value)
        return sums

    def train(
        self,
        problem: Problem,
        learning_rate: float,
        seed: int,
        *,
        epochs: int,
        seconds: float = math.inf,
        measured: int | None = None,
        checkpoint: Path | None = None,
        deadline: float = math.inf,
        on_step: Callable[[int, float], None] = lambda step, loss: None,
    ) -> dict[str, Any]:
        """One training. It stops early if a loss is not finite.

        Args:
          problem: the problem of this seed.
          learning_rate: the highest learning rate, or the factor of an adaptive optimizer.
          seed: seed of the order of the examples and of the sampled labels.
          epochs, seconds: see `Budget`.
          measured: number of examples with which the training loss is measured; None: all.
          checkpoint: a file that is written after each epoch, and from which the training resumes.
          deadline: a time of `time.monotonic`. After it, the next epoch does not begin: `DeadlineError`.
          on_step: called several times a second with the number of steps and the loss.

        Returns:
          A dictionary. `epochs` is a list with the losses, the metrics of the test data, the number of steps and their
          seconds, at the start and after each epoch. `losses` are those of the steps. `diverged_at`, if it is there, is
          the step whose loss was not finite. The others are seconds (compilation, warm start) and arguments.
        """
        key, tx = jax.random.key(seed), self.tx(highest=learning_rate, steps=epochs * self.steps)
        # Copies, because the step donates its arguments.
        carry = jax.tree.map(jnp.copy, (problem.params, problem.state, tx.init(problem.params)))
        if self.compiled is None:  # Compiled ahead of time, so that its seconds are not counted.
            start = time.perf_counter()
            args = carry, problem.train, key, np.int32(0), next(self.batches(problem, seed, 0))
            self.compiled = self.step.lower(*args, tx=tx).compile()
            self.compile_seconds = time.perf_counter() - start
            jax.block_until_ready(self.compiled(jax.tree.map(jnp.copy, carry), *args[1:]))  # The first call is slower.
        run: dict[str, Any] = {"learning_rate": learning_rate, "seed": seed, "compile_seconds": self.compile_seconds}

        def record(spent: float) -> None:
            train = {
                "train_loss": self.means(problem, carry, jax.tree.map(lambda x: x[:measured], problem.train))["loss"]
            }
            test = self.means(problem, carry, problem.test)
            losses = {**train, "test_loss": test.pop("loss"), **test}
            run["epochs"].append({"step": len(run["epochs"]) * self.steps, "seconds": spent, **losses})
            if checkpoint:
                checkpoint.parent.mkdir(parents=True, exist_ok=True)
                content = {"run": json.dumps(run), "leaves": [np.asarray(x) for x in jax.tree.leaves(carry)]}
                temporary = checkpoint.with_suffix(".tmp")
                temporary.write_bytes(serialization.to_bytes(content))
                temporary.replace(checkpoint)

        if checkpoint and checkpoint.exists():
            saved: Any = serialization.msgpack_restore(checkpoint.read_bytes())
            run = json.loads(saved["run"])
            leaves = [jnp.asarray(saved["leaves"][str(i)]) for i in range(len(saved["leaves"]))]
            carry = jax.tree.unflatten(jax.tree.structure(carry), leaves)
        else:
            run |= {"warm_start_seconds": 0.0, "epochs": [], "losses": []}
            if self.optimizer.warm_start:
                start, order = time.perf_counter(), enumerate(self.batches(problem, seed, 0))
                fold = functools.partial(jax.random.fold_in, jax.random.key(seed + 1_000_000))
                seen = (self.statistics(*carry[:2], problem.train, fold(i), indices) for i, indices in order)
                opt_state = self.optimizer.warm_start(tx, carry[2], problem.params, seen)
                carry = (*carry[:2], jax.block_until_ready(opt_state))
                run["warm_start_seconds"] = time.perf_counter() - start
            record(0.0)
        shown = 0.0
        for epoch in range(len(run["epochs"]) - 1, epochs):
            spent = run["epochs"][-1]["seconds"]
            if "diverged_at" in run or spent >= seconds:
                break
            if time.monotonic() > deadline:
                raise DeadlineError
            losses: list[Any] = []
            start = time.perf_counter()
            for count, indices in enumerate(self.batches(problem, seed, epoch), epoch * self.steps):
                carry, loss = self.compiled(carry, problem.train, key, np.int32(count), indices)
                losses.append(loss)
                if time.perf_counter() - shown > 0.3:
                    on_step(count + 1, float(loss))
                    shown = time.perf_counter()
            run["losses"] += [float(f"{float(loss):.6g}") for loss in losses]  # This waits for the steps.
            spent += time.perf_counter() - start
            on_step(len(run["losses"]), run["losses"][-1])
            if not (finite := np.isfinite(run["losses"])).all():
                run["diverged_at"] = int(np.argmin(finite))
            record(spent)
        return run


def timed(values: Iterator[Any], count: int) -> tuple[list[Any], list[float]]:
    """The first values of a training, and the seconds after which there was each."""
    found, seconds, start = [], [], time.perf_counter()
    for value in itertools.islice(values, count):
        found.append(jax.block_until_ready(value))
        seconds.append(time.perf_counter() - start)
    return found, seconds


def final_loss(run: dict[str, Any]) -> float:
    loss = run["epochs"][-1]["train_loss"]
    return math.inf if loss is None or "diverged_at" in run or not math.isfinite(loss) else loss


def tune(loss_of: Callable[[float], float], grid: Sequence[float], name: str) -> float:
    """The learning rate of the lowest loss. If it is at an edge of the grid, the grid is widened."""
    if len(grid) < 3:
        raise UsageError(f"{name}: expected one learning rate, or at least three to tell an edge, got {list(grid)}.")
    losses = {rate: loss_of(rate) for rate in map(float, grid)}
    for _ in range(WIDENINGS):
        rates = sorted(losses)
        best = min(rates, key=lambda rate: losses[rate])  # The lowest rate, if all have diverged.
        if best not in (rates[0], rates[-1]):
            return best
        new = rates[1] * rates[0] / rates[2] if best == rates[0] else rates[-2] * rates[-1] / rates[-3]
        new = float(f"{new:.3g}")
        losses[new] = loss_of(new)
    raise UsageError(
        f"{name}: the best learning rate is still at an edge of the grid ({min(losses):g} to {max(losses):g}) after "
        f"{WIDENINGS} more. No result is reported. Give it another grid, in `optimizers.py`."
    )


def run(
    workload: str,
    optimizer: str,
    out: Path,
    *,
    budget: Budget | None = None,
    tuning_epochs: int | None = None,
    seeds: Sequence[int] = (0,),
    learning_rate: float | None = None,
    options: dict[str, Any] | None = None,
    deadline: float = math.inf,
    on_training: Callable[[str, int], Callable[[int, float], None]] = lambda name, steps: lambda step, loss: None,
) -> dict[str, Any]:
    """Tunes with seed 0, trains with each of `seeds`, and returns the content of `out/WORKLOAD/OPTIMIZER.json`.

    Trainings that are in the file are not run again, and a training in progress resumes. If the file has other
    settings, the run is refused. The arguments are those of the command line.
    """
    known([workload], WORKLOADS, "workload")
    known([optimizer], OPTIMIZERS, "optimizer")
    what, how, options = WORKLOADS[workload], OPTIMIZERS[optimizer], options or {}
    budget = budget or Budget(what.epochs, falling=what.falling)
    tuned = len(how.grid) > 1 and learning_rate is None
    tuning_epochs = min(what.tuning_epochs, budget.epochs) if tuning_epochs is None else tuning_epochs
    numbers = {"epochs": budget.epochs, "tuning-epochs": tuning_epochs, "seconds": budget.seconds, "seeds": len(seeds)}
    for name, value in {**numbers, "learning-rate": learning_rate}.items():
        if value is not None and not (value > 0 and (math.isfinite(value) or name == "seconds")):
            raise UsageError(f"--{name}: expected a positive number, got {value}.")
    settings = {
        **{key: value for key, value in options.items() if key != "data_dir"},
        **dataclasses.asdict(budget),
        "tuning_epochs": tuning_epochs if tuned else None,
        "optimizer": how.settings,
        "learning_rate": learning_rate,
    }
    settings["seconds"] = budget.seconds if math.isfinite(budget.seconds) else None
    settings = json.loads(json.dumps(settings))
    path = Path(out) / workload / f"{optimizer}.json"
    result: dict[str, Any] = {"workload": workload, "optimizer": optimizer, "machine": machine(), "settings": settings}
    result |= {"tuning": [], "runs": []}
    if path.exists():
        result = json.loads(path.read_text())
        there = result["settings"]
        different = [key for key in {**there, **settings} if there.get(key) != settings.get(key)]
        if different:
            pairs = [(key, *(x.get(key, "the default") for x in (there, settings))) for key in different]
            text = "; ".join(f"{key} is {old} there, and {new} here" for key, old, new in pairs)
            raise UsageError(f"{path} is of a run with other settings: {text}. Give another --out.")
    else:  # So that a run that resumes before the first training has ended is checked for the same settings.
        write_json(path, result)

    problems = functools.cache(lambda seed: what.make(seed, **options))
    trainer = functools.cache(lambda: Trainer(problems(0), how, budget.falling, what.epoch_steps))
    if how.full_batch and (problems(0).batch_size is not None or problems(0).augment):
        raise UsageError(f"{optimizer} is for deterministic losses, and the steps of {workload} have different data.")

    def trained(kind: str, rate: float, seed: int, epochs: int) -> dict[str, Any]:
        """A training that is in the file, or a new one. `kind` is "tuning" or "runs"."""
        for done in result[kind]:
            if (done["learning_rate"], done["seed"]) == (rate, seed):
                return done
        checkpoint = path.with_suffix(f".{kind}.{rate:g}.{seed}")
        on_step = on_training(f"{optimizer} {rate:g}, seed {seed}", epochs * trainer().steps)
        budgets = {"epochs": epochs, "seconds": budget.seconds, "measured": what.measured, "deadline": deadline}
        done = trainer().train(problems(seed), rate, seed, checkpoint=checkpoint, on_step=on_step, **budgets)
        if kind == "tuning":  # Only its end is used.
            done = {**done, "epochs": done["epochs"][-1:], "losses": []}
        result[kind].append(done)
        write_json(path, result)
        checkpoint.unlink()
        return done

    rate = float(how.grid[0]) if how.grid else 1.0
    if learning_rate is not None:
        rate = learning_rate
    elif tuned:
        name = f"{workload}, {optimizer}"
        rate = tune(lambda rate: final_loss(trained("tuning", rate, 0, tuning_epochs)), how.grid, name)
    for seed in seeds:
        trained("runs", rate, seed, budget.epochs)
    return json.loads(path.read_text())


@contextlib.contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Raises an error if another program writes into the same folder at the same time."""
    import filelock

    out.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"Another run writes into {out}. Wait for it, or give another --out.") from None
    with lock:
        yield
