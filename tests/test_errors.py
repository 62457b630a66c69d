"""Bad input gets an error that names the argument, what was expected, and what came."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import sampled_grad_of

from tnt_optax import TensorView, adaptive_tnt, diagnostics, scale_by_tnt, tnt

PARAMS = {"layer": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}


@pytest.mark.parametrize("factory", [tnt, scale_by_tnt])
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("damping", 0, ValueError),
        ("damping", 0.0, ValueError),
        ("damping", -0.1, ValueError),
        ("damping", float("nan"), ValueError),
        ("damping", float("inf"), ValueError),
        ("damping", np.float32(-1), ValueError),
        ("damping", "0.1", TypeError),
        ("damping", None, TypeError),
        ("statistics_decay", 1, ValueError),
        ("statistics_decay", 1.0, ValueError),
        ("statistics_decay", -0.1, ValueError),
        ("statistics_decay", float("nan"), ValueError),
        ("momentum", 1.0, ValueError),
        ("momentum", -1e-3, ValueError),
        ("momentum", float("nan"), ValueError),
        ("momentum", 1j, TypeError),
        ("statistics_period", 0, ValueError),
        ("statistics_period", -1, ValueError),
        ("statistics_period", 2.5, ValueError),
        ("statistics_period", float("inf"), ValueError),
        ("statistics_period", True, TypeError),
        ("inverse_period", 0, ValueError),
        ("inverse_period", 2.0, ValueError),
        ("inverse_period", jnp.float32(2), TypeError),
        ("max_dim", 0, ValueError),
        ("inverse_parts", 0, ValueError),
        ("inverse_parts", 1.5, ValueError),
        ("damping", jnp.ones(3), TypeError),
        ("statistics_period", np.array([1, 2]), TypeError),
        ("trust_radius", 0.0, ValueError),
        ("trust_radius", float("nan"), ValueError),
        ("fisher", "true", ValueError),
        ("fisher", None, ValueError),
        ("views", TensorView(((0,),)), TypeError),
    ],
)
def test_hyperparameters(factory, name, value, error):
    with pytest.raises(error, match=f"^{name}: expected"):
        factory(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("learning_rate", float("nan"), ValueError),
        ("learning_rate", "fast", TypeError),
        ("learning_rate", jnp.ones(3), TypeError),
        ("weight_decay", -1.0, ValueError),
        ("weight_decay", np.float32(-1), ValueError),
        ("weight_decay", float("inf"), ValueError),
        ("weight_decay", None, TypeError),
    ],
)
@pytest.mark.parametrize("factory", [tnt, adaptive_tnt])
def test_hyperparameters_of_tnt_alone(factory, name, value, error):
    with pytest.raises(error, match=f"^{name}: expected"):
        factory(**{name: value})
    with pytest.raises(ValueError, match=r"^trust_radius: expected"):
        tnt(0.1, trust_radius=-1.0)


def test_a_negative_factor_of_the_step():
    with pytest.raises(ValueError, match=r"^learning_rate: expected a number in \[0, inf\), got -1"):
        adaptive_tnt(-1.0)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), jnp.float32(0.5)])
def test_numbers_of_every_kind_are_taken(value):
    tx = tnt(value, damping=value, statistics_decay=value, momentum=value, weight_decay=value, trust_radius=value)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, sampled_grads=PARAMS)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
    period = np.array(2) if isinstance(value, np.ndarray) else type(value)(2) if isinstance(value, float) else 2
    if not isinstance(period, float):
        tnt(statistics_period=period, inverse_period=np.int64(3))


def test_numbers_under_tracing_are_not_validated():
    def update(damping):
        tx = tnt(0.1, damping=damping)
        return tx.update(PARAMS, tx.init(PARAMS), PARAMS, sampled_grads=PARAMS)[0]

    jax.jit(update)(-1.0)
    jax.jit(update)(0)


def update(sampled_grads, grads=PARAMS, wrap=lambda tree: tree):
    tx = tnt(0.1)
    jax.jit(lambda g, s: tx.update(g, tx.init(g), g, sampled_grads=wrap(s)))(grads, sampled_grads)


def test_missing_sampled_grads_names_the_helper_and_never_falls_back():
    tx = tnt(0.1)
    with pytest.raises(ValueError, match=r"sampled_grads: .*value_and_sampled_grad.*fisher='empirical'"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), tnt(0.1))
    with pytest.raises(ValueError, match="sampled_grads"):
        clipped.update(PARAMS, clipped.init(PARAMS), PARAMS)


BAD_TREES = {
    "missing": (
        {"layer": {"kernel": jnp.ones((3, 4))}},
        r"sampled_grads: .*missing: sampled_grads\['layer'\]\['bias'\]",
    ),
    "surplus": (
        {"layer": {**PARAMS["layer"], "scale": jnp.ones(4)}},
        r"not expected: sampled_grads\['layer'\]\['scale'\]",
    ),
    "other container": (
        {"layer": [jnp.ones((3, 4)), jnp.ones(4)]},
        r"missing: sampled_grads\['layer'\]\['bias'\]",
    ),
    "subtree": (
        {"layer": {"kernel": {"a": jnp.ones((3, 4)), "b": jnp.ones(1)}, "bias": jnp.ones(4)}},
        r"sampled_grads\['layer'\]\['kernel'\]: expected one array.*got 2 arrays",
    ),
    "none": (
        {"layer": {"kernel": None, "bias": jnp.ones(4)}},
        r"sampled_grads\['layer'\]\['kernel'\]: expected one array.*got 0 arrays",
    ),
    "transposed": (
        {"layer": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(4)}},
        r"sampled_grads\['layer'\]\['kernel'\]: expected the shape \(3, 4\) of the gradients, got \(4, 3\)",
    ),
    "a batch axis": (
        {"layer": {"kernel": jnp.ones((7, 3, 4)), "bias": jnp.ones((7, 4))}},
        r"sampled_grads\['layer'\]\['bias'\]: .*\(4,\) of the gradients, got \(7, 4\)",
    ),
    "array": (jnp.ones(3), "sampled_grads: expected the structure of the gradients"),
    "tuple": ((PARAMS, PARAMS), "sampled_grads: expected the structure of the gradients"),
}


@pytest.mark.parametrize("name", BAD_TREES)
@pytest.mark.parametrize("lazy", [False, True])
def test_sampled_grads_that_do_not_fit(name, lazy):
    tree, message = BAD_TREES[name]
    with pytest.raises(ValueError, match=message):
        update(tree, wrap=(lambda t: lambda: t) if lazy else lambda t: t)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
@pytest.mark.parametrize("factory", [tnt, scale_by_tnt])
def test_parameters_that_are_not_real_and_floating(factory, dtype):
    params = {"layer": {**PARAMS["layer"], "w": jnp.ones(3, dtype)}}
    tx = factory()
    with pytest.raises(TypeError, match=rf"params\['layer'\]\['w'\]: .*{jnp.dtype(dtype)}"):
        tx.init(params)
    state = tx.init({"layer": {**PARAMS["layer"], "w": jnp.ones(3)}})
    with pytest.raises(TypeError, match=rf"updates\['layer'\]\['w'\]: .*{jnp.dtype(dtype)}"):
        tx.update(params, state, sampled_grads=params)


def test_modes_that_do_not_fit_name_the_parameter():
    tx = tnt(0.1, views=lambda path, shape: TensorView(((0,),)))
    with pytest.raises(ValueError, match=r"views: .*\['layer'\]\['kernel'\] of shape \(3, 4\)"):
        tx.init(PARAMS)


@pytest.mark.parametrize("name", ["inverse_parts", "max_dim"])
def test_static_numbers_of_inject_hyperparams(name):
    injected = optax.inject_hyperparams(tnt)
    with pytest.raises(TypeError, match=rf"{name}: expected a Python integer, got an array.*static_args"):
        injected(0.1, **{name: 2}).init(PARAMS)
    optax.inject_hyperparams(tnt, static_args=name)(0.1, **{name: 2}).init(PARAMS)


def test_gradients_that_do_not_fit_the_state_are_blamed_themselves():
    tx = tnt(0.1)
    state = tx.init(PARAMS)
    transposed = {"layer": {**PARAMS["layer"], "kernel": jnp.ones((4, 3))}}
    with pytest.raises(ValueError, match=r"updates\['layer'\]\['kernel'\]: .*\(3, 4\) of the optimizer's state"):
        tx.update(transposed, state, PARAMS, sampled_grads=transposed)
    with pytest.raises(ValueError, match=r"updates: .*missing: updates\['layer'\]\['bias'\]"):
        tx.update({"layer": {"kernel": jnp.ones((3, 4))}}, state, PARAMS, sampled_grads=PARAMS)


class FirstEdition(NamedTuple):
    """The state of version 0.1."""

    count: jax.Array
    statistics_count: jax.Array
    momentum: dict
    contractions: dict
    inverses: dict


@pytest.mark.parametrize("factory", [tnt, scale_by_tnt, adaptive_tnt])
@pytest.mark.parametrize("kind", ["first edition", "tuple", "dict", "adam", "none"])
def test_the_state_of_another_optimizer(factory, kind):
    new = scale_by_tnt().init(PARAMS)
    first = FirstEdition(*new[:5])
    others = {
        "first edition": first if factory is scale_by_tnt else (first, (), (), ()),
        "tuple": tuple(new),
        "dict": first._asdict(),
        "adam": optax.adam(0.1).init(PARAMS),
        "none": None,
    }
    with pytest.raises(TypeError, match=r"state: expected a TNTState.*got .*tnt_optax 0\.1.*tx\.init"):
        factory().update(PARAMS, others[kind], PARAMS, sampled_grads=sampled_grad_of(PARAMS))
    with pytest.raises(ValueError, match=r"opt_state: expected a TNTState.*tnt_optax 0\.1"):
        diagnostics(others[kind])


@pytest.mark.parametrize("leaf", [1.0, "x"])
def test_leaves_that_are_no_arrays(leaf):
    with pytest.raises(TypeError, match=r"params\['a'\]: expected a real floating-point array, got"):
        tnt(0.1).init({"a": leaf})
