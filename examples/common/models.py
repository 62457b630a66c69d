"""The models of the examples, in Flax NNX."""

import itertools
import math
from collections.abc import Sequence

import jax
from flax import nnx


def _uniform(fan_in: int) -> nnx.Initializer:
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=None, **_: jax.random.uniform(key, shape, dtype, -bound, bound)


class Autoencoder(nnx.Module):
    """A deep autoencoder as in the paper's Section 6: ReLU, but for a linear code and a linear output.

    Args:
      pixels: the length of an input and of the output, logits of its pixels.
      widths: of the encoder's layers, the last of which is the code; the decoder mirrors them.
      rngs: weights and biases are uniform in +-1/sqrt(fan_in).
    """

    def __init__(self, pixels: int, widths: Sequence[int], *, rngs: nnx.Rngs):
        sizes = [pixels, *widths, *reversed(widths[:-1]), pixels]
        self.code = len(widths) - 1
        self.layers = nnx.List(
            nnx.Linear(n, m, kernel_init=_uniform(n), bias_init=_uniform(n), rngs=rngs)
            for n, m in itertools.pairwise(sizes)
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index not in (self.code, len(self.layers) - 1):
                x = jax.nn.relu(x)
        return x
