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


def autoencoder_problem(images: Images, widths: Sequence[int], batch_size: int, *, seed: int) -> Problem:
    """An autoencoder of images in [0, 1], whose pixels are Bernoulli variables; the loss is summed over them.

    Args:
      images: what is trained and tested on.
      widths: of the encoder's layers, the code's last.
      batch_size: images a step.
      seed: of the initial parameters.
    """
    train, test = jnp.asarray(images.train), jnp.asarray(images.test)
    pixels = train.shape[1]
    graphdef, params = nnx.split(Autoencoder(pixels, widths, rngs=nnx.Rngs(seed)))

    def forward(params: Any, inputs: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(inputs)

    sizes = "-".join(map(str, [pixels, *widths, *list(widths)[-2::-1], pixels]))
    return Problem(
        name=f"Autoencoder {sizes}",
        forward=forward,
        predictive=tnt_optax.Bernoulli(),
        params=nnx.as_pure(params),
        train=(train, train),
        test=(test, test),
        batch_size=batch_size,
    )
