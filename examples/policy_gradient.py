"""Proximal policy optimization (PPO) in plain JAX, with TNT in the place of Adam.

The agent balances a pole (two actions, a categorical policy), or swings a pendulum up (a continuous action, a normal
policy with a learned variance): `python policy_gradient.py cartpole` or `python policy_gradient.py pendulum`.

The gradient is that of PPO's clipped surrogate (`loss=`), and the Fisher matrix is that of the policy. `trust_radius`
limits the KL divergence between the policies before and after a step, to second order: a step is a natural policy
gradient with the constraint of TRPO. The surrogate says nothing about the length of a step, so that the damping of the
policy's quadratic model is fixed (`adaptive_damping=False`). The value function is a regression, with the defaults.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import tnt_optax

AGENTS, DISCOUNT, TRACE_DECAY, CLIP = 16, 0.99, 0.95, 0.2


class Environment(NamedTuple):
    """An environment for one agent.

    Attributes:
      reset: key -> state.
      observe: state -> observation (features,).
      step: (state, action) -> (state, reward, whether the episode ends).
      time_limit: number of steps after which an episode is cut off.
      policy: the distribution of the actions, with the methods `loss` (the negative log-likelihood) and `sample`.
      outputs: number of outputs of the policy network.
      head: outputs of the policy network and log-variance -> outputs of `policy`.
      unit: the rewards are divided by it for the value function.
    """

    reset: Callable[[jax.Array], jax.Array]
    observe: Callable[[jax.Array], jax.Array]
    step: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
    time_limit: int
    policy: Any
    outputs: int
    head: Callable[[jax.Array, jax.Array], Any]
    unit: float = 1.0


def push_cart(state: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """CartPole-v1 of Gymnasium: a reward of 1 for each step in which the pole is up."""
    _, speed, angle, rotation = state
    force, sin, cos = jnp.where(action == 1, 10.0, -10.0), jnp.sin(angle), jnp.cos(angle)
    push = (force + 0.05 * rotation**2 * sin) / 1.1
    angular = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    linear = push - 0.05 * angular * cos / 1.1
    new = state + 0.02 * jnp.stack([speed, linear, rotation, angular])
    return new, jnp.ones(()), (jnp.abs(new[0]) > 2.4) | (jnp.abs(new[2]) > jnp.pi / 15)


def turn_pendulum(state: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pendulum-v1 of Gymnasium: the reward is 0 if the pendulum is up and at rest, and negative elsewhere."""
    (angle, rotation), torque = state, jnp.clip(action[0], -2, 2)
    distance = jnp.mod(angle + jnp.pi, 2 * jnp.pi) - jnp.pi
    reward = -(distance**2 + 0.1 * rotation**2 + 0.001 * torque**2)
    rotation = jnp.clip(rotation + 0.05 * (15 * jnp.sin(angle) + 3 * torque), -8, 8)
    return jnp.stack([angle + 0.05 * rotation, rotation]), reward, jnp.bool_(False)


ENVIRONMENTS = {
    "cartpole": Environment(
        reset=lambda key: jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05),
        observe=lambda state: state,
        step=push_cart,
        time_limit=500,
        policy=tnt_optax.Categorical(),
        outputs=2,
        head=lambda logits, _: logits,
    ),
    "pendulum": Environment(
        reset=lambda key: jax.random.uniform(key, (2,), minval=-1, maxval=1) * jnp.array([jnp.pi, 1]),
        observe=lambda state: jnp.stack([jnp.cos(state[0]), jnp.sin(state[0]), state[1] / 8]),
        step=turn_pendulum,
        time_limit=200,
        policy=tnt_optax.DiagonalNormal(),
        outputs=1,
        head=lambda mean, log_variance: {"mean": mean, "log_variance": jnp.broadcast_to(log_variance, mean.shape)},
        unit=10.0,
    ),
}


