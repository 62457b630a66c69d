"""Variational Monte Carlo in plain JAX with TNT: the ground state of two electrons in a harmonic trap.

Two electrons of opposite spin move in a plane: H = -1/2 (Laplace_1 + Laplace_2) + 1/2 (r_1^2 + r_2^2) + 1 / r_12. The
ground state has the energy 3 (Taut, 1994). The wave function is a network times its known short-range part.

The energy is a surrogate `loss=`, linear in log|psi|. With `Normal()` on the centred log|psi|, the Fisher matrix is
that of stochastic reconfiguration: the covariance of the derivatives of log|psi|. A surrogate that is linear says
nothing about the length of a step, so the damping of the quadratic model is fixed (`adaptive_damping=False`), and
`trust_radius` limits the change of the wave function: the standard deviation of the change of log|psi|.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import tnt_optax

WALKERS, MOVES, MOVE_SIZE = 1000, 20, 0.6


def init_params(key: jax.Array, width: int = 16) -> Any:
    """A network of two hidden layers: (r_1, r_2, r_12) -> a number."""
    shapes = [(5, width), (width, width), (width, 1)]
    kernel_init, keys = jax.nn.initializers.lecun_normal(), jax.random.split(key, len(shapes))
    layers = [
        {"kernel": kernel_init(k, shape), "bias": jnp.zeros(shape[1])} for k, shape in zip(keys, shapes, strict=True)
    ]
    layers[-1]["kernel"] *= 0.1
    return layers


def log_psi(params: Any, r: jax.Array) -> jax.Array:
    """log|psi| of one walker: the places (2, 2) of both electrons."""
    first, second = r
    distance = jnp.linalg.norm(first - second)

    def network(*places: jax.Array) -> jax.Array:
        x = jnp.concatenate([*places, distance[None]])
        *hidden, last = params
        for layer in hidden:
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return (x @ last["kernel"] + last["bias"])[0]

    # Symmetric in the electrons. The term of the distance cancels the singularity of 1 / r_12 (Kato's cusp condition).
    return network(first, second) + network(second, first) - jnp.sum(r**2) / 2 + distance / (1 + distance)


def local_energy(params: Any, r: jax.Array) -> jax.Array:
    """(H psi) / psi of one walker."""
    flat = r.ravel()

    def gradient(flat: jax.Array) -> jax.Array:
        return jax.grad(log_psi, argnums=1)(params, flat.reshape(r.shape)).ravel()

    slope, second = jax.vmap(lambda v: jax.jvp(gradient, (flat,), (v,)), out_axes=(None, 0))(jnp.eye(flat.size))
    kinetic = -(jnp.trace(second) + slope @ slope) / 2
    return kinetic + jnp.sum(r**2) / 2 + 1 / jnp.linalg.norm(r[0] - r[1])


def move(params: Any, walkers: jax.Array, key: jax.Array, moves: int = MOVES) -> jax.Array:
    """Moves of Metropolis' algorithm, for samples of |psi|^2."""

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        (walkers, before), (of_move, of_choice) = carry, jax.random.split(key)
        new = walkers + MOVE_SIZE * jax.random.normal(of_move, walkers.shape)
        after = jax.vmap(log_psi, (None, 0))(params, new)
        accepted = jnp.log(jax.random.uniform(of_choice, before.shape)) < 2 * (after - before)
        return (jnp.where(accepted[:, None, None], new, walkers), jnp.where(accepted, after, before)), None

    start = walkers, jax.vmap(log_psi, (None, 0))(params, walkers)
    return jax.lax.scan(step, start, jax.random.split(key, moves))[0][0]


def forward(params: Any, walkers: jax.Array) -> jax.Array:
    """log|psi| of all walkers, minus its mean."""
    values = jax.vmap(log_psi, (None, 0))(params, walkers)
    return values - jnp.mean(values)


def surrogate(centred: jax.Array, energies: jax.Array) -> jax.Array:
    """A function whose gradient is that of the energy."""
    return 2 * jnp.mean(centred * (energies - jnp.mean(energies)))


class Measurement(NamedTuple):
    """The mean of the local energies, and the standard error of that mean for independent walkers."""

    energy: jax.Array
    error: jax.Array


def measure(energies: jax.Array) -> Measurement:
    return Measurement(jnp.mean(energies), jnp.std(energies) / len(energies) ** 0.5)


def natural_gradient(trust_radius: float = 0.05) -> optax.GradientTransformationExtraArgs:
    return tnt_optax.adaptive_tnt(
        trust_radius=trust_radius,
        damping=1e-3,
        adaptive_damping=False,
        initial_model_damping=1e-4,
        use_momentum=False,
    )


Step = Callable[[Any, Any, jax.Array, jax.Array, jax.Array], tuple[Any, Any]]


def step_of(tx: optax.GradientTransformation) -> Step:
    """A step of an optimizer: (params, opt_state, walkers, local energies, key) -> (params, opt_state)."""
    value_and_grads = tnt_optax.value_and_sampled_grad(forward, tnt_optax.Normal(), loss=surrogate)
    update = optax.with_extra_args_support(tx).update

    def step(params: Any, opt_state: Any, walkers: jax.Array, energies: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        _, grads, sampled_grads = value_and_grads(params, walkers, energies, key)
        updates, opt_state = update(grads, opt_state, params, sampled_grads=sampled_grads)
        return optax.apply_updates(params, updates), opt_state

    return step


def trainer(init: Callable[[Any], Any], step: Step) -> Callable[[int], Iterator[Measurement]]:
    """A function of a seed that trains without end, and yields the energy before each step.

    `init` is that of the optimizer.
    """

    @jax.jit
    def train_step(params: Any, opt_state: Any, walkers: jax.Array, key: jax.Array) -> Any:
        of_moves, of_labels = jax.random.split(key)
        walkers = move(params, walkers, of_moves)
        energies = jax.vmap(local_energy, (None, 0))(params, walkers)
        # A few walkers near a singularity must not dominate the gradient.
        middle = jnp.median(energies)
        width = 5 * jnp.mean(jnp.abs(energies - middle))
        clipped = jnp.clip(energies, middle - width, middle + width)
        params, opt_state = step(params, opt_state, walkers, clipped, of_labels)
        return params, opt_state, walkers, measure(energies)

    def train(seed: int) -> Iterator[Measurement]:
        of_params, of_walkers, of_moves, key = jax.random.split(jax.random.key(seed), 4)
        params, walkers = init_params(of_params), jax.random.normal(of_walkers, (WALKERS, 2, 2))
        opt_state = init(params)
        walkers = jax.jit(move, static_argnames="moves")(params, walkers, of_moves, moves=200)
        while True:
            key, of_step = jax.random.split(key)
            params, opt_state, walkers, measurement = train_step(params, opt_state, walkers, of_step)
            yield measurement

    return train


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Two electrons in a harmonic trap")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tx = natural_gradient()
    measurements = trainer(tx.init, step_of(tx))(arguments.seed)
    for number, (energy, error) in zip(range(1, arguments.steps + 1), measurements, strict=False):
        if number % 50 == 0:
            print(f"step {number}: energy {energy:.4f} ± {error:.4f} (exact: 3)")
