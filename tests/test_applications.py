"""The programs of examples/ for reinforcement learning and quantum mechanics, and what the comparisons make of them."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("typer", reason="the examples need the extra `examples`")

import policy_gradient
import variational_monte_carlo
from experiments import ppo, runner, vmc

import tnt_optax


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax promotes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_the_pole_falls_as_a_pendulum_does():
    """Without a push, the energy of cart and pole is that of the start, up to the error of Euler's method."""

    def energy(state):
        _, speed, angle, rotation = np.asarray(state, float)
        # A cart of 1 kg, and a homogeneous pole of 0.1 kg and 1 m, whose centre is at 0.5 m.
        along, up = speed + 0.5 * rotation * np.cos(angle), -0.5 * rotation * np.sin(angle)
        kinetic = 1.0 * speed**2 / 2 + 0.1 * (along**2 + up**2) / 2 + (0.1 / 12) * rotation**2 / 2
        return kinetic + 0.1 * 9.8 * 0.5 * np.cos(angle)

    state = jnp.array([0.0, 0.2, 0.1, 0.3])
    pushed = [policy_gradient.push_cart(state, jnp.int32(action))[0] for action in (0, 1)]
    middle = (pushed[0] + pushed[1]) / 2  # The acceleration is affine in the force, which is -10 or 10.
    assert abs(energy(middle) - energy(state)) < 1e-3
    work = [energy(new) - energy(state) for new in pushed]
    # The work of a force is the force times the way.
    np.testing.assert_allclose(work, [-10 * 0.02 * 0.2, 10 * 0.02 * 0.2], atol=0.025)
    assert not policy_gradient.push_cart(state, jnp.int32(1))[2]
    assert policy_gradient.push_cart(jnp.array([2.5, 0, 0, 0]), jnp.int32(1))[2]
    assert policy_gradient.push_cart(jnp.array([0, 0, 0.3, 0]), jnp.int32(1))[2]


def test_advantages_are_those_of_the_definition():
    """A sum over the rest of the episode, which ends at the time limit, in float64."""
    environment = policy_gradient.ENVIRONMENTS["cartpole"]._replace(time_limit=3)
    params = policy_gradient.init_params(environment, jax.random.key(0))
    agents = policy_gradient.start(environment, jax.random.key(1))
    _, (observations, targets) = policy_gradient.play(environment, params, agents, jax.random.key(2), steps=6)
    per_agent = jax.tree.map(lambda x: np.asarray(x, float).reshape(6, policy_gradient.AGENTS, *x.shape[1:]), targets)
    values = np.asarray(policy_gradient.forward(environment, params, observations)["value"], float).reshape(6, -1)
    # No pole falls in three steps, so that all episodes are cut off after three.
    for first in (0, 3):
        for agent in range(policy_gradient.AGENTS):
            actions = per_agent["actions"][first : first + 3, agent]
            state = observations.reshape(6, -1, 4)[first + 2, agent]
            last, _, ended = environment.step(state, jnp.int32(actions[2]))
            assert not ended
            after = float(policy_gradient.forward(environment, params, last[None])["value"][0])
            v = np.append(values[first : first + 3, agent], after)
            errors = 1 + 0.99 * v[1:] - v[:-1]
            expected = [sum((0.99 * 0.95) ** (j - i) * errors[j] for j in range(i, 3)) for i in range(3)]
            np.testing.assert_allclose(per_agent["advantages"][first : first + 3, agent], expected, rtol=1e-4)
            np.testing.assert_allclose(per_agent["values"][first : first + 3, agent], expected + v[:-1], rtol=1e-4)


@pytest.mark.parametrize("name", ["cartpole", pytest.param("pendulum", marks=pytest.mark.slow)])
def test_agents_learn(name):
    train = policy_gradient.trainer(policy_gradient.ENVIRONMENTS[name], policy_gradient.natural_gradient())
    returns = [*itertools.islice(train(0), 15)]
    assert np.mean(returns[-3:]) > (100 if name == "cartpole" else -900)  # A random policy: about 20 and -1,200.


