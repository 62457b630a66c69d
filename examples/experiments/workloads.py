"""The workloads: models, the distributions of their targets, data and metrics.

A workload is a function of a seed, and of options with defaults, that returns a `Problem`. The decorator
`@workload(...)` registers it. `python -m experiments list` shows all workloads.
"""

import functools
import inspect
import itertools
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tnt_optax
from experiments import data
from experiments.models import Autoencoder, ResNet, Tap, Transformer, untapped
from tnt_optax import Bernoulli, Categorical, Joint, Normal


class Problem(NamedTuple):
    """A training problem.

    Attributes:
      params: the initial parameters.
      forward: (params, inputs, state) -> (outputs, new state).
      predictive: targets of a batch -> the distribution of the outputs, whose mask may depend on the targets.
      train: inputs and targets, trees of arrays with the examples along the first axis.
      test: the same, for the losses and metrics after each epoch.
      batch_size: number of examples in a batch, drawn without replacement in an epoch; None: all examples at each step.
      state: the initial state, such as the averages of BatchNorm, which each step replaces by the new state.
      predict: (params, inputs, state) -> outputs, for the evaluation; None: `forward`.
      metrics: name -> (parameters, outputs, targets) -> scalar, for the test data.
      augment: (key, inputs) -> inputs, for each step; None: the inputs themselves.
      views: the argument `views` of `tnt_optax.tnt`.
    """

    params: Any
    forward: Callable[..., tuple[Any, Any]]
    predictive: Callable[[Any], tnt_optax.PredictiveDistribution]
    train: tuple[Any, Any]
    test: tuple[Any, Any]
    batch_size: int | None
    state: Any = None
    predict: Callable[..., Any] | None = None
    metrics: Mapping[str, Callable[[Any, Any, Any], jax.Array]] = types.MappingProxyType({})
    augment: Callable[[jax.Array, Any], Any] | None = None
    views: Any = None


class Workload(NamedTuple):
    """A problem and the budget that fits it.

    Attributes:
      make: seed -> `Problem`; its keyword arguments are the workload's options.
      about: a description in one line.
      epochs: number of epochs of a training.
      tuning_epochs: number of epochs of a training that tunes the learning rate.
      epoch_steps: number of steps of an epoch; None: a pass over the training data.
      falling: whether learning rates fall during a training (the factor of `adaptive_tnt`: in its last half).
      measured: number of examples with which the training loss is measured; None: all.
      log: whether pictures have a logarithmic axis.
      decisive: the name of the loss or metric by which optimizers are compared. Less is better.
    """

    make: Callable[..., Problem]
    about: str
    epochs: int
    tuning_epochs: int
    epoch_steps: int | None = None
    falling: bool = False
    measured: int | None = None
    log: bool = False
    decisive: str = "train_loss"

    @property
    def needs_data(self) -> bool:
        return "data_dir" in inspect.signature(self.make).parameters


WORKLOADS: dict[str, Workload] = {}


def workload(about: str, **budget: Any) -> Callable[[Callable[..., Problem]], Callable[..., Problem]]:
    """Registers a function under its own name."""

    def register(make: Callable[..., Problem]) -> Callable[..., Problem]:
        WORKLOADS[make.__name__] = Workload(make, about, **budget)
        return make

    return register


