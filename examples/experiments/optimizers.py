"""The optimizers that are compared, each with the learning rates that are tried.

An optimizer is a function of its learning rate (a schedule) and of the problem, and registers itself with
`@optimizer(grid)`. Without a grid there is nothing to tune. `python -m experiments list` shows all of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

import tnt_optax
from experiments import baselines
from experiments.workloads import Problem

ValueAndGrads = Callable[..., tuple[tuple[jax.Array, Any], Any, Any]]


def sampled(problem: Problem, targets: Any, **options: Any) -> ValueAndGrads:
    """`value_and_sampled_grad` of a problem, whose inputs are (inputs, state) and whose aux is the new state."""
    return tnt_optax.value_and_sampled_grad(
        lambda params, batch: problem.forward(params, *batch), problem.predictive(targets), has_aux=True, **options
    )


class Optimizer(NamedTuple):
    """A gradient transformation and what it needs.

    Attributes:
      make: (learning rate, problem) -> gradient transformation.
      grid: learning rates, neighbours in a constant ratio; the best one must not be at an edge.
      settings: everything else that makes a run what it is; written beside the numbers.
      value_and_grads: (problem, targets) -> loss, gradients and statistics, like `sampled`.
      warm_start: like `tnt_optax.warm_start`, over one pass of the data; None: there is none.
      adaptive: the learning rate is a factor of the step: 1, or falling to 0 in the last half of a training.
      full_batch: only for deterministic losses.
    """

    make: Callable[[Any, Problem], optax.GradientTransformation]
    grid: Sequence[float] = ()
    settings: Any = None
    value_and_grads: Callable[[Problem, Any], ValueAndGrads] = sampled
    warm_start: Callable[..., Any] | None = None
    adaptive: bool = False
    full_batch: bool = False


OPTIMIZERS: dict[str, Optimizer] = {}


def optimizer(grid: Sequence[float] = (), **options: Any) -> Callable[..., Any]:
    """Registers a function under its own name."""

    def register(make: Callable[[Any, Problem], optax.GradientTransformation]) -> Any:
        OPTIMIZERS[make.__name__] = Optimizer(make, grid, **options)
        return make

    return register


# First-order methods, and those that Optax has.


@optimizer([1e-4, 3e-4, 1e-3, 3e-3, 1e-2])
def adam(learning_rate: Any, problem: Problem) -> optax.GradientTransformation:
    return optax.adam(learning_rate)


@optimizer([3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
def adamw(learning_rate: Any, problem: Problem) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, b2=0.95, weight_decay=1e-4)


@optimizer([3e-3, 1e-2, 3e-2, 1e-1, 3e-1])
def sgdm(learning_rate: Any, problem: Problem) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(learning_rate, momentum=0.9))


@optimizer([1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
def muon(learning_rate: Any, problem: Problem) -> optax.GradientTransformation:
    """With Adam for embeddings and vectors, whose steps are as long, so that one learning rate fits all."""

    def dimensions(path: Any, x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        view = problem.views and problem.views(path, x.shape)
        embedding = "embedding" in jax.tree_util.keystr(path)
        if embedding or x.ndim < 2:
            return None
        if view is not None:
            return optax.contrib.MuonDimensionNumbers(*view.modes) if len(view.modes) == 2 else None
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), (x.ndim - 1,))

    return optax.contrib.muon(
        learning_rate,
        consistent_rms=0.2,
        adam_b2=0.95,
        muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(dimensions, params),
    )


@optimizer([3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
def soap(learning_rate: Any, problem: Problem) -> optax.GradientTransformation:
    return baselines.soap(learning_rate)


@optimizer(full_batch=True)
def lbfgs(learning_rate: Any, problem: Problem) -> optax.GradientTransformation:
    return optax.lbfgs()  # Its line search needs no learning rate.


# TNT.


@optimizer(adaptive=True)
def adaptive_tnt(learning_rate: Any, problem: Problem) -> optax.GradientTransformation:
    return tnt_optax.adaptive_tnt(learning_rate, views=problem.views)


@optimizer(adaptive=True)
def adam_quadratic_model(learning_rate: Any, problem: Problem) -> optax.GradientTransformation:
    """Adam's direction with the step of the quadratic model."""
    model = tnt_optax.scale_by_quadratic_model()
    return optax.chain(optax.scale_by_adam(), model, optax.scale_by_learning_rate(learning_rate))


