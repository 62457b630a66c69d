"""Blocks: what is static about parameters, matrices of one shape in one call, and parts of equal cost."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tnt_optax import TensorView
from tnt_optax.blocks import describe, equal_parts, map_normalized_factors
from tnt_optax.factors import Dense, Diagonal

VIEWS = {
    "stack": TensorView(((2,), (0,)), batch_axes=(3, 1)),
    "vector": TensorView(((0,),), diagonal_modes=(0,)),
    "wide": TensorView(((0,), (1,)), diagonal_modes=(1,)),
}
PARAMS = {
    "stack": np.zeros((4, 3, 2, 5)),
    "vector": np.zeros(6),
    "wide": np.zeros((2, 4)),
    "square": np.zeros((4, 4)),
    "long": np.zeros((30, 2)),
    "half": np.zeros(2, jnp.bfloat16),
}


def views(path, shape):
    return VIEWS.get(path[-1].key)


def blocks():
    return describe(jax.tree.map(jnp.asarray, PARAMS), views, 20)


def random_factors(seed=0):
    rng = np.random.default_rng(seed)

    def positive(shape):
        root = rng.normal(size=(*shape[:-1], 2 * shape[-1]))
        return jnp.asarray(root @ np.swapaxes(root, -1, -2) if len(shape) > 1 else root[: shape[0]] ** 2, jnp.float32)

    return {
        name: tuple(
            positive(s) if isinstance(f, Dense) else jnp.asarray(rng.uniform(0.5, 2, s), jnp.float32)
            for f, s in zip(block.factors, block.factor_shapes, strict=True)
        )
        for name, block in blocks().items()
    }


def test_describe():
    found = blocks()
    assert {name: block.dims for name, block in found.items()} == {
        "stack": (2, 4),
        "vector": (6,),
        "wide": (2, 4),
        "square": (4, 4),
        "long": (30, 2),
        "half": (2,),
    }
    assert found["stack"].batch_shape == (5, 3)
    assert found["stack"].factor_shapes == ((5, 3, 2, 2), (5, 3, 4, 4))
    assert found["vector"].factors == (Diagonal(),)
    assert found["wide"].factors == (Dense(), Diagonal())
    assert found["long"].factors == (Diagonal(), Dense())  # 30 > max_dim
    assert found["half"].dtype == jnp.float32
    assert found["square"].name == "['square']"


def test_costs_are_those_of_the_factors_that_are_kept():
    """A diagonal factor costs d, as its inverse does, whether parts or devices are divided by it."""
    costs = {name: block.inverse_cost for name, block in blocks().items()}
    assert costs == {
        "stack": 15 * (2**3 + 4**3),
        "vector": 6,
        "wide": 2**3 + 4,
        "square": 2 * 4**3,
        "long": 30 + 2**3,
        "half": 2**3,
    }


def test_a_long_diagonal_mode_does_not_fill_a_part():
    params = {"a": jnp.zeros((9000, 2)), **{name: jnp.zeros((30, 30)) for name in "bcd"}}
    parts = equal_parts(jax.tree.leaves(describe(params, None, 8192)), 2)
    assert parts == [slice(0, 3), slice(3, 4)]


@pytest.mark.parametrize("number", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "shapes", [[(3, 3)] * 6, [(0,)], [(3, 3), (0,)], [(0,), (0, 2)], [], [(2,), (20, 20), (2,), (2,)]]
)
def test_parts_are_complete_and_in_order(number, shapes):
    """Also with parameters that cost nothing, wherever they are."""
    leaves = jax.tree.leaves(describe([jnp.zeros(s) for s in shapes], None, 100))
    parts = equal_parts(leaves, number)
    assert len(parts) == number
    assert [block for part in parts for block in leaves[part]] == leaves
    if shapes == [(3, 3)] * 6:
        assert {len(leaves[part]) for part in parts} <= {math.floor(6 / number), math.ceil(6 / number)}


def test_factors_of_one_shape_go_through_one_call():
    """The truth is Eq. (5) of each tensor alone, in float64."""
    leaves, contractions = jax.tree.leaves(blocks()), [random_factors()[name] for name in sorted(PARAMS)]
    calls = []

    def read(factor, matrix):
        calls.append((factor, matrix.shape))
        return {"matrix": matrix, "inverse": factor.inverse(matrix, jnp.float32(0.1))}

    results = map_normalized_factors(read, leaves, contractions)
    # Of dense factors: 2x2 of four parameters, 4x4 of two; of diagonal ones: 6, 4 and 30.
    assert sorted(shape for _, shape in calls) == [(2, 2), (4,), (4, 4), (6,), (30,)]
    for block, of_block, arrays in zip(leaves, results, contractions, strict=True):
        for at in np.ndindex(block.batch_shape):
            for factor, result, c, d in zip(block.factors, of_block, arrays, block.dims, strict=True):
                matrix = as_matrix(factor, c[at])
                # All modes of a tensor have one trace; here each has its own, so that each is a tensor of its own.
                mean_eigenvalue = (np.trace(matrix) / math.prod(block.dims)) ** (1 / len(block.dims))
                u = matrix * mean_eigenvalue * d / np.trace(matrix)
                # A handful of roundings in float32, and inverses of condition number up to 1e3.
                np.testing.assert_allclose(as_matrix(factor, result["matrix"][at]), u, rtol=1e-5)
                inverse = np.linalg.inv(u + 0.1 * np.eye(d))
                np.testing.assert_allclose(as_matrix(factor, result["inverse"][at]), inverse, rtol=1e-3, atol=1e-3)


def as_matrix(factor, array):
    array = np.asarray(array, float)
    return array if isinstance(factor, Dense) else np.diag(array)


def test_to_tensor_and_back():
    x = np.random.default_rng(0).normal(size=(4, 3, 2, 5)).astype(np.float32)
    block = blocks()["stack"]
    tensor = block.to_tensor(jnp.asarray(x))
    np.testing.assert_array_equal(tensor, x.transpose(3, 1, 2, 0))  # A view moves numbers, and computes none.
    np.testing.assert_array_equal(block.from_tensor(tensor), x)


def test_over_batch_maps_over_all_batch_axes():
    block = blocks()["stack"]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3, 2, 4)), jnp.float32)
    chex.assert_trees_all_close(block.over_batch(jnp.sum)(x), jnp.sum(x, axis=(2, 3)), rtol=1e-5)