def init_params(environment: Environment, key: jax.Array) -> Any:
    """Two networks with two hidden layers of 64 units, and the log-variance of the actions."""
    features = environment.observe(environment.reset(key)).size

    def network(key: jax.Array, outputs: int, scale: float) -> Any:
        shapes, scales = [(features, 64), (64, 64), (64, outputs)], [2**0.5, 2**0.5, scale]
        keys = jax.random.split(key, len(shapes))
        return [
            {"kernel": jax.nn.initializers.orthogonal(s)(k, shape), "bias": jnp.zeros(shape[1])}
            for k, shape, s in zip(keys, shapes, scales, strict=True)
        ]

    of_policy, of_value = jax.random.split(key)
    policy = {"layers": network(of_policy, environment.outputs, 0.01), "log_variance": jnp.zeros(environment.outputs)}
    return {"policy": policy, "value": network(of_value, 1, 1.0)}


def dense(layers: Any, x: jax.Array) -> jax.Array:
    *hidden, last = layers
    for layer in hidden:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def forward(environment: Environment, params: Any, observations: jax.Array) -> dict[str, Any]:
    """The outputs of both networks for observations (batch, features)."""
    policy = environment.head(dense(params["policy"]["layers"], observations), params["policy"]["log_variance"])
    return {"policy": policy, "value": dense(params["value"], observations)[:, 0]}


def log_probabilities(environment: Environment, outputs: Any, actions: jax.Array) -> jax.Array:
    """The log-likelihood (batch,) of the actions, up to a constant."""

    def of_one(output: Any, action: jax.Array) -> jax.Array:
        return -environment.policy.loss(*jax.tree.map(lambda x: x[None], (output, action)))

    return jax.vmap(of_one)(outputs, actions)


class Agents(NamedTuple):
    """The state of the agents. `returns` has the return of the last whole episode of each."""

    states: jax.Array
    steps: jax.Array
    rewards: jax.Array
    returns: jax.Array


def start(environment: Environment, key: jax.Array) -> Agents:
    states = jax.vmap(environment.reset)(jax.random.split(key, AGENTS))
    return Agents(states, jnp.zeros(AGENTS, jnp.int32), jnp.zeros(AGENTS), jnp.full(AGENTS, jnp.nan))


def play(environment: Environment, params: Any, agents: Agents, key: jax.Array, steps: int) -> tuple[Agents, Any]:
    """Plays `steps` steps with all agents, and returns a batch of observations and targets, with advantages."""

    def values(states: jax.Array) -> jax.Array:
        return forward(environment, params, jax.vmap(environment.observe)(states))["value"]

    def step(agents: Agents, key: jax.Array) -> tuple[Agents, Any]:
        of_actions, of_resets = jax.random.split(key)
        observations = jax.vmap(environment.observe)(agents.states)
        outputs = forward(environment, params, observations)
        actions = environment.policy.sample(of_actions, outputs["policy"])
        states, rewards, ended = jax.vmap(environment.step)(agents.states, actions)
        count, total = agents.steps + 1, agents.rewards + rewards
        over = ended | (count >= environment.time_limit)
        # An episode that is cut off would have gone on: its last state has a value.
        next_values = jnp.where(ended, 0, values(states))
        errors = rewards / environment.unit + DISCOUNT * next_values - outputs["value"]
        new_states = jax.vmap(environment.reset)(jax.random.split(of_resets, AGENTS))
        new = Agents(
            jnp.where(over[:, None], new_states, states),
            jnp.where(over, 0, count),
            jnp.where(over, 0, total),
            jnp.where(over, total, agents.returns),
        )
        before = log_probabilities(environment, outputs["policy"], actions)
        targets = {"actions": actions, "before": before, "values": outputs["value"]}
        return new, (observations, targets, errors, over)

    agents, (observations, targets, errors, over) = jax.lax.scan(step, agents, jax.random.split(key, steps))

    def accumulate(advantage: jax.Array, at_step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        error, over = at_step
        advantage = error + DISCOUNT * TRACE_DECAY * jnp.where(over, 0, advantage)
        return advantage, advantage

    _, advantages = jax.lax.scan(accumulate, jnp.zeros(AGENTS), (errors, over), reverse=True)
    targets |= {"advantages": advantages, "values": targets["values"] + advantages}
    return agents, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (observations, targets))