def stateless(forward: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    return lambda params, inputs, state, *tap: (forward(params, inputs, *tap), state)


# Autoencoders, as in the paper's Section 6.1.


def autoencoder(images: data.Split, widths: Sequence[int], batch_size: int, predictive: Any, seed: int) -> Problem:
    """The loss is summed over the pixels of an image."""
    graphdef, params = nnx.split(Autoencoder(images.train.shape[1], widths, rngs=nnx.Rngs(seed)))
    forward = stateless(lambda params, inputs, *tap: nnx.merge(graphdef, params)(inputs, *tap))
    train, test = map(jnp.asarray, images)
    return Problem(nnx.as_pure(params), forward, lambda _: predictive, (train, train), (test, test), batch_size)


@workload("autoencoder 64-128-64-32-8 of the 8x8 digits; nats per image", epochs=40, tuning_epochs=40)
def digits(seed: int) -> Problem:
    return autoencoder(data.digits(), (128, 64, 32, 8), 128, Bernoulli(), seed)


@workload("autoencoder 784-1000-500-250-30 of MNIST; nats per image", epochs=10, tuning_epochs=3)
def mnist(seed: int, data_dir: Path | None = None) -> Problem:
    return autoencoder(data.mnist(data_dir), (1000, 500, 250, 30), 1000, Bernoulli(), seed)


@workload("autoencoder 625-2000-1000-500-30 of faces; half squared error", epochs=10, tuning_epochs=1)
def faces(seed: int, data_dir: Path | None = None) -> Problem:
    return autoencoder(data.faces(data_dir), (2000, 1000, 500, 30), 1000, Normal(), seed)


# Classification with BatchNorm, as in the paper's Section 6.2.


def classifier(images: data.Split, model: Callable[[nnx.Rngs], nnx.Module], flip: bool, seed: int) -> Problem:
    """Images are normalized by channel and shifted by up to 4 pixels. With `flip`, half of them are mirrored."""
    module: Any = model(nnx.Rngs(seed))
    module.train()
    graphdef, params, averages = nnx.split(module, nnx.Param, ...)
    module.eval()
    evaluation = nnx.graphdef(module)
    pixels = images.train[0] / np.float32(255)
    mean, deviation = pixels.mean(axis=(0, 1, 2), dtype=np.float64), pixels.std(axis=(0, 1, 2), dtype=np.float64)

    def normalize(inputs: jax.Array) -> jax.Array:
        return (inputs.astype(jnp.float32) / 255 - jnp.float32(mean)) / jnp.float32(deviation)

    def forward(params: Any, inputs: jax.Array, averages: Any) -> tuple[jax.Array, Any]:
        model: Any = nnx.merge(graphdef, params, averages, copy=True)
        return model(normalize(inputs)), nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))

    def augment(key: jax.Array, inputs: jax.Array) -> jax.Array:
        crop, mirror = jax.random.split(key)
        padded = jnp.pad(inputs, ((0, 0), (4, 4), (4, 4), (0, 0)))
        corners = jax.random.randint(crop, (len(inputs), 2), 0, 9)
        inputs = jax.vmap(lambda x, ij: jax.lax.dynamic_slice(x, (*ij, 0), inputs.shape[1:]))(padded, corners)
        mirrored = flip & jax.random.bernoulli(mirror, shape=(len(inputs), 1, 1, 1))
        return jnp.where(mirrored, inputs[:, :, ::-1], inputs)

    train, test = jax.tree.map(jnp.asarray, (images.train, images.test))
    return Problem(
        nnx.as_pure(params),
        forward,
        lambda _: Categorical(),
        train,
        test,
        128,
        state=nnx.as_pure(averages),
        predict=lambda params, x, averages: nnx.merge(evaluation, params, averages, copy=True)(normalize(x)),
        metrics={"test_error": error_rate},
        augment=augment,
    )


def error_rate(params: Any, logits: jax.Array, labels: jax.Array) -> jax.Array:
    del params
    return jnp.mean(jnp.argmax(logits, axis=-1) != labels, dtype=jnp.float32)


@workload(
    "ResNet-8 with BatchNorm on the digits, as images of 32x32",
    epochs=10,
    tuning_epochs=10,
    falling=True,
    log=True,
    decisive="test_error",
)
def digits_resnet(seed: int, blocks: int = 1, channels: int = 8) -> Problem:
    return classifier(data.digit_images(), lambda rngs: ResNet(blocks, channels, rngs=rngs), False, seed)


@workload(
    "ResNet with BatchNorm on CIFAR-10; 5 blocks: ResNet-32",
    epochs=8,
    tuning_epochs=2,
    falling=True,
    decisive="test_error",
)
def cifar10(
    seed: int, data_dir: Path | None = None, blocks: int = 1, channels: int = 16, examples: int = 10_000
) -> Problem:
    images = data.cifar10(data_dir)
    some = data.Split(tuple(x[:examples] for x in images.train), images.test)
    return classifier(some, lambda rngs: ResNet(blocks, channels, rngs=rngs), True, seed)


@workload(
    "ResNet-20 with BatchNorm on all images of CIFAR-10",
    epochs=6,
    tuning_epochs=1,
    falling=True,
    measured=10_000,
    decisive="test_error",
)
def cifar10_resnet20(seed: int, data_dir: Path | None = None) -> Problem:
    return cifar10(seed, data_dir, blocks=3, examples=50_000)


# A byte-level language model.


