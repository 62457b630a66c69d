"""What the examples train: a model, a distribution of its targets, and data."""

from collections.abc import Sequence
from typing import Any

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
