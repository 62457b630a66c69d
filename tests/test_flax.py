"""Training steps of Flax users: Linen and NNX, with BatchNorm's averages and dropout's keys."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tnt_optax
from tnt_optax import Categorical, TNTState, adaptive_tnt, tnt, value_and_sampled_grad
from tnt_optax.linen import TrainState

HYPERPARAMS = {"damping": 0.1, "statistics_period": 2, "inverse_period": 4, "trust_radius": 0.3}


def data():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(64, 6)).astype(np.float32)
    return jnp.asarray(inputs), jnp.asarray(np.argmax(inputs[:, :3] ** 2, axis=1))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(16)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.relu(x)
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(3)(x)


class BatchNormState(TrainState):
    batch_stats: Any


OPTIMIZERS = {
    "tnt": lambda **kw: tnt(0.05, **{**HYPERPARAMS, **kw}),
    "adaptive_tnt": lambda **kw: adaptive_tnt(optax.linear_schedule(1.0, 0.1, 60), **{**HYPERPARAMS, **kw}),
}


BOTH = ["tnt", pytest.param("adaptive_tnt", marks=pytest.mark.slow)]


@pytest.mark.parametrize("optimizer", BOTH)
def test_linen_with_batch_norm_and_dropout(optimizer):
    inputs, labels = data()
    model = LinenModel()
    variables = model.init(jax.random.key(0), inputs, train=False)
    state = BatchNormState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=OPTIMIZERS[optimizer](),
        batch_stats=variables["batch_stats"],
    )

    @jax.jit
    def train_step(state, inputs, labels, key):
        dropout_key, label_key = jax.random.split(key)

        def forward(params, inputs):
            outputs, updated = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                inputs,
                train=True,
                rngs={"dropout": dropout_key},
                mutable=["batch_stats"],
            )
            return outputs, updated["batch_stats"]

        value_and_grads = value_and_sampled_grad(forward, Categorical(), has_aux=True, scale="fisher")
        (loss, batch_stats), grads, sampled_grads = value_and_grads(state.params, inputs, labels, label_key)
        return state.apply_gradients(grads=grads, sampled_grads=sampled_grads, batch_stats=batch_stats), loss

    losses = []
    for t in range(60):
        state, loss = train_step(state, inputs, labels, jax.random.key(t))
        losses.append(float(loss))
    assert isinstance(state, BatchNormState)
    assert int(state.step) == 60
    assert int(optax.tree.get(state.opt_state, "statistics_count")) == 30
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert not np.allclose(state.batch_stats["BatchNorm_0"]["mean"], 0)


def test_linen_train_state_is_flax_s_own_with_other_optimizers():
    inputs, labels = data()
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), inputs)["params"]
    grads = jax.grad(lambda p: Categorical().loss(model.apply({"params": p}, inputs), labels))(params)
    from flax.training import train_state

    ours = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(0.1))
    theirs = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(0.1))
    after = ours.apply_gradients(grads=grads)
    chex.assert_trees_all_equal(after.params, theirs.apply_gradients(grads=grads).params)
    assert after.tx is ours.tx
    # The sampled gradient of another optimizer is ignored, not an error.
    ours.apply_gradients(grads=grads, sampled_grads=grads)


def test_flax_s_own_train_state_gets_an_error_that_names_ours():
    from flax.training import train_state

    params = {"w": jnp.ones((2, 2))}
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=tnt(0.1))
    with pytest.raises(ValueError, match=r"tnt_optax\.linen\.TrainState"):
        state.apply_gradients(grads=params)


class NNXModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(6, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


@nnx.jit
def nnx_step(model, optimizer, inputs, labels, key):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def forward(params, inputs):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return model(inputs), nnx.state(model, nnx.Not(nnx.Param))

    value_and_grads = value_and_sampled_grad(forward, Categorical(), has_aux=True, scale="fisher")
    (loss, rest), grads, sampled_grads = value_and_grads(params, inputs, labels, key)
    nnx.update(model, rest)
    optimizer.update(model, grads, sampled_grads=sampled_grads)
    return loss


def nnx_problem(optimizer="tnt", **hyperparams):
    model = NNXModel(nnx.Rngs(0))
    tx = OPTIMIZERS[optimizer](**hyperparams)
    return model, tx, nnx.Optimizer(model, tx, wrt=nnx.Param)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nnx_with_batch_norm_and_dropout(name):
    inputs, labels = data()
    model, _, optimizer = nnx_problem(name)
    dropout_count = int(model.dropout.rngs.count[...])
    losses = [float(nnx_step(model, optimizer, inputs, labels, jax.random.key(t))) for t in range(60)]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert not np.allclose(model.norm.mean[...], 0)
    assert int(model.dropout.rngs.count[...]) == dropout_count + 60
    state = optimizer.opt_state[0]
    assert isinstance(state, TNTState)
    assert int(state.statistics_count[...]) == 30


@pytest.mark.parametrize("name", BOTH)
def test_nnx_equals_the_plain_transformation(name):
    inputs, labels = data()
    model, tx, optimizer = nnx_problem(name, views=lambda path, shape: None)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.as_pure(params), nnx.as_pure(rest)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, rest, opt_state, key):
        def forward(params, inputs):
            model = nnx.merge(graphdef, params, rest)
            return model(inputs), nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))

        value_and_grads = value_and_sampled_grad(forward, Categorical(), has_aux=True, scale="fisher")
        (_, rest_after), grads, sampled_grads = value_and_grads(params, inputs, labels, key)
        updates, opt_state = tx.update(grads, opt_state, params, sampled_grads=sampled_grads)
        return optax.apply_updates(params, updates), rest_after, opt_state

    # At the fourth step lambda's ratio is 1.504, and a rounding error decides whether lambda is halved.
    for t in range(4):
        nnx_step(model, optimizer, inputs, labels, jax.random.key(t))
        params, rest, opt_state = step(params, rest, opt_state, jax.random.key(t))
    ours = jax.tree.leaves(nnx.as_pure(nnx.state(model, nnx.Param)))
    # The same float32 program, compiled in two contexts.
    chex.assert_trees_all_close(ours, jax.tree.leaves(params), rtol=1e-3, atol=1e-4)


def test_nnx_warm_start():
    inputs, labels = data()
    model, tx, optimizer = nnx_problem()
    grads = nnx.as_pure(nnx.state(model, nnx.Param))
    warm = tnt_optax.warm_start(tx, nnx.as_pure(optimizer.opt_state), grads, [grads, grads])
    nnx.update(optimizer.opt_state, nnx.state(warm))
    assert int(optimizer.opt_state[0].statistics_count[...]) == 2
    nnx_step(model, optimizer, inputs, labels, jax.random.key(0))
    assert int(optimizer.opt_state[0].statistics_count[...]) == 3