def surrogate(environment: Environment, outputs: Any, targets: Any) -> jax.Array:
    """PPO's clipped surrogate, plus half the mean squared error of the values."""
    advantages = targets["advantages"]
    advantages = (advantages - jnp.mean(advantages)) / (jnp.std(advantages) + 1e-8)
    ratios = jnp.exp(log_probabilities(environment, outputs["policy"], targets["actions"]) - targets["before"])
    gains = jnp.minimum(ratios * advantages, jnp.clip(ratios, 1 - CLIP, 1 + CLIP) * advantages)
    return jnp.mean(jnp.square(outputs["value"] - targets["values"])) / 2 - jnp.mean(gains)


def natural_gradient(trust_radius: float = 0.05) -> optax.GradientTransformationExtraArgs:
    """TNT for the policy, in a trust region, and for the value function."""
    policy = tnt_optax.adaptive_tnt(trust_radius=trust_radius, adaptive_damping=False, initial_model_damping=1e-3)
    return optax.partition(
        {"policy": policy, "value": tnt_optax.adaptive_tnt()}, {"policy": "policy", "value": "value"}
    )


def trainer(
    environment: Environment,
    tx: optax.GradientTransformation,
    *,
    steps: int = 200,
    epochs: int = 4,
    minibatches: int = 4,
) -> Callable[[int], Iterator[float]]:
    """A function of a seed that trains without end.

    An iteration plays `steps` steps with all agents, and trains `epochs` times on them, in `minibatches` parts. After
    each iteration the mean return of the last episodes of all agents is yielded.
    """
    predictive = tnt_optax.Joint({"policy": environment.policy, "value": tnt_optax.Normal()})
    value_and_grads = tnt_optax.value_and_sampled_grad(
        functools.partial(forward, environment), predictive, loss=functools.partial(surrogate, environment)
    )
    update = optax.with_extra_args_support(tx).update

    def train_step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
        (params, opt_state), (observations, targets, key) = carry, batch
        loss, grads, sampled_grads = value_and_grads(params, observations, targets, key)
        updates, opt_state = update(grads, opt_state, params, sampled_grads=sampled_grads)
        return (optax.apply_updates(params, updates), opt_state), loss

    @jax.jit
    def iteration(carry: Any, agents: Agents, key: jax.Array) -> tuple[Any, Agents, jax.Array]:
        of_play, of_order, of_labels = jax.random.split(key, 3)
        agents, batch = play(environment, carry[0], agents, of_play, steps)
        orders = [jax.random.permutation(k, steps * AGENTS) for k in jax.random.split(of_order, epochs)]
        order = jnp.concatenate(orders).reshape(epochs * minibatches, -1)
        keys = jax.random.split(of_labels, epochs * minibatches)
        observations, targets = jax.tree.map(lambda x: x[order], batch)
        carry, _ = jax.lax.scan(train_step, carry, (observations, targets, keys))
        return carry, agents, jnp.nanmean(agents.returns)

    def train(seed: int) -> Iterator[float]:
        of_params, of_agents, key = jax.random.split(jax.random.key(seed), 3)
        params, agents = init_params(environment, of_params), start(environment, of_agents)
        carry = params, tx.init(params)
        while True:
            key, of_iteration = jax.random.split(key)
            carry, agents, mean_return = iteration(carry, agents, of_iteration)
            yield float(mean_return)

    return train


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="PPO with a natural policy gradient")
    parser.add_argument("environment", choices=ENVIRONMENTS)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    returns = trainer(ENVIRONMENTS[arguments.environment], natural_gradient())(arguments.seed)
    for number, mean_return in zip(range(1, arguments.iterations + 1), returns, strict=False):
        if number % 5 == 0:
            print(f"iteration {number}: mean return {mean_return:.0f}")
