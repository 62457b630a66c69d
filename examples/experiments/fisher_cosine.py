"""Cosines between the direction of each method and that of the block-diagonal Fisher matrix (the paper's Figure 1).

A tanh classifier is trained with *block Fisher*: for each layer, the whole Fisher matrix of its weights and bias,
estimated with one sampled label for each example. All other methods get the same gradients along this trajectory. The
cosine between their direction and that of block Fisher is recorded for each layer. All averages have the decay 0.9, and
all inverses are updated at each step.
"""

import functools
import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import typer
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve

import tnt_optax
from experiments import baselines, report
from experiments.data import labelled
from experiments.workloads import dense, dense_layers

DECAY = 0.9
HIDDEN = (20, 20, 20, 20)  # The widths of the hidden layers.
CATEGORICAL = tnt_optax.Categorical()
forward = functools.partial(dense, jnp.tanh)


def methods(damping: float) -> dict[str, Any]:
    """The methods. `damping` is that of the whole matrix of a layer: factors of TNT and KFAC have its square root."""
    averages: Any = {"statistics_decay": DECAY, "momentum": DECAY, "statistics_period": 1, "inverse_period": 1}
    tnt = functools.partial(tnt_optax.scale_by_tnt, damping=damping**0.5, **averages)
    return {
        "TNT": tnt(),
        "TNT-EF": tnt(fisher="empirical"),
        "KFAC": baselines.kfac(-1.0, damping=damping, **averages),
        "Shampoo": baselines.shampoo(-1.0, damping=damping, **averages),
        "Adam": optax.with_extra_args_support(optax.scale_by_adam(b1=DECAY, b2=DECAY)),
        "SGD-m": optax.with_extra_args_support(optax.trace(DECAY)),
    }


def block_fisher(params: Any, inputs: jax.Array, labels: jax.Array) -> list[jax.Array]:
    """For each layer, the mean of v v^T over the examples, where v is the gradient of the loss of one example."""
    gradient = jax.grad(lambda params, x, label: CATEGORICAL.loss(forward(params, x[None]), label[None]))
    gradients = jax.vmap(gradient, in_axes=(None, 0, 0))(params, inputs, labels)
    vectors = [jax.vmap(lambda layer: ravel_pytree(layer)[0])(layer) for layer in gradients]
    return [v.T @ v / len(inputs) for v in vectors]


def block_direction(fisher: jax.Array, momentum: Any, damping: float) -> Any:
    """(F + damping I)^-1 m of a layer."""
    vector, as_layer = ravel_pytree(momentum)
    return as_layer(solve(fisher + damping * jnp.eye(len(fisher)), vector, assume_a="pos"))


def cosine(x: Any, y: Any) -> jax.Array:
    """The cosine between two directions of a layer."""
    x, y = ravel_pytree(x)[0], ravel_pytree(y)[0]
    return jnp.vdot(x, y) / (jnp.linalg.norm(x) * jnp.linalg.norm(y))