@workload(
    "byte-level transformer on Python's standard library; nats per byte",
    epochs=30,
    tuning_epochs=6,
    epoch_steps=50,
    falling=True,
    measured=256,
    decisive="test_loss",
)
def transformer(
    seed: int,
    width: int = 64,
    layers: int = 4,
    heads: int = 4,
    length: int = 128,
    batch: int = 8,
    dtype: str = "float32",
) -> Problem:
    model = Transformer(256, width, layers, heads, length, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(seed))
    graphdef, params = nnx.split(model, nnx.Param)
    rng = np.random.default_rng(0)
    train, test = (jnp.asarray(rng.permutation(sequences)) for sequences in data.python_sources(length))

    def previous(labels: jax.Array) -> jax.Array:
        """The inputs: the byte before each position. The first one is 0, and padding (-1) becomes 0."""
        return jnp.pad(jnp.maximum(labels[:, :-1], 0), ((0, 0), (1, 0)))

    return Problem(
        nnx.as_pure(params),
        stateless(lambda params, inputs: nnx.merge(graphdef, params)(inputs)),
        lambda targets: Categorical(weights=targets >= 0),  # Padding does not count, for true and sampled labels.
        (previous(train), train),
        (previous(test[:256]), test[:256]),
        batch,
        views=tnt_optax.flax_views(stacked=("blocks",)),
    )


@workload(
    "byte-level transformer of 4.8 million parameters: six layers of width 256; nats per byte",
    epochs=20,
    tuning_epochs=2,
    epoch_steps=250,
    falling=True,
    measured=256,
    decisive="test_loss",
)
def transformer_wide(seed: int, dtype: str = "float32") -> Problem:
    return transformer(seed, width=256, layers=6, heads=8, length=64, dtype=dtype)


# Small dense networks of coordinates: partial differential equations, an image, a table.

Layers = list[dict[str, jax.Array]]


def dense_layers(widths: Sequence[int], seed: int) -> Layers:
    """Glorot-uniform kernels, zero biases."""
    rng = np.random.default_rng(seed)
    bounds = [(6 / (n + m)) ** 0.5 for n, m in itertools.pairwise(widths)]
    return [
        {"kernel": jnp.float32(rng.uniform(-bound, bound, (n, m))), "bias": jnp.zeros(m)}
        for bound, (n, m) in zip(bounds, itertools.pairwise(widths), strict=True)
    ]


def dense(activation: Callable[[jax.Array], jax.Array], params: Layers, x: jax.Array, tap: Tap = untapped) -> jax.Array:
    for index, layer in enumerate(params):
        x = activation(x) if index else x
        x = tap(x, x @ layer["kernel"] + layer["bias"])
    return x


def derivative(u: Callable[[jax.Array], jax.Array], axis: int) -> Callable[[jax.Array], jax.Array]:
    """The derivative of a function of points (n, d), with values (n,), along one coordinate of the points."""
    return lambda x: jax.jvp(u, (x,), (jnp.zeros_like(x).at[:, axis].set(1),))[1]


def on_sides(along: jax.Array, side: jax.Array) -> jax.Array:
    """Points (n, d) on the sides x_d = 0, x_d = 1, x_(d-1) = 0, ... of the unit cube, from their other coordinates."""
    d, axis = along.shape[1] + 1, along.shape[1] - side // 2
    others = [jnp.where(axis > i, along[:, min(i, d - 2)], along[:, max(i - 1, 0)]) for i in range(d)]
    return jnp.stack([jnp.where(axis == i, side % 2, x) for i, x in enumerate(others)], axis=1)


