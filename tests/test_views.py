"""Views of parameters as tensors: against NumPy's transposition and reshaping, and views made by hand."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import GetAttrKey, keystr, tree_leaves_with_path

from tnt_optax import TensorView, flax_views, tnt
from tnt_optax.blocks import describe
from tnt_optax.views import default_view, resolve_view


def block_of(view, shape):
    return describe(jnp.zeros(shape), lambda path, shape: view, 100)


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
    block = block_of(None, shape)
    assert block.dims == dims
    assert block.batch_shape == ()


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (TensorView(((0,), (1,), (2,), (3,))), lambda x: x),
        (TensorView(((3, 0), (2, 1))), lambda x: x.transpose(3, 0, 2, 1).reshape(5 * 2, 4 * 3)),
        (TensorView(((1, 2), (3,)), batch_axes=(0,)), lambda x: x.reshape(2, 12, 5)),
        (TensorView(((-1,),), batch_axes=(2, 0, 1)), lambda x: x.transpose(2, 0, 1, 3)),
        (TensorView((), batch_axes=(0, 1, 2, 3)), lambda x: x[..., None]),
    ],
)
def test_views_and_back(view, expected):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    block = block_of(view, x.shape)
    tensor = block.to_tensor(jnp.asarray(x))
    np.testing.assert_array_equal(tensor, expected(x))  # A view moves numbers, and computes none.
    chex.assert_shape(tensor, block.batch_shape + block.dims)
    np.testing.assert_array_equal(block.from_tensor(tensor), x)


def test_the_function_gets_path_and_shape_and_none_is_the_default():
    seen = []

    def views(path, shape):
        seen.append((path, shape))

    assert resolve_view(views, ("here",), (2, 3)) == default_view((2, 3))
    assert seen == [(("here",), (2, 3))]


@pytest.mark.parametrize(
    "view",
    [
        TensorView(((0,),)),  # an axis is missing
        TensorView(((0,), (1,), (2,))),  # there is no such axis
        TensorView(((0,), (0, 1))),  # twice
        TensorView(((0,), (1,)), batch_axes=(1,)),
        TensorView(((0,), (-2,), (1,))),  # -2 is 0
        TensorView(((0, 1), ())),  # an empty mode
        TensorView(((0,), (3,))),
    ],
)
def test_views_that_do_not_name_every_axis_once(view):
    with pytest.raises(ValueError, match=r"views: TensorView.*shape \(2, 3\).*exactly once"):
        block_of(view, (2, 3))


@pytest.mark.parametrize("diagonal", [(2,), (-3,), (0, 5)])
def test_diagonal_modes_that_do_not_exist(diagonal):
    with pytest.raises(ValueError, match=r"views: .*diagonal_modes that are indices of the 2 modes, from 0 to 1"):
        block_of(TensorView(((0,), (1,)), diagonal_modes=diagonal), (2, 3))


def test_views_of_a_wrong_type():
    with pytest.raises(TypeError, match=r"expected a tnt_optax.TensorView or None, got tuple"):
        block_of(((0,), (1,)), (2, 3))
    for view in (TensorView((0, 1)), TensorView(((0,), (1,)), diagonal_modes=0), TensorView(((0,), (1,)), ("a",))):
        with pytest.raises(TypeError, match=r"tuple of tuples of axes"):
            block_of(view, (2, 3))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.MultiHeadDotProductAttention(2, qkv_features=6, name="attention")(nn.LayerNorm(name="norm")(x))
        return nn.Conv(4, (3, 3), name="conv")(x), None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 4, name="embed")(tokens)  # (batch, 5, 5, 4)
        stack = nn.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="blocks")(x, None)
        x, _ = LinenBlock(name="block")(x, None)
        return nn.Dense(7, name="out")(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, qkv_features=6, decode=False, rngs=rngs)
        self.conv = nnx.Conv(4, 4, (3, 3), rngs=rngs)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 4, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(NnxBlock))(rngs)
        self.block = NnxBlock(rngs)
        self.out = nnx.Linear(4, 7, rngs=rngs)


def nnx_params(model):
    return nnx.state(nnx.eval_shape(lambda: model(nnx.Rngs(0))), nnx.Param)


PARAMS = {
    "Linen": lambda: jax.eval_shape(LinenModel().init, jax.random.key(0), jnp.zeros((1, 5, 5), int))["params"],
    "nnx.State": lambda: nnx_params(NnxModel),
    "nnx.as_pure": lambda: nnx.as_pure(nnx_params(NnxModel)),
}


# What a linear map from d to e inputs of a layer would have: factors of d and of e, for each layer of a stack.
BLOCK = {
    **{f"attention/{name}/kernel": (4, 6) for name in ("query", "key", "value")},
    **{f"attention/{name}/bias": (6,) for name in ("query", "key", "value")},
    "attention/out/kernel": (6, 4),
    "attention/out/bias": (4,),
    "norm/scale": (4,),
    "norm/bias": (4,),
    "conv/kernel": (9, 4, 4),
    "conv/bias": (4,),
}
EXPECTED = {
    "embed/embedding": [(11,), (4, 4)],  # Longer than max_dim=10, the vocabulary is diagonal.
    "out/kernel": [(4, 4), (7, 7)],
    "out/bias": [(7, 7)],
    **{f"block/{name}": [(d, d) for d in dims] for name, dims in BLOCK.items()},
    **{f"blocks/{name}": [(3, d, d) for d in dims] for name, dims in BLOCK.items()},
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_flax_views_of_real_modules(params):
    params = params()
    tx = tnt(0.1, views=flax_views(stacked=["blocks"]), max_dim=10)
    matrices = jax.tree.structure(params).flatten_up_to(jax.eval_shape(tx.init, params)[0].contractions)
    shapes = {}
    for (path, _), of_one in zip(tree_leaves_with_path(params), matrices, strict=True):
        names = [keystr((key,), simple=True) for key in path if key != GetAttrKey("value")]
        shapes["/".join(names)] = [c.shape for c in of_one]
    assert shapes == EXPECTED


def test_flax_views_of_a_stacked_layer_are_those_of_the_layer_alone():
    # A step of a stack is the steps of its layers.
    rng = np.random.default_rng(0)
    layers = [
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), nnx.as_pure(nnx_params(NnxBlock)))
        for _ in range(3)
    ]
    stacked = {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *layers)}

    @functools.partial(jax.jit, static_argnums=1)
    def updates(grads, views):
        tx = tnt(0.1, damping=0.1, views=views, fisher="empirical")
        return tx.update(grads, tx.init(grads), grads)[0]

    together, alone = updates(stacked, flax_views(("blocks",)))["blocks"], flax_views()
    for i, layer in enumerate(layers):
        # Inverses of float32 matrices with condition numbers of some 100, in another order of operations.
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], together), updates(layer, alone), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("stacked", ["blocks", 3, None, (0,), [("blocks", "attention")]])
def test_flax_views_of_what_are_no_names(stacked):
    with pytest.raises(TypeError, match=r"stacked: expected names of modules.*got"):
        flax_views(stacked)


def test_flax_views_of_a_stacked_scalar():
    params = {"blocks": {"temperature": jnp.float32(1)}}
    with pytest.raises(ValueError, match=r"stacked=\('blocks',\).*\['blocks'\]\['temperature'\] of shape \(\)"):
        tnt(0.1, views=flax_views(("blocks",))).init(params)
    state = tnt(0.1, views=flax_views(("blocks",))).init(jax.tree.map(lambda x: x[None], params))
    assert [c.shape for c in state[0].contractions["blocks"]["temperature"]] == [(1, 1, 1)]