def test_actions_that_are_masked():
    """Their logits are -inf: no samples, a finite gradient, and a Fisher matrix without them."""
    kernel, observations = jax.random.normal(jax.random.key(0), (4, 3)), jax.random.normal(jax.random.key(1), (64, 4))
    allowed = jnp.array([True, False, True])

    def forward(params, observations, allowed=allowed):
        return jnp.where(allowed, observations @ params, -jnp.inf)

    actions = tnt_optax.Categorical().sample(jax.random.key(2), forward(kernel, observations))
    assert set(np.unique(actions)) == {0, 2}
    value_and_grads = tnt_optax.value_and_sampled_grad(forward, tnt_optax.Categorical())
    _, grads, sampled_grads = value_and_grads(kernel, observations, actions, jax.random.key(3))
    only = tnt_optax.value_and_sampled_grad(lambda params, x: x @ params, tnt_optax.Categorical())
    _, expected, exact = only(kernel[:, ::2], observations, actions // 2, jax.random.key(3))
    np.testing.assert_allclose(grads[:, ::2], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(grads[:, 1], 0)
    direction = jnp.ones((4, 3))
    products = sampled_grads.fisher_products([direction]), exact.fisher_products([direction[:, ::2]])
    np.testing.assert_allclose(*products, rtol=1e-5, atol=1e-7)
    tx = tnt_optax.adaptive_tnt()
    updates, _ = tx.update(grads, tx.init(kernel), kernel, sampled_grads=sampled_grads)
    assert np.isfinite(updates).all()
    assert np.any(updates[:, 0] != 0)


def test_the_local_energy_of_the_ground_state_is_3_everywhere(monkeypatch):
    """Taut's solution: psi = (1 + r_12) exp(-(r_1^2 + r_2^2) / 2)."""
    monkeypatch.setattr(
        variational_monte_carlo,
        "log_psi",
        lambda params, r: jnp.log1p(jnp.linalg.norm(r[0] - r[1])) - jnp.sum(r**2) / 2,
    )
    walkers = jnp.asarray(np.random.default_rng(0).normal(size=(50, 2, 2)), jnp.float32)
    energies = jax.vmap(variational_monte_carlo.local_energy, (None, 0))(None, walkers)
    np.testing.assert_allclose(energies, 3, rtol=1e-4)  # 1 / r_12, up to 10 or so, cancels in float32.


def test_moves_sample_the_square_of_the_wave_function(monkeypatch):
    """Of a Gaussian, whose squared distance from the origin has a known mean."""
    monkeypatch.setattr(variational_monte_carlo, "log_psi", lambda params, r: -jnp.sum(r**2) / 2)
    walkers = jnp.zeros((4000, 2, 2))
    walkers = variational_monte_carlo.move(None, walkers, jax.random.key(0), moves=300)
    squares = np.sum(np.square(np.asarray(walkers, float)), axis=(1, 2))
    # Four coordinates with the variance 1/2. Their squares have the variance 1/2: five standard errors.
    assert abs(squares.mean() - 2) < 5 * (2 / 4000) ** 0.5


def test_a_walker_that_is_not_finite_is_refused_and_counted():
    def forward(params, walkers):
        values = jnp.log(params["a"] - walkers) * params["b"]  # NaN beyond a.
        return values - jnp.mean(values)

    value_and_grads = tnt_optax.value_and_sampled_grad(
        forward, tnt_optax.Normal(), loss=variational_monte_carlo.surrogate
    )
    tx = variational_monte_carlo.natural_gradient()
    params = {"a": jnp.float32(1.0), "b": jnp.float32(1.0)}
    opt_state, walkers = tx.init(params), jnp.linspace(-1, 0.5, 8)
    for bad in (2.0, 0.25):
        _, grads, sampled_grads = value_and_grads(params, walkers.at[3].set(bad), walkers, jax.random.key(0))
        updates, opt_state = tx.update(grads, opt_state, params, sampled_grads=sampled_grads)
        moved = any(np.any(leaf != 0) for leaf in jax.tree.leaves(updates))
        assert moved == (bad < 1)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
        assert tnt_optax.diagnostics(opt_state)["tnt/rejected_sampled_gradients"] == 1


@pytest.mark.slow
def test_the_energy_falls_to_that_of_the_ground_state():
    tx = variational_monte_carlo.natural_gradient()
    train = variational_monte_carlo.trainer(tx.init, variational_monte_carlo.step_of(tx))
    energies = [float(m.energy) for m in itertools.islice(train(0), 150)]
    assert energies[0] > 3.02
    assert np.mean(energies[-20:]) < 3.01


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), [(ppo, "policy_gradient"), (vmc, "variational_monte_carlo")])
def test_the_comparisons_run(module, name, tmp_path, monkeypatch):
    # So short trainings would widen the grid.
    monkeypatch.setattr(runner, "tune", lambda loss_of, grid, name: min(grid[:2], key=loss_of))
    if module is ppo:
        ppo.main(seeds=2, iterations=4, out=tmp_path)
    else:
        vmc.main(seeds=2, steps=40, out=tmp_path)
    assert name in json.loads((tmp_path / f"{name}.json").read_text())["tables"]
    assert (tmp_path / f"{name}.png").exists()
