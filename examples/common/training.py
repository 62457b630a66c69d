"""The training loop of the examples: one jitted step for every optimizer, timed without its compilation."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tnt_optax


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is trained: outputs = forward(params, inputs), a distribution of the targets, and the data."""

    name: str
    forward: Callable[[Any, jax.Array], jax.Array]
    predictive: tnt_optax.PredictiveDistribution
    params: Any
    train: tuple[jax.Array, jax.Array]  # inputs, targets
    test: tuple[jax.Array, jax.Array]
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train[0]) // self.batch_size


@dataclasses.dataclass
class Curve:
    """What came of a training: losses at the start and after every epoch, and the seconds of its steps alone."""

    train_loss: list[float] = dataclasses.field(default_factory=list)
    test_loss: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

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


def sampled_on_a_part(value_and_grads: Any, share: int) -> Any:
    """`value_and_grads`, but the labels are sampled for one in `share` examples only, with a forward pass of their own.

    The sampled gradient of a part has the same distribution at `scale="fisher"`, and costs a part of the time.
    """
    if share == 1:
        return value_and_grads

    def with_a_part(params: Any, inputs: jax.Array, targets: jax.Array, key: jax.Array) -> Any:
        loss, grads, _ = value_and_grads(params, inputs, targets, key)
        size = len(inputs) // share
        return loss, grads, lambda: value_and_grads(params, inputs[:size], targets[:size], key)[2]()

    return with_a_part


class Trainer:
    """Trains a problem with one optimizer, again and again with other hyper-parameters, compiling it once.

    Args:
      problem: what is trained.
      optimizer: a function of the hyper-parameters that returns a gradient transformation.
      scale: of the sampled gradient, see `tnt_optax.value_and_sampled_grad`.
      share: labels are sampled for one in so many examples of a batch.
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: Callable[..., optax.GradientTransformation],
        *,
        scale: Literal["mean", "fisher"] = "fisher",
        share: int = 1,
    ):
        self.problem = problem
        # The numbers live in the optimizer's state, so that one compiled step serves all of their values.
        self.optimizer = optax.inject_hyperparams(optimizer)
        value_and_grads = tnt_optax.value_and_sampled_grad(problem.forward, problem.predictive, scale=scale)
        of_a_part = sampled_on_a_part(value_and_grads, share)

        @functools.partial(jax.jit, static_argnames="tx", donate_argnames=("params", "opt_state"))
        def step(params: Any, opt_state: Any, batch: tuple[jax.Array, jax.Array], key: jax.Array, *, tx: Any):
            loss, grads, sampled_grads = of_a_part(params, *batch, key)
            # First-order optimizers ignore `sampled_grads`, a function, which then costs nothing.
            updates, opt_state = tx.update(grads, opt_state, params, sampled_grads=sampled_grads)
            return optax.apply_updates(params, updates), opt_state, loss

        self._sampled_grads = jax.jit(lambda params, x, y, key: value_and_grads(params, x, y, key)[2])
        self._jitted_step: Any = step
        self._step: Any = None
        self._evaluate = jax.jit(lambda params, x, y: problem.predictive.loss(problem.forward(params, x), y))

    def train(
        self,
        epochs: int,
        hyperparams: Mapping[str, float],
        *,
        seed: int = 0,
        warm_start: bool = False,
        on_step: Callable[[float], None] = lambda loss: None,
    ) -> Curve:
        """Trains from the problem's initial parameters; stops early where the loss is no longer finite.

        Args:
          epochs: how many passes over the training data.
          hyperparams: of the optimizer.
          seed: of the order of the examples and of the sampled targets.
          warm_start: one pass over the training data for TNT's statistics, whose seconds are not counted.
          on_step: called after every step with its loss.
        """
        problem, key = self.problem, jax.random.key(seed)
        tx = self.optimizer(**hyperparams)
        params = jax.tree.map(jnp.copy, problem.params)
        opt_state = tx.init(params)
        if self._step is None:  # Compiled ahead, so that no second of it is counted.
            batch = next(batches(problem, 0, seed))
            self._step = self._jitted_step.lower(params, opt_state, batch, key, tx=tx).compile()

        if warm_start:
            keys = jax.random.split(jax.random.fold_in(key, 1), problem.steps_per_epoch)
            pairs = zip(batches(problem, 0, seed), keys, strict=True)
            sampled_grads = (self._sampled_grads(params, *batch, subkey) for batch, subkey in pairs)
            opt_state = tnt_optax.warm_start(tx, opt_state, params, sampled_grads)

        curve = Curve()
        self._record(curve, params, 0.0)
        for epoch in range(epochs):
            seconds = 0.0
            for batch in batches(problem, epoch, seed):
                key, subkey = jax.random.split(key)
                start = time.perf_counter()
                params, opt_state, loss = self._step(params, opt_state, batch, subkey)
                loss = float(loss)
                seconds += time.perf_counter() - start
                on_step(loss)
            self._record(curve, params, seconds)
            if not math.isfinite(curve.train_loss[-1]):
                break
        return curve

    def _record(self, curve: Curve, params: Any, seconds: float) -> None:
        curve.train_loss.append(float(self._evaluate(params, *self.problem.train)))
        curve.test_loss.append(float(self._evaluate(params, *self.problem.test)))
        curve.seconds.append(seconds + (curve.seconds[-1] if curve.seconds else 0.0))
