"""What the examples train: a model, a distribution of its targets, and data."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tnt_optax
from common.data import Images, Texts
from common.models import Autoencoder, StackedTransformer
from common.training import Problem


def autoencoder_problem(
    images: Images,
    widths: Sequence[int],
    batch_size: int,
    *,
    seed: int,
    predictive: tnt_optax.PredictiveDistribution | None = None,
) -> Problem:
    """An autoencoder of images; the loss is summed over the pixels.

    Args:
      images: what is trained and tested on.
      widths: of the encoder's layers, the code's last.
      batch_size: images a step.
      seed: of the initial parameters.
      predictive: of the pixels; None: they are Bernoulli variables.
    """
    train, test = jnp.asarray(images.train), jnp.asarray(images.test)
    pixels = train.shape[1]
    graphdef, params = nnx.split(Autoencoder(pixels, widths, rngs=nnx.Rngs(seed)))

    def forward(params: Any, inputs: jax.Array, *tap: Any) -> jax.Array:
        return nnx.merge(graphdef, params)(inputs, *tap)

    sizes = "-".join(map(str, [pixels, *widths, *list(widths)[-2::-1], pixels]))
    return Problem(
        name=f"Autoencoder {sizes}",
        forward=forward,
        predictive=predictive or tnt_optax.Bernoulli(),
        params=nnx.as_pure(params),
        train=(train, train),
        test=(test, test),
        batch_size=batch_size,
    )


class PaddedProblem(Problem):
    """A problem of labels, of which those below 0 stand on padded positions and don't count."""

    def predictive_of(self, targets: jax.Array) -> tnt_optax.Categorical:
        # The same mask for the given labels and for those that are sampled in their place.
        return tnt_optax.Categorical(weights=targets >= 0)


def language_problem(
    texts: Texts,
    *,
    width: int,
    layers: int,
    heads: int,
    batch_size: int,
    epoch_steps: int,
    measured: int,
    dtype: Any = jnp.float32,
    seed: int,
) -> PaddedProblem:
    """Bytes, each predicted from those before it in its sequence; the loss is in nats, the mean over all bytes.

    Args:
      texts: what is trained and tested on.
      width, layers, heads, dtype: of the `StackedTransformer`.
      batch_size: sequences a step.
      epoch_steps: after how many steps the losses are measured.
      measured: on how many sequences of either set, drawn at random.
      seed: of the initial parameters. Which sequences are measured does not depend on it.
    """
    length = texts.train.shape[1]
    rng = np.random.default_rng(0)
    train, test = (jnp.asarray(rng.permutation(sequences)) for sequences in texts)
    model = StackedTransformer(256, width, layers, heads, length, dtype=dtype, rngs=nnx.Rngs(seed))
    graphdef, params = nnx.split(model, nnx.Param)

    def forward(params: Any, inputs: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(inputs)

    return PaddedProblem(
        name=f"Transformer of {layers} layers of width {width}",
        forward=forward,
        predictive=tnt_optax.Categorical(),
        params=nnx.as_pure(params),
        train=(shifted(train), train),
        test=(shifted(test[:measured]), test[:measured]),
        batch_size=batch_size,
        epoch_steps=epoch_steps,
        measured=measured,
    )


def shifted(labels: jax.Array) -> jax.Array:
    """What each label is predicted from: the byte before it. A sequence begins after a zero, and so does padding."""
    return jnp.pad(jnp.maximum(labels[:, :-1], 0), ((0, 0), (1, 0)))


class Poisson(NamedTuple):
    """A physics-informed network for -Laplace u = f on the unit square, u = 0 on its boundary, on fixed points.

    f is such that u = sin(pi x) sin(pi y). The loss is half the mean square of the residual in the interior plus half
    that of u on the boundary. `error(params)` is the relative L2 error of u on other points.
    """

    forward: Callable[[Any, Any], Any]
    predictive: tnt_optax.PredictiveDistribution
    params: Any
    inputs: Any
    targets: Any
    error: Callable[[Any], jax.Array]


def poisson_problem(
    *, seed: int, widths: Sequence[int] = (64, 64, 48, 48), interior: int = 900, boundary: int = 120
) -> Poisson:
    """A tanh network with Glorot-uniform weights and zero biases; `seed` is of these and of the random points."""
    rng = np.random.default_rng(seed)
    along, side = rng.uniform(size=boundary), rng.integers(4, size=boundary)
    edge = np.stack([np.where(side < 2, along, side - 2), np.where(side < 2, side, along)], axis=1)
    points = {"interior": jnp.float32(rng.uniform(size=(interior, 2))), "boundary": jnp.float32(edge)}
    test = jnp.float32(rng.uniform(size=(9000, 2)))
    params = []
    for inputs, outputs in itertools.pairwise((2, *widths, 1)):
        limit = np.sqrt(6 / (inputs + outputs))
        kernel = jnp.float32(rng.uniform(-limit, limit, (inputs, outputs)))
        params.append({"kernel": kernel, "bias": jnp.zeros(outputs)})

    def network(params: Any, x: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return (x @ params[-1]["kernel"] + params[-1]["bias"])[..., 0]

    def laplacian(params: Any, x: jax.Array) -> jax.Array:
        def second_derivative(direction: jax.Array) -> jax.Array:
            first = lambda x: jax.jvp(functools.partial(network, params), (x,), (direction,))[1]  # noqa: E731
            return jax.jvp(first, (x,), (direction,))[1]

        return jnp.sum(jax.vmap(lambda axis: second_derivative(jnp.broadcast_to(axis, x.shape)))(jnp.eye(2)), axis=0)

    def solution(x: jax.Array) -> jax.Array:
        return jnp.sin(jnp.pi * x[:, 0]) * jnp.sin(jnp.pi * x[:, 1])

    def forward(params: Any, points: Any) -> Any:
        source = 2 * jnp.pi**2 * solution(points["interior"])
        residual = -laplacian(params, points["interior"]) - source
        return {"interior": residual, "boundary": network(params, points["boundary"])}

    def error(params: Any) -> jax.Array:
        return jnp.linalg.norm(network(params, test) - solution(test)) / jnp.linalg.norm(solution(test))

    predictive = tnt_optax.Joint({"interior": tnt_optax.Normal(), "boundary": tnt_optax.Normal()})
    targets = {"interior": jnp.zeros(interior), "boundary": jnp.zeros(boundary)}
    return Poisson(forward, predictive, params, points, targets, jax.jit(error))
