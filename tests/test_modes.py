"""Views of parameters as tensors: against NumPy's transposition and reshaping, and hand-made Modes."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from tnt_optax import Modes
from tnt_optax.modes import batch_shape, default_modes, from_tensor, mode_dims, resolve, to_tensor


@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((), (1,)),
        ((7,), (7,)),
        ((4, 5), (4, 5)),
        ((3, 4, 5), (3, 4, 5)),
        ((3, 2, 4, 5), (6, 4, 5)),  # HWIO: the spatial axes merge
        ((2, 3, 2, 4, 5), (12, 4, 5)),
        ((0, 3), (0, 3)),
    ],
)
def test_default_view(shape, dims):
    assert mode_dims(default_modes(shape), shape) == dims
    assert batch_shape(default_modes(shape), shape) == ()


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        (Modes(((0,), (1,), (2,), (3,))), lambda x: x),
        (Modes(((3, 0), (2, 1))), lambda x: x.transpose(3, 0, 2, 1).reshape(5 * 2, 4 * 3)),
        (Modes(((1, 2), (3,)), batch=(0,)), lambda x: x.reshape(2, 12, 5)),
        (Modes(((-1,),), batch=(2, 0, 1)), lambda x: x.transpose(2, 0, 1, 3)),
        (Modes((), batch=(0, 1, 2, 3)), lambda x: x[..., None]),
    ],
)
def test_views_and_back(modes, expected):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    resolved = resolve(lambda path, shape: modes, (), x.shape)
    tensor = to_tensor(jnp.asarray(x), resolved)
    np.testing.assert_array_equal(tensor, expected(x))  # A view moves numbers, and computes none.
    chex.assert_shape(tensor, batch_shape(resolved, x.shape) + mode_dims(resolved, x.shape))
    np.testing.assert_array_equal(from_tensor(tensor, resolved, x.shape), x)


def test_modes_function_gets_path_and_shape_and_none_is_the_default():
    seen = []

    def modes(path, shape):
        seen.append((path, shape))

    assert resolve(modes, ("here",), (2, 3)) == default_modes((2, 3))
    assert seen == [(("here",), (2, 3))]


@pytest.mark.parametrize(
    "modes",
    [
        Modes(((0,),)),  # an axis is missing
        Modes(((0,), (1,), (2,))),  # there is no such axis
        Modes(((0,), (0, 1))),  # twice
        Modes(((0,), (1,)), batch=(1,)),
        Modes(((0,), (-2,), (1,))),  # -2 is 0
        Modes(((0, 1), ())),  # an empty group
        Modes(((0,), (3,))),
    ],
)
def test_modes_that_do_not_cover_the_axes(modes):
    with pytest.raises(ValueError, match=r"modes=.*shape \(2, 3\).*exactly once"):
        resolve(lambda path, shape: modes, (), (2, 3))


def test_modes_of_a_wrong_type():
    with pytest.raises(TypeError, match=r"expected a tnt_optax.Modes or None, got tuple"):
        resolve(lambda path, shape: ((0,), (1,)), (), (2, 3))
    with pytest.raises(TypeError, match=r"tuple of tuples of axes"):
        resolve(lambda path, shape: Modes((0, 1)), (), (2, 3))
