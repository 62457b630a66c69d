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

KAIMING_NORMAL = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")


def uniform_fan_in(key: jax.Array, shape: Sequence[int], dtype: Any, fan_in: int) -> jax.Array:
    """Uniform in +-1/sqrt(fan_in), as PyTorch initializes a linear layer, and so the paper's code."""
    return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)


class Autoencoder(nnx.Module):
    """A deep autoencoder as in the paper's Section 6.1: ReLU, except for a linear code and a linear output.

    Args:
      pixels: the length of an input and of the output.
      widths: of the encoder's layers, the last of which is the code; the decoder mirrors them.
      plain: use no function with a derivative rule of its own, which kfac-jax cannot trace.
      rngs: of the initial parameters.
    """

    def __init__(self, pixels: int, widths: Sequence[int], *, plain: bool = False, rngs: nnx.Rngs):
        self.plain, self.code = plain, len(widths) - 1
        sizes = [pixels, *widths, *reversed(widths[:-1]), pixels]
        inits = [functools.partial(uniform_fan_in, fan_in=n) for n in sizes]
        self.layers = nnx.List(
            nnx.Linear(n, m, kernel_init=init, bias_init=init, rngs=rngs)
            for (n, m), init in zip(itertools.pairwise(sizes), inits, strict=False)
        )

    def __call__(self, images: jax.Array, tap: Callable[..., jax.Array] = lambda x, y: y) -> jax.Array:
        """`tap(input, output)` may replace the output of each layer: `baselines.kfac` needs both."""
        x = images
        for index, layer in enumerate(self.layers):
            x = tap(x, layer(x))
            if index not in (self.code, len(self.layers) - 1):
                x = jnp.maximum(x, 0) if self.plain else jax.nn.relu(x)
        return x


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions; where the shape changes, the shortcut drops pixels and pads channels with zeros."""

    def __init__(self, channels: int, out_channels: int, plain: bool, *, rngs: nnx.Rngs):
        self.plain, self.padding = plain, out_channels - channels
        self.stride = 2 if self.padding else 1
        self.conv1 = convolution(channels, out_channels, self.stride, plain, rngs)
        self.norm1 = batch_norm(out_channels, rngs)
        self.conv2 = convolution(out_channels, out_channels, 1, plain, rngs)
        self.norm2 = batch_norm(out_channels, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        relu = functools.partial(jnp.maximum, 0) if self.plain else jax.nn.relu
        y = relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        shortcut = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (0, self.padding)))
        return relu(y + shortcut)


class ResNet(nnx.Module):
    """The residual network of the paper's Section 6.2, with BatchNorm; three stages of five blocks are ResNet-32.

    Args:
      blocks: in each of the three stages.
      channels: of the first stage; the next two have twice and four times as many.
      classes: the number of logits.
      plain: as in `Autoencoder`.
      rngs: of the initial weights, which are Kaiming normal.
    """

    def __init__(self, blocks: int, channels: int, *, classes: int = 10, plain: bool = False, rngs: nnx.Rngs):
        self.plain = plain
        self.conv, self.norm = convolution(3, channels, 1, plain, rngs), batch_norm(channels, rngs)
        widths = [channels, *(width * channels for width in (1, 2, 4) for _ in range(blocks))]
        self.blocks = nnx.List(ResidualBlock(n, m, plain, rngs=rngs) for n, m in itertools.pairwise(widths))
        self.out = nnx.Linear(widths[-1], classes, kernel_init=KAIMING_NORMAL, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.norm(self.conv(images))
        x = jnp.maximum(x, 0) if self.plain else jax.nn.relu(x)
        for block in self.blocks:
            x = block(x)
        return self.out(jnp.mean(x, axis=(1, 2)))


def batch_norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)  # PyTorch's momentum, as in the paper's code.


def convolution(channels: int, out_channels: int, stride: int, plain: bool, rngs: nnx.Rngs) -> nnx.Conv:
    def convolve(x: jax.Array, kernel: jax.Array, strides: Any, *_: Any, **__: Any) -> jax.Array:
        return conv3x3(x, kernel, strides[0])

    return nnx.Conv(
        channels,
        out_channels,
        (3, 3),
        stride,
        padding=1,
        use_bias=False,
        kernel_init=KAIMING_NORMAL,
        conv_general_dilated=lax.conv_general_dilated if plain else convolve,
        rngs=rngs,
    )


def _conv(x: jax.Array, kernel: jax.Array, padding: tuple[int, int], stride: int = 1, **dilation: Any) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), (padding, padding), dimension_numbers=layout, **dilation
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv3x3(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A 3x3 convolution of square images, padded by 1, whose derivatives are convolutions of the same layout.

    XLA's CPU compiler is some twenty times slower with the layouts of JAX's own derivatives inside a conditional, where
    TNT takes the sampled gradient.
    """
    return _conv(x, kernel, (1, 1), stride)


def _conv3x3_forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, Any]:
    return conv3x3(x, kernel, stride), (x, kernel)


def _conv3x3_backward(stride: int, residuals: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    size, span = x.shape[1], (dy.shape[1] - 1) * stride + 1
    flipped, dilation = lax.rev(kernel, (0, 1)).swapaxes(2, 3), (stride, stride)
    dx = _conv(dy, flipped, (1, size + 1 - span), lhs_dilation=dilation)
    dkernel = _conv(x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 1 + span - size), rhs_dilation=dilation)
    return dx, dkernel.transpose(1, 2, 0, 3)


conv3x3.defvjp(_conv3x3_forward, _conv3x3_backward)


class TransformerBlock(nnx.Module):
    """Causal attention and a hidden layer of four times the width, each after a LayerNorm."""

    def __init__(self, width: int, heads: int, dtype: Any, *, rngs: nnx.Rngs):
        types = {"dtype": dtype, "param_dtype": dtype}
        self.norm1 = nnx.LayerNorm(width, **types, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, **types, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, **types, rngs=rngs)
        self.hidden = nnx.Linear(width, 4 * width, **types, rngs=rngs)
        self.out = nnx.Linear(4 * width, width, **types, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm1(x)
        x = x + self.attention(y, mask=nnx.make_causal_mask(y[..., 0]))
        return x + self.out(jax.nn.gelu(self.hidden(self.norm2(x))))


class Transformer(nnx.Module):
    """A small decoder-only transformer with a tied embedding: tokens (batch, length) -> logits.

    Args:
      vocabulary: the number of tokens.
      width, layers, heads: of the residual stream; `heads` divides `width`.
      length: the longest sequence.
      stacked: stack the layers' parameters, under `blocks`, and scan over them, which compiles one layer only.
      dtype: of the parameters and the activations.
      rngs: of the initial parameters.
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
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.stacked, options = stacked, {"dtype": dtype, "param_dtype": dtype}
        embed = functools.partial(nnx.Embed, features=width, embedding_init=nnx.initializers.normal(0.02), **options)
        self.embedding, self.positions = embed(vocabulary, rngs=rngs), embed(length, rngs=rngs)
        if stacked:
            split = nnx.split_rngs(splits=layers)
            self.blocks: Any = split(nnx.vmap(lambda rngs: TransformerBlock(width, heads, dtype, rngs=rngs)))(rngs)
        else:
            self.blocks = nnx.List(TransformerBlock(width, heads, dtype, rngs=rngs) for _ in range(layers))
        self.norm = nnx.LayerNorm(width, **options, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        if self.stacked:
            x = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)
        else:
            for block in self.blocks:
                x = block(x)
        return self.embedding.attend(self.norm(x))


def parameter_count(params: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))