def compare(images, widths, *, batch_size=1000, steps=200, learning_rate=0.1, damping=0.01, seed=0) -> Any:
    """The cosines of each method, of shape (steps, layers), and the losses along the trajectory."""
    line_up = methods(damping)

    @jax.jit
    def step(params: Any, fishers: Any, momentum: Any, states: Any, t: jax.Array, batch: Any, key: jax.Array) -> Any:
        inputs, labels = batch
        loss, grads, sampled_grads = tnt_optax.value_and_sampled_grad(forward, CATEGORICAL)(params, inputs, labels, key)
        factors = baselines.value_and_layer_factors(forward, CATEGORICAL)(params, inputs, labels, key)[2]
        weight = jnp.maximum(1 - DECAY, 1 / (t + 1))
        new = block_fisher(params, inputs, CATEGORICAL.sample(key, forward(params, inputs)))  # TNT's labels.
        fishers = [(1 - weight) * f + weight * n for f, n in zip(fishers, new, strict=True)]
        momentum = jax.tree.map(lambda m, g: DECAY * m + (1 - DECAY) * g, momentum, grads)
        directions = [block_direction(f, m, damping) for f, m in zip(fishers, momentum, strict=True)]
        shown, cosines = {"TNT": sampled_grads, "KFAC": factors}, {}
        for name, tx in line_up.items():
            updates, states[name] = tx.update(grads, states[name], params, sampled_grads=shown.get(name))
            cosines[name] = jnp.stack([cosine(u, d) for u, d in zip(updates, directions, strict=True)])
        params = jax.tree.map(lambda w, d: w - learning_rate * d, params, directions)
        return (params, fishers, momentum, states), loss, cosines

    params, key = dense_layers(widths, seed), jax.random.key(seed)
    fishers = [jnp.zeros((size, size)) for size in (ravel_pytree(layer)[0].size for layer in params)]
    states = {name: tx.init(params) for name, tx in line_up.items()}
    state = params, fishers, jax.tree.map(jnp.zeros_like, params), states
    rng, history = np.random.default_rng(seed), []
    for t in range(steps):
        chosen = rng.choice(len(images[0]), batch_size, replace=False)
        batch = jnp.asarray(images[0][chosen]), jnp.asarray(images[1][chosen])
        state, *results = step(*state, jnp.int32(t), batch, jax.random.fold_in(key, t))
        history.append(jax.device_get(results))
    return {name: np.array([now[name] for _, now in history]) for name in line_up}, [float(loss) for loss, _ in history]


def main(
    dataset: Annotated[
        Literal["digits", "mnist"], typer.Option(help="digits of scikit-learn, or MNIST reduced to 16x16 pixels")
    ] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="folder of the TFDS datasets (default: a download)")] = None,
    batch_size: Annotated[int, typer.Option(help="number of examples in a batch")] = 1000,
    steps: Annotated[int, typer.Option(help="number of steps")] = 200,
    learning_rate: Annotated[float, typer.Option(help="learning rate of block Fisher")] = 0.1,
    damping: Annotated[float, typer.Option(help="damping (its square root for each factor of TNT and KFAC)")] = 0.01,
    seed: Annotated[int, typer.Option(help="seed of parameters, batches and sampled labels")] = 0,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("results"),
) -> None:
    """Measures Figure 1 of the paper: cosines between the directions of several methods and that of block Fisher."""
    options = {name: value for name, value in locals().items() if name not in ("dataset", "data_dir", "out")}
    images = labelled(dataset, data_dir)
    widths = [images[0].shape[1], *HIDDEN, 10]
    cosines, losses = compare(images, widths, **options)
    layers = [f"{n}-{m}" for n, m in itertools.pairwise(widths)]
    rows = [[name, *(f"{value:.2f}" for value in values.mean(axis=0))] for name, values in cosines.items()]
    table = report.markdown_table(["direction of", *layers], rows)
    print(table)
    print(f"Means of {steps} steps, in which block Fisher's loss went from {losses[0]:.3f} to {losses[-1]:.3f}.")
    content = {"arguments": {"dataset": dataset, **options}, "machine": report.machine(), "widths": widths}
    content |= {"losses": losses, "cosines": {k: v.astype(float).round(4).tolist() for k, v in cosines.items()}}
    content["tables"] = {f"fisher_cosine_{dataset}": table}
    report.write_json(out / f"fisher_cosine_{dataset}.json", content)
    figure, axes = plt.subplots(1, len(layers), figsize=(13, 3.2), sharey=True, layout="constrained")
    for index, (layer, axis) in enumerate(zip(layers, axes, strict=True)):
        axis.plot(np.stack([*cosines.values()], axis=-1)[:, index], linewidth=1, label=[*cosines])
        axis.set(title=layer, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="cosine with block Fisher", ylim=(0, 1))
    axes[-1].legend(loc="lower right", fontsize="small")
    figure.savefig(out / f"fisher_cosine_{dataset}.png", dpi=120)


if __name__ == "__main__":
    typer.run(main)
