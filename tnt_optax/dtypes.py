"""In which precision things are computed."""

from typing import Any

import jax
import jax.numpy as jnp


def float32_or_better(x: Any) -> Any:
    """The dtype for computing with `x`: float32 for narrower floats, else its own."""
    dtype = jnp.result_type(x)
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


def as_float(x: jax.typing.ArrayLike) -> jax.Array:
    """A hyper-parameter, which `optax.inject_hyperparams` may give as an array of any dtype, in float32 or better."""
    return jnp.asarray(x, jnp.result_type(float))


def as_int32(x: jax.typing.ArrayLike) -> jax.Array:
    """A period, for comparison with the state's counters."""
    return jnp.asarray(x, jnp.int32)