def equation(
    residual: Callable[..., jax.Array],
    boundary: Callable[[jax.Array], jax.Array],
    solution: Callable[[Any], Any],
    seed: int,
    *,
    dims: int = 2,
    sides: int = 4,
    widths: Sequence[int] = (64, 64, 48, 48),
    points: tuple[int, int] = (900, 120),
    resampled: int = 0,
    dtype: str = "float32",
) -> Problem:
    """A network u(x), for x in [0, 1]^dims, that solves an equation.

    The loss is half the mean square of the residual on points in the interior, plus half the mean square of u minus its
    values on points of the boundary. `l2_error` is the relative error of u on 9,000 other points.

    Args:
      residual: (u, points in the interior (n, dims)) -> (n,).
      boundary: points on the boundary (n, dims) -> the values of u (n,).
      solution: points (n, dims), an array of NumPy -> u (n,).
      seed: of the parameters and of the points.
      dims: number of coordinates.
      sides: the number of sides with values: the first of those that `on_sides` lists.
      widths: those of the hidden layers.
      points: the numbers of points in the interior and on the boundary.
      resampled: 1: each step has new points. 0: the points are fixed, and the loss is deterministic.
      dtype: float32, or float64 with the environment variable JAX_ENABLE_X64=1.
    """
    cast: Any = functools.partial(jnp.asarray, dtype=dtype)
    rng, (inside, edge) = np.random.default_rng(1000 + seed), points
    along, side = cast(rng.uniform(size=(edge, dims - 1))), jnp.asarray(rng.integers(sides, size=edge))
    inputs = {"interior": cast(rng.uniform(size=(inside, dims))), "edge": on_sides(along, side)}
    targets = {"interior": jnp.zeros(inside, dtype), "edge": jnp.zeros(edge, dtype)}
    others = cast(rng.uniform(size=(9000, dims)))
    truth = cast(solution(np.asarray(others)))

    def u(params: Layers) -> Callable[[jax.Array], jax.Array]:
        return lambda x: dense(jnp.tanh, params, x)[:, 0]

    def forward(params: Layers, x: Any) -> Any:
        return {"interior": residual(u(params), x["interior"]), "edge": u(params)(x["edge"]) - boundary(x["edge"])}

    def resample(key: jax.Array, _: Any) -> Any:
        keys = jax.random.split(key, 3)
        along = jax.random.uniform(keys[1], (edge, dims - 1), dtype)
        edges = on_sides(along, jax.random.randint(keys[2], (edge,), 0, sides))
        return {"interior": jax.random.uniform(keys[0], (inside, dims), dtype), "edge": edges}

    def l2_error(params: Layers, *_: Any) -> jax.Array:
        return jnp.linalg.norm(u(params)(others) - truth) / jnp.linalg.norm(truth)

    return Problem(
        jax.tree.map(cast, dense_layers((dims, *widths, 1), seed)),
        stateless(forward),
        lambda _: Joint({"interior": Normal(), "edge": Normal()}),
        (inputs, targets),
        (inputs, targets),
        None,
        metrics={"l2_error": l2_error},
        augment=resample if resampled else None,
    )


def laplacian(u: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.stack([derivative(derivative(u, i), i)(x) for i in range(x.shape[1])]), axis=0)


PDE: dict[str, Any] = {"epochs": 20, "tuning_epochs": 10, "epoch_steps": 100, "log": True, "decisive": "l2_error"}


@workload("-Laplace u = f on the unit square, u = sin(pi x) sin(pi y)", **PDE)
def poisson(seed: int, resampled: int = 0, dtype: str = "float32") -> Problem:
    def solution(x: Any) -> Any:
        return jnp.prod(jnp.sin(jnp.pi * x), axis=1)

    def residual(u: Any, x: jax.Array) -> jax.Array:
        return -laplacian(u, x) - 2 * jnp.pi**2 * solution(x)

    return equation(residual, solution, solution, seed, resampled=resampled, dtype=dtype)


def poisson_in_5_dimensions(widths: Sequence[int], seed: int, **options: Any) -> Problem:
    def solution(x: Any) -> Any:
        return jnp.sum(jnp.cos(jnp.pi * x), axis=1)

    def residual(u: Any, x: jax.Array) -> jax.Array:
        return -laplacian(u, x) - jnp.pi**2 * solution(x)

    return equation(residual, solution, solution, seed, dims=5, sides=10, points=(3000, 500), widths=widths, **options)


@workload("-Laplace u = f in 5 dimensions, u = sum of cos(pi x_i), with 10,065 parameters", **PDE)
def poisson5(seed: int, resampled: int = 0, dtype: str = "float32") -> Problem:
    return poisson_in_5_dimensions((64, 64, 48, 48), seed, resampled=resampled, dtype=dtype)


@workload("the same with 116,865 parameters, and new points at each step", **PDE)
def poisson5_wide(seed: int, resampled: int = 1, dtype: str = "float32") -> Problem:
    return poisson_in_5_dimensions((256, 256, 128, 128), seed, resampled=resampled, dtype=dtype)


