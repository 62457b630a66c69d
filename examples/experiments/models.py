"""The models of the workloads, in Flax NNX."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

Tap = Callable[[jax.Array, jax.Array], jax.Array]
KAIMING_NORMAL = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")


def untapped(x: jax.Array, y: jax.Array) -> jax.Array:
    """The default tap. A tap gets input x and output y of a dense layer, and may replace y (`baselines.kfac`)."""
    del x
    return y


def relu(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 0)  # kfac-jax cannot trace `jax.nn.relu`, which has a derivative rule of its own.


def uniform(key: jax.Array, shape: Sequence[int], dtype: Any, fan_in: int) -> jax.Array:
    """Uniform in +-1/sqrt(fan_in), as in the paper's code, which has the defaults of PyTorch."""
    return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)


class Autoencoder(nnx.Module):
    """A deep autoencoder as in the paper's Section 6.1: ReLU, except for a linear code and a linear output.

    Args:
      pixels: the length of an input and of the output.
      widths: widths of the layers of the encoder, the last of which is the code. The decoder mirrors them.
      rngs: random numbers of the initial parameters.
    """

    def __init__(self, pixels: int, widths: Sequence[int], *, rngs: nnx.Rngs):
        self.code, sizes = len(widths) - 1, [pixels, *widths, *reversed(widths[:-1]), pixels]
        self.layers = nnx.List()
        for n, m in itertools.pairwise(sizes):
            init = functools.partial(uniform, fan_in=n)
            self.layers.append(nnx.Linear(n, m, kernel_init=init, bias_init=init, rngs=rngs))

    def __call__(self, images: jax.Array, tap: Tap = untapped) -> jax.Array:
        x = images
        for index, layer in enumerate(self.layers):
            x = tap(x, layer(x))
            x = x if index in (self.code, len(self.layers) - 1) else relu(x)
        return x


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions. If the shape changes, the shortcut drops pixels and pads channels with zeros."""

    def __init__(self, channels: int, out_channels: int, plain: bool, *, rngs: nnx.Rngs):
        self.padding = out_channels - channels
        self.stride = 2 if self.padding else 1
        self.conv1, self.norm1 = convolution(channels, out_channels, self.stride, plain, rngs)
        self.conv2, self.norm2 = convolution(out_channels, out_channels, 1, plain, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm2(self.conv2(relu(self.norm1(self.conv1(x)))))
        shortcut = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (0, self.padding)))
        return relu(y + shortcut)


class ResNet(nnx.Module):
    """The residual network of the paper's Section 6.2, with BatchNorm; three stages of five blocks are ResNet-32.

    Args:
      blocks: number of blocks in each of the three stages.
      channels: number of channels in the first stage. The next two stages have twice and four times as many.
      classes: the number of logits.
      plain: whether to do without `conv3x3`, whose derivatives kfac-jax cannot trace.
      rngs: random numbers of the initial weights, which are Kaiming normal.
    """

    def __init__(self, blocks: int, channels: int, *, classes: int = 10, plain: bool = False, rngs: nnx.Rngs):
        self.conv, self.norm = convolution(3, channels, 1, plain, rngs)
        widths = [channels, *(width * channels for width in (1, 2, 4) for _ in range(blocks))]
        self.blocks = nnx.List(ResidualBlock(n, m, plain, rngs=rngs) for n, m in itertools.pairwise(widths))
        self.out = nnx.Linear(widths[-1], classes, kernel_init=KAIMING_NORMAL, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = relu(self.norm(self.conv(images)))
        for block in self.blocks:
            x = block(x)
        return self.out(jnp.mean(x, axis=(1, 2)))


def convolution(n: int, m: int, stride: int, plain: bool, rngs: nnx.Rngs) -> tuple[nnx.Conv, nnx.BatchNorm]:
    """A 3x3 convolution, and a BatchNorm with PyTorch's momentum, as in the paper's code."""
    function = (
        lax.conv_general_dilated if plain else lambda x, kernel, strides, *_, **__: conv3x3(x, kernel, strides[0])
    )
    options = {"kernel_init": KAIMING_NORMAL, "conv_general_dilated": function, "rngs": rngs}
    conv = nnx.Conv(n, m, (3, 3), stride, padding=1, use_bias=False, **options)
    return conv, nnx.BatchNorm(m, momentum=0.9, rngs=rngs)


def _conv(x: jax.Array, kernel: jax.Array, padding: tuple[int, int], stride: int = 1, **dilation: Any) -> jax.Array:
    layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), **dilation}
    return lax.conv_general_dilated(x, kernel, (stride, stride), (padding, padding), **layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv3x3(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A 3x3 convolution of square images, padded by 1, whose derivatives are convolutions of the same layout.

    The derivatives of JAX have other layouts. Inside a conditional, in which TNT computes the sampled gradient, XLA
    makes them some twenty times slower on CPU.
    """
    return _conv(x, kernel, (1, 1), stride)


def _conv3x3_backward(stride: int, residuals: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    size, span = x.shape[1], (dy.shape[1] - 1) * stride + 1
    flipped, dilation = lax.rev(kernel, (0, 1)).swapaxes(2, 3), (stride, stride)
    dx = _conv(dy, flipped, (1, size + 1 - span), lhs_dilation=dilation)
    dkernel = _conv(x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 1 + span - size), rhs_dilation=dilation)
    return dx, dkernel.transpose(1, 2, 0, 3)


conv3x3.defvjp(lambda x, kernel, stride: (conv3x3(x, kernel, stride), (x, kernel)), _conv3x3_backward)


class TransformerBlock(nnx.Module):
    """Causal attention and a hidden layer of four times the width, each after a LayerNorm."""

    def __init__(self, width: int, heads: int, dtype: Any, *, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.norm1, self.norm2 = nnx.LayerNorm(width, **options), nnx.LayerNorm(width, **options)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, **options)
        self.hidden, self.out = nnx.Linear(width, 4 * width, **options), nnx.Linear(4 * width, width, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm1(x)
        x = x + self.attention(y, mask=nnx.make_causal_mask(y[..., 0]))
        return x + self.out(jax.nn.gelu(self.hidden(self.norm2(x))))


class Transformer(nnx.Module):
    """A small decoder-only transformer with tied embeddings: tokens (batch, length) -> logits.

    Args:
      vocabulary: the number of tokens.
      width: width of the residual stream.
      layers: number of layers.
      heads: number of attention heads, a divisor of `width`.
      length: length of the longest sequence.
      stacked: whether the parameters of the layers are stacked, under `blocks`. A scan then compiles only one layer.
      dtype: dtype of the parameters and the activations.
      rngs: random numbers of the initial parameters.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        layers: int,
        heads: int,
        length: int,
        *,
        stacked: bool = True,
        dtype: Any,
        rngs: Any,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        init = nnx.initializers.normal(0.02)
        self.embedding, self.positions = (
            nnx.Embed(n, width, embedding_init=init, **options) for n in (vocabulary, length)
        )
        self.stacked, block = stacked, lambda rngs: TransformerBlock(width, heads, dtype, rngs=rngs)
        split = nnx.split_rngs(splits=layers)
        self.blocks: Any = split(nnx.vmap(block))(rngs) if stacked else nnx.List(block(rngs) for _ in range(layers))
        self.norm = nnx.LayerNorm(width, **options)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        if self.stacked:
            x = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)
        for block in () if self.stacked else self.blocks:
            x = block(x)
        return self.embedding.attend(self.norm(x))


def parameter_count(params: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))
