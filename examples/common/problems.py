"""What the examples train: a model, a distribution of its targets, and data."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import tnt_optax
from common.data import Images
from common.models import Autoencoder
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
