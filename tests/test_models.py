"""The convolution of the examples, whose derivatives are written by hand, against those that JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

pytest.importorskip("flax", reason="the examples need the extra `examples`")
from common.models import _convolve


@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("window", "padding"), [(3, 1), (3, 0), (1, 0), (5, 2)])
def test_convolution_and_its_derivatives(size, stride, window, padding):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, size, size, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(window, window, 3, 4)), jnp.float32)

    def plain(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    expected, pullback = jax.vjp(plain, x, kernel)
    ours, our_pullback = jax.vjp(lambda x, kernel: _convolve(x, kernel, stride, padding), x, kernel)
    cotangent = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    # Sums of some 200 products of numbers of size 1, in another order.
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)
    for derivative, of_jax in zip(our_pullback(cotangent), pullback(cotangent), strict=True):
        np.testing.assert_allclose(derivative, of_jax, rtol=1e-5, atol=1e-4)
