"""The models of the examples, in Flax NNX."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


def _relu(plain: bool) -> Callable[[jax.Array], jax.Array]:
    return (lambda x: jnp.maximum(x, 0)) if plain else jax.nn.relu


def _uniform(fan_in: int) -> nnx.Initializer:
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=None, **_: jax.random.uniform(key, shape, dtype, -bound, bound)


class Autoencoder(nnx.Module):
    """A deep autoencoder as in the paper's Section 6: ReLU, but for a linear code and a linear output.

    Args:
      pixels: the length of an input and of the output, logits of its pixels.
      widths: of the encoder's layers, the last of which is the code; the decoder mirrors them.
      plain: without rules for derivatives, which some libraries can't trace.
      rngs: weights and biases are uniform in +-1/sqrt(fan_in).
    """

    def __init__(
        self,
        pixels: int,
        widths: Sequence[int],
        *,
        plain: bool = False,
        rngs: nnx.Rngs,
    ):
        self.activation = _relu(plain)
        sizes = [pixels, *widths, *reversed(widths[:-1]), pixels]
        self.code = len(widths) - 1
        self.layers = nnx.List(
            nnx.Linear(n, m, kernel_init=_uniform(n), bias_init=_uniform(n), rngs=rngs)
            for n, m in itertools.pairwise(sizes)
        )

    def __call__(self, images: jax.Array, tap: Callable[..., jax.Array] = lambda x, y: y) -> jax.Array:
        """`tap(x, y)`, given each layer's input and output, may replace the output: for KFAC."""
        x = images
        for index, layer in enumerate(self.layers):
            x = tap(x, layer(x))
            if index not in (self.code, len(self.layers) - 1):
                x = self.activation(x)
        return x


class _Block(nnx.Module):
    """Two 3x3 convolutions; where the shape changes, the shortcut drops pixels and pads channels with zeros."""

    def __init__(self, channels: int, out_channels: int, plain: bool, *, rngs: nnx.Rngs):
        self.activation = _relu(plain)
        self.stride = 1 if channels == out_channels else 2
        self.padding = out_channels - channels
        self.conv1 = _convolution(channels, out_channels, self.stride, plain, rngs)
        self.norm1 = nnx.BatchNorm(out_channels, rngs=rngs)
        self.conv2 = _convolution(out_channels, out_channels, 1, plain, rngs)
        self.norm2 = nnx.BatchNorm(out_channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.activation(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        shortcut = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (0, self.padding)))
        return self.activation(y + shortcut)


class ResNet32(nnx.Module):
    """The residual network of the paper's Section 6, for images of 32x32: three stages of five blocks.

    Args:
      classes: how many.
      plain: without rules for derivatives, which some libraries can't trace.
      rngs: of the initial parameters.
    """

    def __init__(self, classes: int = 10, *, plain: bool = False, rngs: nnx.Rngs):
        self.activation = _relu(plain)
        self.conv = _convolution(3, 16, 1, plain, rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        channels = [16, *(width for width in (16, 32, 64) for _ in range(5))]
        self.blocks = nnx.List(_Block(n, m, plain, rngs=rngs) for n, m in itertools.pairwise(channels))
        self.out = nnx.Linear(64, classes, kernel_init=nnx.initializers.he_normal(), rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.activation(self.norm(self.conv(images)))
        for block in self.blocks:
            x = block(x)
        return self.out(jnp.mean(x, axis=(1, 2)))


def _convolution(channels: int, out_channels: int, stride: int, plain: bool, rngs: nnx.Rngs) -> nnx.Conv:
    def convolve(x: jax.Array, kernel: jax.Array, strides: Any, *_: Any, **__: Any) -> jax.Array:
        return _convolve(x, kernel, strides[0], 1)

    return nnx.Conv(
        channels,
        out_channels,
        (3, 3),
        stride,
        padding=1,
        use_bias=False,
        kernel_init=nnx.initializers.he_normal(),
        conv_general_dilated=lax.conv_general_dilated if plain else convolve,
        rngs=rngs,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """A convolution of square images and kernels, whose derivatives are convolutions of the same layout.

    XLA's CPU compiler brings those of other layouts, such as JAX derives, into this one only outside of conditionals;
    inside, where TNT takes the sampled gradient, they are some twenty times slower.
    """
    return _conv(x, kernel, (padding, padding), strides=stride)


def _convolve_forward(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> tuple[jax.Array, Any]:
    return _convolve(x, kernel, stride, padding), (x, kernel)


def _convolve_backward(stride: int, padding: int, residuals: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    size, k, span = x.shape[1], len(kernel), (dy.shape[1] - 1) * stride + 1
    low = k - 1 - padding
    dx = _conv(dy, lax.rev(kernel, (0, 1)).swapaxes(2, 3), (low, size + k - 1 - span - low), lhs_dilation=stride)
    high = k - 1 + span - size - padding
    dkernel = _conv(x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (padding, high), rhs_dilation=stride)
    return dx, dkernel.transpose(1, 2, 0, 3)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _conv(
    x: jax.Array,
    kernel: jax.Array,
    padding: tuple[int, int],
    *,
    strides: int = 1,
    lhs_dilation: int = 1,
    rhs_dilation: int = 1,
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        (padding, padding),
        (lhs_dilation, lhs_dilation),
        (rhs_dilation, rhs_dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class Transformer(nnx.Module):
    """A small decoder-only transformer with a tied embedding: tokens (batch, length) -> logits.

    Args:
      vocabulary: how many tokens there are.
      width: of the residual stream; attention heads have 64 elements, the hidden layer has four times the width.
      layers: how many.
      length: the longest sequence.
      rngs: of the initial parameters.
    """

    def __init__(self, vocabulary: int, width: int, layers: int, length: int, *, rngs: nnx.Rngs):
        small = nnx.initializers.normal(0.02)
        self.embedding = nnx.Embed(vocabulary, width, embedding_init=small, rngs=rngs)
        self.positions = nnx.Embed(length, width, embedding_init=small, rngs=rngs)
        self.layers = nnx.List(_Layer(width, rngs=rngs) for _ in range(layers))
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.embedding.attend(self.norm(x))


class _Layer(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(width // 64, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.hidden = nnx.Linear(width, 4 * width, rngs=rngs)
        self.out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm1(x)
        x = x + self.attention(y, mask=nnx.make_causal_mask(y[..., 0]))
        return x + self.out(jax.nn.gelu(self.hidden(self.norm2(x))))
