"""The optimizers that the paper compares, as `Trainer` wants them, with the settings that its authors published."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

import tnt_optax
from common import baselines
from common.training import Problem, Trainer

# What the authors published for their MNIST autoencoder; Adam's damping is its epsilon. "TNT, bounded" and
# "TNT-MLE" are not theirs.
PUBLISHED: dict[str, dict[str, float]] = {
    "TNT": {"learning_rate": 1e-4, "damping": 0.1},
    "TNT, bounded": {"learning_rate": 0.1, "damping": 0.2},
    "TNT-MLE": {"learning_rate": 1e-4, "damping": 0.1},
    "KFAC": {"learning_rate": 3e-3, "damping": 0.3},
    "Shampoo": {"learning_rate": 3e-4, "damping": 3e-4},
    "Adam": {"learning_rate": 1e-4, "damping": 1e-4},
    "SGD-m": {"learning_rate": 3e-3},
}


@dataclasses.dataclass(frozen=True)
class Bound:
    """What "TNT, bounded" has besides learning rate and damping.

    Attributes:
      radii: (step, trust radius), in the order of the steps; between two of them it changes exponentially.
      inverse_period: its T2.
    """

    radii: tuple[tuple[int, float], ...] = ((0, 1.0),)
    inverse_period: int = 20

    def trust_radius(self) -> optax.Schedule:
        steps, radii = np.array(self.radii, np.float32).T
        return lambda count: jnp.exp(jnp.interp(jnp.asarray(count, jnp.float32), steps, np.log(radii)))


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer.

    Attributes:
      optimizer: a function of the hyper-parameters `learning_rate` and `damping`, or of the first alone, that returns a
        gradient transformation.
      observing: a function of a problem that gives the arguments of `Trainer` for what the statistics are of.
      warm_start: whether there are statistics to start with.
    """

    optimizer: Callable[..., optax.GradientTransformation]
    observing: Callable[[Problem], Mapping[str, Any]] = lambda problem: {}
    warm_start: bool = True

    def trainer(self, problem: Problem) -> Trainer:
        return Trainer(problem, self.optimizer, **self.observing(problem))


def methods(*, statistics_period: int = 1, inverse_period: int = 20, bound: Bound = Bound()) -> dict[str, Method]:
    """By name. "TNT, bounded" is this library's: `scale="fisher"` and a bound on the steps; "TNT-MLE" is an ablation.

    Args:
      statistics_period: T1 of all that have statistics.
      inverse_period: T2 of the same, but for "TNT, bounded".
      bound: of "TNT, bounded".
    """

    def damped(optimizer: Callable[..., Any], **fixed: Any) -> Callable[..., optax.GradientTransformation]:
        # Only these two are searched; injected into the state, the periods would be unknown at compilation.
        return lambda learning_rate, damping: optimizer(
            learning_rate,
            damping=damping,
            **{"statistics_period": statistics_period, "inverse_period": inverse_period, **fixed},
        )

    def adam(learning_rate: Any, damping: Any) -> optax.GradientTransformation:
        return optax.adam(learning_rate, eps=damping)

    def sgd(learning_rate: Any) -> optax.GradientTransformation:
        return optax.sgd(learning_rate, momentum=0.9)

    def observing(value_and_grads: Callable[..., Any]) -> Callable[[Problem], Mapping[str, Any]]:
        return lambda problem: {
            "value_and_grads": value_and_grads(problem.forward, problem.predictive),
            "warm_start": baselines.warm_start,
        }

    return {
        "TNT": Method(damped(tnt_optax.tnt), lambda _: {"scale": "mean"}),
        "TNT, bounded": Method(
            damped(tnt_optax.tnt, trust_radius=bound.trust_radius(), inverse_period=bound.inverse_period)
        ),
        "TNT-MLE": Method(
            damped(baselines.tensor_normal_mle), lambda _: {"scale": "mean", "warm_start": baselines.warm_start}
        ),
        "KFAC": Method(damped(baselines.kfac), observing(baselines.value_and_layer_factors)),
        "Shampoo": Method(damped(baselines.shampoo), observing(baselines.value_and_gradient_twice)),
        "Adam": Method(adam, warm_start=False),
        "SGD-m": Method(sgd, warm_start=False),
    }
