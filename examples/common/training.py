"""The training loop of the examples: one jitted step for every optimizer, timed without its compilation."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import tnt_optax


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is trained: outputs = forward(params, inputs), a distribution of the targets, and the data.

    For KFAC `forward` also takes a third argument, see `baselines.value_and_layer_factors`. Where a pass over the data
    is too long, `epoch_steps` steps on data drawn anew are an epoch, and the training loss is that of the first
    `measured` examples.
    """

    name: str
    forward: Callable[[Any, jax.Array], jax.Array]
    predictive: tnt_optax.PredictiveDistribution
    params: Any
    train: tuple[jax.Array, jax.Array]  # inputs, targets
    test: tuple[jax.Array, jax.Array]
    batch_size: int
    epoch_steps: int | None = None  # None: a pass over the training data.
    measured: int | None = None  # None: all.

    @property
    def steps_per_epoch(self) -> int:
        return self.epoch_steps or len(self.train[0]) // self.batch_size

    def predictive_of(self, targets: jax.Array) -> tnt_optax.PredictiveDistribution:
        """The distribution of these targets, for problems where it differs from batch to batch: a mask, say."""
        del targets
        return self.predictive


@dataclasses.dataclass
class Curve:
    """The result of a training: losses at the start and after every epoch, and the seconds of its steps alone.

    The seconds of the warm start, with its compilation, are counted apart.
    """

    train_loss: list[float] = dataclasses.field(default_factory=list)
    test_loss: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    warm_start_seconds: float = 0.0

    @property
    def final(self) -> float:
        """The last training loss; infinity where the training diverged."""
        return self.train_loss[-1] if math.isfinite(self.train_loss[-1]) else math.inf


def batches(problem: Problem, epoch: int, seed: int) -> Iterator[tuple[jax.Array, jax.Array]]:
    """One pass over the shuffled training data, the same for every optimizer; an incomplete last batch is dropped."""
    order = np.random.default_rng([seed, epoch]).permutation(len(problem.train[0]))
    for start in range(0, problem.steps_per_epoch * problem.batch_size, problem.batch_size):
        chosen = order[start : start + problem.batch_size]
        yield problem.train[0][chosen], problem.train[1][chosen]


def subsampled(value_and_grads: Any, subsample: int) -> Any:
    """`value_and_grads`, but labels are sampled for one in `subsample` examples only, with a forward pass of their own.

    With `scale="fisher"` the sampled gradient of a part has the same covariance, and costs a part of the time.
    """
    if subsample == 1:
        return value_and_grads

    def with_a_part(params: Any, inputs: jax.Array, targets: jax.Array, key: jax.Array) -> Any:
        loss, grads, _ = value_and_grads(params, inputs, targets, key)
        size = len(inputs) // subsample
        return loss, grads, lambda: value_and_grads(params, inputs[:size], targets[:size], key)[2]()

    return with_a_part


def refuse_another_run(folder: Path, saved: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Ends the program where a checkpoint is of something else; Orbax's own error would be hundreds of lines long."""
    for name in {**here, **saved}:
        if (there := saved.get(name, "missing")) != (now := here.get(name, "missing")):
            raise SystemExit(f"{folder} is of another run: {name} is {there} there, and {now} here.")


class Checkpoints:
    """The latest state of a training and its metadata, saved in a folder; without a folder, nothing is saved."""

    def __init__(self, folder: Path | None):
        keep = ocp.checkpoint_managers.LatestN(1)
        options = ocp.CheckpointManagerOptions(preservation_policy=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options) if folder else None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *args: object) -> None:
        if self._manager:
            self._manager.close()

    def latest(self, like: Any) -> tuple[Any, Any] | None:
        """The state, of the structure, shapes and dtypes of `like`, and the metadata; None without a checkpoint."""
        if self._manager is None or (step := self._manager.latest_step()) is None:
            return None
        metadata = self._manager.metadata(step).custom_metadata
        return self._manager.restore(step, args=ocp.args.StandardRestore(like)), metadata

    def save(self, step: int, state: Any, metadata: Any) -> None:
        if self._manager:
            self._manager.save(step, args=ocp.args.StandardSave(state), custom_metadata=metadata)
            self._manager.wait_until_finished()  # The next step reuses the memory of this state.