@workload("heat equation u_t = u_xx / 20, u = exp(-pi^2 t / 20) sin(pi x), for t, x in [0, 1]", **PDE)
def heat(seed: int, resampled: int = 0, dtype: str = "float32") -> Problem:
    def solution(x: Any) -> Any:
        return jnp.exp(-(jnp.pi**2) * x[:, 0] / 20) * jnp.sin(jnp.pi * x[:, 1])

    def residual(u: Any, x: jax.Array) -> jax.Array:
        return derivative(u, 0)(x) - derivative(derivative(u, 1), 1)(x) / 20

    return equation(residual, solution, solution, seed, sides=3, resampled=resampled, dtype=dtype)


VISCOSITY = 0.1 / np.pi


def burgers_solution(x: np.ndarray) -> np.ndarray:
    """u at t = x_1 and z = 2 x_2 - 1: the transformation of Cole and Hopf, by Gauss and Hermite's quadrature."""
    nodes, weights = np.polynomial.hermite.hermgauss(200)
    t, z = np.asarray(x, np.float64).T
    y = 2 * z[:, None] - 1 - np.sqrt(4 * VISCOSITY * t)[:, None] * nodes
    kernel = weights * np.exp(-(np.cos(np.pi * y) + 1) / (2 * np.pi * VISCOSITY))
    return -np.sum(kernel * np.sin(np.pi * y), axis=1) / np.sum(kernel, axis=1)


@workload(
    "Burgers' equation u_t + u u_z = nu u_zz, nu = 0.1 / pi, u(0, z) = -sin(pi z), for t in [0, 1], |z| < 1", **PDE
)
def burgers(seed: int, resampled: int = 0, dtype: str = "float32") -> Problem:
    def residual(u: Any, x: jax.Array) -> jax.Array:
        u_x = derivative(u, 1)  # x is (z + 1) / 2.
        return derivative(u, 0)(x) + u(x) * u_x(x) / 2 - VISCOSITY * derivative(u_x, 1)(x) / 4

    def boundary(x: jax.Array) -> jax.Array:
        return jnp.where(x[:, 0] == 0, jnp.sin(2 * jnp.pi * x[:, 1]), 0)  # -sin(pi (2 x - 1)); 0 for x = 0 and 1.

    return equation(residual, boundary, burgers_solution, seed, sides=3, resampled=resampled, dtype=dtype)


@workload("colours of a photograph from Fourier features of the pixels", epochs=40, tuning_epochs=10, log=True)
def image(seed: int, size: int = 64, frequencies: int = 64) -> Problem:
    coordinates, colours = map(jnp.asarray, data.picture(size))
    projection = np.random.default_rng(0).normal(0, 6, (2, frequencies)).astype(np.float32)
    phases = coordinates @ projection
    features = jnp.concatenate([jnp.sin(phases), jnp.cos(phases)], axis=1)
    forward = stateless(functools.partial(dense, jax.nn.relu))
    psnr = {"psnr": lambda _, y, t: -10 * jnp.log10(jnp.mean(jnp.square(y - t)))}
    layers, batch = dense_layers((2 * frequencies, 128, 128, 128, 3), seed), (features, colours)
    # The variance 0.01: a standard deviation of 0.1 for each colour.
    return Problem(layers, forward, lambda _: Normal(variance=0.01), batch, batch, 512, metrics=psnr)


@workload("progression of diabetes in 442 patients, standardized", epochs=30, tuning_epochs=30, decisive="test_loss")
def diabetes(seed: int) -> Problem:
    features, target = data.diabetes()
    train, test = ((jnp.asarray(x), jnp.asarray(y)) for x, y in zip(features, target, strict=True))
    r2 = {"r2": lambda _, y, t: 1 - jnp.mean(jnp.square(y - t)) / jnp.var(t)}
    layers, forward = dense_layers((10, 32, 32, 1), seed), stateless(functools.partial(dense, jnp.tanh))
    return Problem(layers, forward, lambda _: Normal(), train, test, 64, metrics=r2)


def loss_and_metrics(problem: Problem, params: Any, state: Any, inputs: Any, targets: Any) -> dict[str, jax.Array]:
    """The mean loss and the metrics of a batch, with the model in evaluation mode."""
    predict = problem.predict or (lambda *args: problem.forward(*args)[0])
    outputs = predict(params, inputs, state)
    values = {"loss": problem.predictive(targets).loss(outputs, targets)}
    return values | {name: metric(params, outputs, targets) for name, metric in problem.metrics.items()}
