"""The models of the examples, in Flax NNX."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
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
        self.norm1 = _batch_norm(out_channels, rngs)
        self.conv2 = _convolution(out_channels, out_channels, 1, plain, rngs)
        self.norm2 = _batch_norm(out_channels, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.activation(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        shortcut = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (0, self.padding)))
        return self.activation(y + shortcut)


class ResNet32(nnx.Module):
    """The residual network of the paper's Section 6.2, for images of 32x32: three stages of five blocks.

    Args:
      classes: how many.
      channels: of the first stage; the next two have twice and four times as many.
      blocks: in a stage; fewer of them make a smaller network.
      plain: without rules for derivatives, which some libraries can't trace.
      rngs: of the initial weights, which are Kaiming normal (He et al., 2015); the output's bias is zero.
    """

    def __init__(self, classes: int = 10, *, channels: int = 16, blocks: int = 5, plain: bool = False, rngs: nnx.Rngs):
        self.activation = _relu(plain)
        self.conv = _convolution(3, channels, 1, plain, rngs)
        self.norm = _batch_norm(channels, rngs)
        widths = [channels, *(width * channels for width in (1, 2, 4) for _ in range(blocks))]
        self.blocks = nnx.List(_Block(n, m, plain, rngs=rngs) for n, m in itertools.pairwise(widths))
        self.out = nnx.Linear(widths[-1], classes, kernel_init=_KAIMING_NORMAL, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.activation(self.norm(self.conv(images)))
        for block in self.blocks:
            x = block(x)
        return self.out(jnp.mean(x, axis=(1, 2)))


class VGG16(nnx.Module):
    """The network of the paper's Section 6.2 for CIFAR-100, for images of 32x32: VGG16 with BatchNorm, no dropout.

    Args:
      classes: how many.
      width_divisor: makes all 15 hidden layers so many times narrower.
      rngs: of the initial weights. Those of a convolution are N(0, 2 / (9 out_channels)), as in the paper's code; those
        of a linear layer are uniform in +-1/sqrt(fan_in). Biases are zero.
    """

    def __init__(self, classes: int = 100, *, width_divisor: int = 1, rngs: nnx.Rngs):
        stages = [[width // width_divisor] * depth for width, depth in _VGG16_STAGES]
        widths = [3, *itertools.chain(*stages)]
        # The image is halved after every stage.
        self.ends = [end - 1 for end in itertools.accumulate(map(len, stages))]
        self.convs = nnx.List(
            _convolution(n, m, 1, False, rngs, use_bias=True, kernel_init=_FAN_OUT_NORMAL)
            for n, m in itertools.pairwise(widths)
        )
        self.norms = nnx.List(_batch_norm(width, rngs) for width in widths[1:])
        hidden = 4096 // width_divisor
        self.layers = nnx.List(
            nnx.Linear(n, m, kernel_init=_uniform(n), rngs=rngs)
            for n, m in itertools.pairwise([widths[-1], hidden, hidden, classes])
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = jax.nn.relu(norm(conv(x)))
            if index in self.ends:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)  # One pixel is left.
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


_VGG16_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # width, number of convolutions
_KAIMING_NORMAL = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")
_FAN_OUT_NORMAL = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def _batch_norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    # The averages for evaluation forget as fast as PyTorch's, which the paper used.
    return nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)


def _convolution(
    channels: int,
    out_channels: int,
    stride: int,
    plain: bool,
    rngs: nnx.Rngs,
    *,
    use_bias: bool = False,
    kernel_init: nnx.Initializer = _KAIMING_NORMAL,
) -> nnx.Conv:
    def convolve(x: jax.Array, kernel: jax.Array, strides: Any, *_: Any, **__: Any) -> jax.Array:
        return _convolve(x, kernel, strides[0], 1)

    return nnx.Conv(
        channels,
        out_channels,
        (3, 3),
        stride,
        padding=1,
        use_bias=use_bias,
        kernel_init=kernel_init,
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
    def __init__(self, width: int, heads: int | None = None, dtype: Any = jnp.float32, *, rngs: nnx.Rngs):
        types = {"dtype": dtype, "param_dtype": dtype}
        self.norm1 = nnx.LayerNorm(width, **types, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads or width // 64, width, decode=False, **types, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, **types, rngs=rngs)
        self.hidden = nnx.Linear(width, 4 * width, **types, rngs=rngs)
        self.out = nnx.Linear(4 * width, width, **types, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm1(x)
        x = x + self.attention(y, mask=nnx.make_causal_mask(y[..., 0]))
        return x + self.out(jax.nn.gelu(self.hidden(self.norm2(x))))


class StackedTransformer(nnx.Module):
    """The same, but the parameters of the layers are stacked, under `blocks`, and a scan runs them: compiled once.

    Args:
      vocabulary: how many tokens there are.
      width: of the residual stream; the hidden layer has four times the width.
      layers: how many.
      heads: of attention; they divide the width.
      length: the longest sequence.
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
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        types = {"dtype": dtype, "param_dtype": dtype}
        small = nnx.initializers.normal(0.02)
        self.embedding = nnx.Embed(vocabulary, width, embedding_init=small, **types, rngs=rngs)
        self.positions = nnx.Embed(length, width, embedding_init=small, **types, rngs=rngs)

        @nnx.split_rngs(splits=layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> _Layer:
            return _Layer(width, heads, dtype, rngs=rngs)

        self.blocks = stack(rngs)
        self.norm = nnx.LayerNorm(width, **types, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block: _Layer, x: jax.Array) -> jax.Array:
            return block(x)

        x = self.embedding(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        return self.embedding.attend(self.norm(run(self.blocks, x)))


Shapes = Mapping[str, Sequence[tuple[int, ...]]]


def gpt2(vocabulary: int = 50257, width: int = 768, layers: int = 12, positions: int = 1024) -> Shapes:
    """The shapes of GPT-2's 124M parameters by kind; the output layer is the embedding, q, k and v are one matrix."""
    hidden = 4 * width
    return {
        "embeddings": [(vocabulary, width), (positions, width)],
        "matrices": layers * [(width, 3 * width), (width, width), (width, hidden), (hidden, width)],
        # Of each layer: four biases, and scale and shift of two norms. And the last norm.
        "vectors": layers * [(3 * width,), (width,), (hidden,), (width,), *[(width,)] * 4] + [(width,)] * 2,
    }
