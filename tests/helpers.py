"""What several test modules share: random trees, the state inside wrappers, and what a jaxpr consists of."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tnt_optax import Normal, SampledGrad, TNTState, value_and_sampled_grad

# Parameters of every rank from 0 to 5, with the shapes in which they are preconditioned.
SHAPES = {
    "scalar": ((), (1,)),
    "bias": ((5,), (5,)),
    "dense": ((4, 6), (4, 6)),
    "conv1d": ((3, 2, 4), (3, 2, 4)),
    "conv2d": ((3, 2, 4, 3), (6, 4, 3)),
    "conv3d": ((2, 1, 3, 2, 3), (6, 2, 3)),
}
VIEWS = [view for _, view in SHAPES.values()]


def random_trees(
    seed: int, steps: int, dtype: Any = jnp.float32, *, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> list[dict[str, jax.Array]]:
    """Trees of normal numbers, one for each step."""
    shapes = {name: shape for name, (shape, _) in SHAPES.items()} if shapes is None else shapes
    rng = np.random.default_rng(seed)
    return [{name: jnp.asarray(rng.normal(size=s), dtype) for name, s in shapes.items()} for _ in range(steps)]


def as_views(tree: dict[str, Any]) -> list[np.ndarray]:
    """What the reference takes: float64 arrays in the views in which they are preconditioned."""
    return [np.asarray(tree[name], np.float64).reshape(SHAPES[name][1]) for name in SHAPES if name in tree]


def tnt_state(opt_state: Any) -> TNTState:
    """The only `TNTState` in the state of an optimizer."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, TNTState))
    (found,) = [node for node in nodes if isinstance(node, TNTState)]
    return found


def without_tnt_state(opt_state: Any) -> Any:
    """The state of an optimizer with None in place of each `TNTState`."""
    is_ours = lambda x: isinstance(x, TNTState)  # noqa: E731
    return jax.tree.map(lambda x: None if is_ours(x) else x, opt_state, is_leaf=is_ours)


def count(jaxpr: Any, primitive: str, *, inside_cond: bool) -> int:
    """How often `primitive` is in `jaxpr`, at any depth, inside or outside of conditionals."""

    def inner(eqn: Any) -> Iterator[Any]:
        is_leaf = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")  # noqa: E731
        for leaf in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_leaf):
            if hasattr(leaf, "eqns"):
                yield leaf
            elif hasattr(leaf, "jaxpr"):
                yield leaf.jaxpr

    def walk(jaxpr: Any, in_cond: bool) -> int:
        total = 0
        for eqn in jaxpr.eqns:
            total += eqn.primitive.name == primitive and in_cond == inside_cond
            total += sum(walk(one, in_cond or eqn.primitive.name == "cond") for one in inner(eqn))
        return total

    return walk(jaxpr.jaxpr, False)


def linear_model(tree: Any) -> tuple[Any, Any]:
    """A model that is linear in parameters like `tree`, and inputs for it, which are functions of `tree`."""
    leaves, _ = jax.tree.flatten(tree)
    flat = jnp.concatenate([jnp.ravel(x).astype(jnp.result_type(float)) for x in leaves]) if leaves else jnp.zeros(0)
    inputs = jnp.stack([flat, jnp.sin(3 * flat), jnp.cos(5 * flat + 1), jnp.sin(7 * flat + 2)])

    def forward(params: Any, inputs: jax.Array) -> jax.Array:
        flat = [jnp.ravel(x).astype(inputs.dtype) for x in jax.tree.leaves(params)]
        return inputs @ jnp.concatenate([jnp.zeros(0, inputs.dtype), *flat])[:, None]

    return forward, inputs


def sampled_grad_of(tree: Any) -> SampledGrad:
    """A `SampledGrad` of that model, at parameters of 0, with targets of 1."""
    forward, inputs = linear_model(tree)
    value_and_grads = value_and_sampled_grad(forward, Normal())
    zeros = jax.tree.map(jnp.zeros_like, tree)
    return value_and_grads(zeros, inputs, jnp.ones((len(inputs), 1), inputs.dtype), jax.random.key(0))[2]


@jax.custom_vjp
def marked(x: jax.Array) -> jax.Array:
    """The identity, with one `sin` in its forward pass and one `erf` in its backward pass."""
    return x + 0 * jnp.sin(x)


marked.defvjp(lambda x: (marked(x), None), lambda _, g: (g + 0 * jax.lax.erf(g),))


@dataclasses.dataclass(frozen=True)
class Poisson:
    """A user's own distribution, with the logarithms of the rates as outputs; no pytree, no batch_size, no split."""

    def loss(self, outputs, targets):
        return jnp.sum(jnp.exp(outputs) - targets * outputs) / len(outputs)

    def sample(self, key, outputs):
        return jax.random.poisson(key, jnp.exp(outputs)).astype(outputs.dtype)


class FixedSamples(Poisson):
    """With samples that depend on the outputs alone, so that those of a batch are those of its parts."""

    def sample(self, key, outputs):
        return outputs + jnp.cos(7 * outputs)