def register_tnt(name: str, *, grid: Sequence[float], part: int = 1, **settings: Any) -> None:
    """TNT with fixed settings; labels are sampled for one in `part` examples of a batch.

    `scale="fisher"`: a part of the batch estimates the same matrix.
    """
    scale = settings.pop("scale", "fisher")

    def make(learning_rate: Any, problem: Problem) -> optax.GradientTransformation:
        options = {key: value for key, value in settings.items() if key != "warm_start"}
        return tnt_optax.tnt(learning_rate, views=problem.views, **options)

    def value_and_grads(problem: Problem, targets: Any) -> ValueAndGrads:
        whole = sampled(problem, targets, scale=scale)

        def of_a_part(params: Any, batch: Any, targets: Any, key: jax.Array) -> Any:
            (inputs, state), size = batch, len(jax.tree.leaves(targets)[0]) // part
            some, labels = jax.tree.map(lambda x: x[:size], (inputs, targets))
            fewer = sampled(problem, labels, scale=scale)
            return *whole(params, batch, targets, key)[:2], lambda: fewer(params, (some, state), labels, key)[2]()

        return whole if part == 1 else of_a_part

    OPTIMIZERS[name] = Optimizer(
        make,
        grid,
        {**settings, "scale": scale, "part": part},
        value_and_grads,
        tnt_optax.warm_start if settings.get("warm_start") else None,
    )


GRID = [3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
PERIODS = {"statistics_period": 1, "inverse_period": 20}
BOUNDED = {"damping": 0.1, "trust_radius": 0.1}
register_tnt("tnt", grid=GRID, damping=0.1, trust_radius=0.1)
register_tnt("tnt_empirical", grid=GRID, damping=0.1, trust_radius=0.1, fisher="empirical")
for part in (1, 2, 4, 8):
    register_tnt(f"tnt_part{part}", grid=[0.01], part=part, **BOUNDED, **PERIODS)

# What the paper's authors published for their MNIST autoencoder, and the same with a bound on the steps.
PUBLISHED: Any = {"damping": 0.1, "scale": "mean", "warm_start": True, **PERIODS}
register_tnt("tnt_published", grid=[1e-4], **PUBLISHED)
register_tnt("tnt_published_bounded", grid=[1e-4], trust_radius=0.0316, **PUBLISHED)
register_tnt("tnt_published_cifar10", grid=[1e-4], scale="mean", warm_start=True, weight_decay=10.0)


@optimizer([1e-4])
def adam_published(learning_rate: Any, problem: Problem) -> optax.GradientTransformation:
    return optax.adam(learning_rate, eps=1e-4)


@optimizer([3e-3])
def sgdm_published(learning_rate: Any, problem: Problem) -> optax.GradientTransformation:
    return optax.sgd(learning_rate, momentum=0.9)


@optimizer([3e-2])
def sgdm_published_cifar10(learning_rate: Any, problem: Problem) -> optax.GradientTransformation:
    """With the decoupled weight decay of the paper's code."""
    return optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.01), optax.scale_by_learning_rate(learning_rate))


def of_gradients(problem: Problem, targets: Any) -> ValueAndGrads:
    """Shampoo's statistics are of the gradients themselves."""

    def value_and_grads(params: Any, batch: Any, targets: Any, key: jax.Array) -> Any:
        value, grads, _ = sampled(problem, targets)(params, batch, targets, key)
        return value, grads, lambda: grads

    return value_and_grads


def of_layers(problem: Problem, targets: Any) -> ValueAndGrads:
    """KFAC's statistics are two factors of each dense layer."""

    def value_and_grads(params: Any, batch: Any, targets: Any, key: jax.Array) -> Any:
        inputs, state = batch

        def forward(params: Any, inputs: Any, *tap: Any) -> Any:
            return problem.forward(params, inputs, state, *tap)[0]

        factors = baselines.value_and_layer_factors(forward, problem.predictive(targets))
        loss, grads, statistics = factors(params, inputs, targets, key)
        return (loss, state), grads, statistics

    return value_and_grads


@optimizer([3e-4], value_and_grads=of_gradients, warm_start=baselines.warm_start)
def shampoo_published(learning_rate: Any, problem: Problem) -> optax.GradientTransformation:
    return baselines.shampoo(learning_rate, damping=3e-4)


@optimizer([3e-3], value_and_grads=of_layers, warm_start=baselines.warm_start)
def kfac_published(learning_rate: Any, problem: Problem) -> optax.GradientTransformation:
    return baselines.kfac(learning_rate, damping=0.3)


@optimizer([1e-4, 3e-4, 1e-3, 3e-3, 1e-2], value_and_grads=of_gradients)
def shampoo(learning_rate: Any, problem: Problem) -> optax.GradientTransformation:
    return baselines.shampoo(learning_rate, damping=1e-4)


@optimizer([1e-3, 3e-3, 1e-2, 3e-2, 1e-1], value_and_grads=of_layers)
def kfac(learning_rate: Any, problem: Problem) -> optax.GradientTransformation:
    return baselines.kfac(learning_rate)