class Trainer:
    """Trains a problem with one optimizer, again and again with other hyper-parameters, compiling it once.

    Args:
      problem: what is trained.
      optimizer: a function of the hyper-parameters that returns a gradient transformation.
      scale: of the sampled gradient, see `tnt_optax.value_and_sampled_grad`.
      subsample: labels are sampled for one in so many examples of a batch.
      value_and_grads: in place of that of `tnt_optax.value_and_sampled_grad`, for an optimizer whose statistics are of
        something else.
      warm_start: in place of `tnt_optax.warm_start`.
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: Callable[..., optax.GradientTransformation],
        *,
        scale: Literal["mean", "fisher"] = "fisher",
        subsample: int = 1,
        value_and_grads: Any = None,
        warm_start: Callable[..., Any] = tnt_optax.warm_start,
    ):
        self.problem, self.warm_start = problem, warm_start
        # The hyper-parameters are in the optimizer's state, so that one compiled step works for all of their values.
        self.optimizer = optax.inject_hyperparams(optimizer, hyperparam_dtype=jnp.float32)

        def of_the_problem(params: Any, inputs: jax.Array, targets: jax.Array, key: jax.Array) -> Any:
            predictive = problem.predictive_of(targets)
            return tnt_optax.value_and_sampled_grad(problem.forward, predictive, scale=scale)(
                params, inputs, targets, key
            )

        value_and_grads = value_and_grads or of_the_problem
        with_subsample = subsampled(value_and_grads, subsample)

        @functools.partial(jax.jit, static_argnames="tx", donate_argnames=("params", "opt_state"))
        def step(params: Any, opt_state: Any, batch: tuple[jax.Array, jax.Array], key: jax.Array, *, tx: Any):
            loss, grads, sampled_grads = with_subsample(params, *batch, key)
            # First-order optimizers ignore `sampled_grads`, a function, which then costs nothing.
            updates, opt_state = tx.update(grads, opt_state, params, sampled_grads=sampled_grads)
            return optax.apply_updates(params, updates), opt_state, loss

        self._sampled_grads = jax.jit(lambda params, x, y, key: value_and_grads(params, x, y, key)[2]())
        self._jitted_step: Any = step
        self._step: Any = None
        self._evaluate = jax.jit(lambda params, x, y: problem.predictive_of(y).loss(problem.forward(params, x), y))

    def train(
        self,
        epochs: int,
        hyperparams: Mapping[str, float],
        *,
        seed: int = 0,
        params: Any = None,
        warm_start: int = 0,
        max_seconds: float = math.inf,
        folder: Path | None = None,
        on_step: Callable[[float], None] = lambda loss: None,
        on_epoch: Callable[[int], None] = lambda epochs: None,
    ) -> Curve:
        """Trains from the initial parameters; stops early where the loss is no longer finite.

        Args:
          epochs: how many passes over the training data.
          hyperparams: of the optimizer.
          seed: of the order of the examples and of the sampled targets.
          params: the initial parameters; None: the problem's.
          warm_start: how many batches the statistics absorb before the first step.
          max_seconds: no other epoch begins after so many seconds of steps.
          folder: for a checkpoint after every epoch, which is where the training goes on if it is there already.
          on_step: called after every step with its loss.
          on_epoch: called at the start and after every epoch with the number of those that are done.
        """
        problem, key = self.problem, jax.random.key(seed)
        tx = self.optimizer(**hyperparams)
        params = jax.tree.map(jnp.copy, problem.params if params is None else params)
        opt_state = tx.init(params)
        if self._step is None:  # Compiled ahead, so that no second of it is counted.
            batch = next(batches(problem, 0, seed))
            self._step = self._jitted_step.lower(params, opt_state, batch, key, tx=tx).compile()

        with Checkpoints(folder) as checkpoints:
            saved = checkpoints.latest((params, opt_state, jax.random.key_data(key)))
            if saved is None:
                curve = Curve()
                start = time.perf_counter()
                if warm_start:
                    keys = jax.random.split(jax.random.fold_in(key, 1), problem.steps_per_epoch)
                    pairs = itertools.islice(zip(batches(problem, 0, seed), keys, strict=True), warm_start)
                    observed = (self._sampled_grads(params, *batch, subkey) for batch, subkey in pairs)
                    opt_state = jax.block_until_ready(self.warm_start(tx, opt_state, params, observed))
                    curve.warm_start_seconds = time.perf_counter() - start
                self._record(curve, params, 0.0)
            else:
                (params, opt_state, key_data), of_curve = saved
                curve, key = Curve(**of_curve), jax.random.wrap_key_data(key_data)
            for epoch in range(len(curve.seconds) - 1, epochs):
                on_epoch(epoch)
                if not math.isfinite(curve.train_loss[-1]) or curve.seconds[-1] >= max_seconds:
                    break
                seconds = 0.0
                for batch in batches(problem, epoch, seed):
                    key, subkey = jax.random.split(key)
                    start = time.perf_counter()
                    params, opt_state, loss = self._step(params, opt_state, batch, subkey)
                    loss = float(loss)
                    seconds += time.perf_counter() - start
                    on_step(loss)
                self._record(curve, params, seconds)
                state = (params, opt_state, jax.random.key_data(key))
                checkpoints.save(epoch + 1, state, dataclasses.asdict(curve))
        return curve

    def search(
        self,
        grid: Sequence[Mapping[str, float]],
        epochs: int,
        *,
        seed: int = 0,
        warm_start: int = 0,
        on_step: Callable[[float], None] = lambda loss: None,
        on_trial: Callable[[list[dict[str, float]]], None] = lambda trials: None,
    ) -> list[dict[str, float]]:
        """Trains with each hyper-parameters of the grid; returns them with the final training losses, the lowest first.

        `on_trial` is called after each with all that there are so far. The other arguments are those of `train`.
        """
        trials: list[dict[str, float]] = []
        for hyperparams in grid:
            curve = self.train(epochs, hyperparams, seed=seed, warm_start=warm_start, on_step=on_step)
            trials.append({**hyperparams, "loss": curve.final})
            on_trial(trials)
        return sorted(trials, key=lambda trial: trial["loss"])

    def _record(self, curve: Curve, params: Any, seconds: float) -> None:
        measured = (x[: self.problem.measured] for x in self.problem.train)
        curve.train_loss.append(float(self._evaluate(params, *measured)))
        curve.test_loss.append(float(self._evaluate(params, *self.problem.test)))
        curve.seconds.append(seconds + (curve.seconds[-1] if curve.seconds else 0.0))
