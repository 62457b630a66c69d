"""The optimizers of the comparison, each with a grid of learning rates.

An optimizer is a function of its learning rate (a schedule) and of the problem. The decorator `@optimizer(grid)`
registers it. An empty grid means that there is nothing to tune, and a grid of one rate is a published setting.
`python -m experiments list` shows all optimizers.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

import tnt_optax
from experiments import baselines
from experiments.workloads import Problem

Make = Callable[[Any, Problem], optax.GradientTransformation]
ValueAndGrads = Callable[..., tuple[tuple[jax.Array, Any], Any, Any]]


def sampled(problem: Problem, targets: Any, scale: Any = "fisher") -> ValueAndGrads:
    """`value_and_sampled_grad` of a problem: its inputs are (inputs, state), and its aux is the new state."""
    return tnt_optax.value_and_sampled_grad(
        lambda params, batch: problem.forward(params, *batch), problem.predictive(targets), has_aux=True, scale=scale
    )


class Optimizer(NamedTuple):
    """A gradient transformation, and its requirements.

    Attributes:
      make: (learning rate, problem) -> gradient transformation.
      grid: learning rates in a constant ratio, or 1, 3, 10, .... It is widened if the best rate is at an edge.
      settings: the settings of a registered `tnt`, which are written into the file of the results.
      value_and_grads: (problem, targets) -> a function of loss, gradients and statistics, like `sampled`.
      warm_start: a function like `tnt_optax.warm_start`, for one pass over the data; None: no warm start.
      adaptive: whether the learning rate is a factor of the step, which is 1, or falls to 0 in the last half.
      full_batch: for deterministic losses only, the names of the extra arguments that it takes: `value`, `grad`,
        `value_fn`, and `residuals_fn`, a function of the parameters that returns outputs minus targets.
    """

    make: Make
    grid: Sequence[float] = ()
    settings: Any = None
    value_and_grads: Callable[[Problem, Any], ValueAndGrads] = sampled
    warm_start: Callable[..., Any] | None = None
    adaptive: bool = False
    full_batch: Sequence[str] = ()


OPTIMIZERS: dict[str, Optimizer] = {}


def optimizer(grid: Sequence[float] = (), name: str | None = None, **options: Any) -> Callable[[Make], Make]:
    """Registers a function under `name`, or else under its own name."""

    def register(make: Make) -> Make:
        OPTIMIZERS[name or make.__name__] = Optimizer(make, grid, **options)
        return make

    return register


def tnt(name: str, grid: Sequence[float], *, part: int = 1, scale: str = "fisher", warm: bool = False, **settings: Any):
    """Registers TNT with fixed settings. Labels are sampled for 1/`part` of a batch."""

    def value_and_grads(problem: Problem, targets: Any) -> ValueAndGrads:
        def of_a_part(params: Any, batch: Any, targets: Any, key: jax.Array) -> Any:
            (inputs, state), size = batch, len(jax.tree.leaves(targets)[0]) // part
            some, labels = jax.tree.map(lambda x: x[:size], (inputs, targets))
            value, grads, _ = sampled(problem, targets, scale)(params, batch, targets, key)
            return value, grads, lambda: sampled(problem, labels, scale)(params, (some, state), labels, key)[2]()

        return sampled(problem, targets, scale) if part == 1 else of_a_part

    options = {"value_and_grads": value_and_grads, "warm_start": tnt_optax.warm_start if warm else None}
    settings_of_run = {**settings, "part": part, "scale": scale, "warm_start": warm}
    optimizer(grid, name, settings=settings_of_run, **options)(
        lambda learning_rate, problem: tnt_optax.tnt(learning_rate, views=problem.views, **settings)
    )


RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
LOW, MIDDLE, HIGH, HIGHER = (RATES[i : i + 5] for i in range(4))

# First-order methods, SOAP, and methods of Optax.
optimizer(LOW, "adam")(lambda rate, _: optax.adam(rate))
optimizer(MIDDLE, "adamw")(lambda rate, _: optax.adamw(rate, b2=0.95, weight_decay=1e-4))
optimizer(HIGHER, "sgdm")(lambda rate, _: optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(rate, momentum=0.9)))
optimizer(MIDDLE, "soap")(lambda rate, _: baselines.soap(rate))
# Their line searches need no learning rate.
optimizer((), "lbfgs", full_batch=("value", "grad", "value_fn"))(lambda _, problem: optax.lbfgs())
optimizer((), "engd", full_batch=("value_fn", "residuals_fn"))(lambda _, problem: baselines.engd())


@optimizer(HIGH)
def muon(learning_rate: Any, problem: Problem) -> optax.GradientTransformation:
    """Muon, with Adam for embeddings and vectors. The scale makes their steps equally long, for one learning rate."""

    def dimensions(path: Any, x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        view = problem.views and problem.views(path, x.shape)
        modes = view.modes if view else (tuple(range(x.ndim - 1)), (x.ndim - 1,))
        is_matrix = x.ndim > 1 and len(modes) == 2 and "embedding" not in jax.tree_util.keystr(path)
        return optax.contrib.MuonDimensionNumbers(*modes) if is_matrix else None

    return optax.contrib.muon(
        learning_rate,
        consistent_rms=0.2,
        adam_b2=0.95,
        muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(dimensions, params),
    )


# TNT.
optimizer((), "adaptive_tnt", adaptive=True)(lambda rate, problem: tnt_optax.adaptive_tnt(rate, views=problem.views))
optimizer((), "adam_quadratic_model", adaptive=True)(
    lambda factor, _: optax.chain(
        optax.scale_by_adam(), tnt_optax.scale_by_quadratic_model(), optax.scale_by_learning_rate(factor)
    )
)
BOUNDED: dict[str, Any] = {"damping": 0.1, "trust_radius": 0.1}
EVERY_STEP: dict[str, Any] = {"statistics_period": 1, "inverse_period": 20}
tnt("tnt", HIGHER, **BOUNDED)
tnt("tnt_empirical", HIGHER, fisher="empirical", **BOUNDED)
for number in (1, 2, 4, 8):
    tnt(f"tnt_part{number}", [0.01], part=number, **BOUNDED, **EVERY_STEP)

# The settings that the paper published for its MNIST autoencoder and for CIFAR-10. The trust region is an addition.
PUBLISHED: dict[str, Any] = {"damping": 0.1, "scale": "mean", "warm": True, **EVERY_STEP}
tnt("tnt_published", [1e-4], **PUBLISHED)
tnt("tnt_published_bounded", [1e-4], trust_radius=0.0316, **PUBLISHED)
tnt("tnt_published_cifar10", [1e-4], scale="mean", warm=True, weight_decay=10.0)
optimizer([1e-4], "adam_published")(lambda rate, _: optax.adam(rate, eps=1e-4))
optimizer([3e-3], "sgdm_published")(lambda rate, _: optax.sgd(rate, momentum=0.9))
optimizer([3e-2], "sgdm_published_cifar10")(
    lambda rate, _: optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.01), optax.scale_by_learning_rate(rate))
)


def of_layers(problem: Problem, targets: Any) -> ValueAndGrads:
    """Like `sampled`, for KFAC: the statistics are two factors of each dense layer."""

    def value_and_grads(params: Any, batch: Any, targets: Any, key: jax.Array) -> Any:
        inputs, state = batch
        factors = baselines.value_and_layer_factors(
            lambda params, inputs, *tap: problem.forward(params, inputs, state, *tap)[0], problem.predictive(targets)
        )
        loss, grads, statistics = factors(params, inputs, targets, key)
        return (loss, state), grads, statistics

    return value_and_grads


optimizer(LOW, "shampoo")(lambda rate, _: baselines.shampoo(rate))
optimizer(HIGH, "kfac", value_and_grads=of_layers)(lambda rate, _: baselines.kfac(rate))
optimizer([3e-4], "shampoo_published")(lambda rate, _: baselines.shampoo(rate, damping=3e-4))
optimizer([3e-3], "kfac_published", value_and_grads=of_layers)(lambda rate, _: baselines.kfac(rate))
