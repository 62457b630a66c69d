"""How close each method's direction is to that of the Fisher matrix itself (the paper's Figure 1).

A classifier of small images is trained with block Fisher: for every layer the whole Fisher matrix of its weights and
bias together, of gradients for sampled labels, one an example. Along that trajectory all others are given the same
gradients, and the cosine between their direction and that of block Fisher is recorded for every layer. All averages, of
gradients and of matrices, have the decay 0.9; matrices are inverted at every step.
"""

import argparse
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from common import baselines, data, report
from rich.console import Console

import tnt_optax

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DECAY = 0.9
HIDDEN = (20, 20, 20, 20)  # The widths of the hidden layers.
CATEGORICAL = tnt_optax.Categorical()
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"tanh": jnp.tanh, "relu": jax.nn.relu}


def forward(
    activation: Callable[[jax.Array], jax.Array],
    params: Sequence[Any],
    inputs: jax.Array,
    tap: Callable[[jax.Array, jax.Array], jax.Array] = lambda x, y: y,
) -> jax.Array:
    """Logits; `tap` is what KFAC needs."""
    x = inputs
    for index, layer in enumerate(params):
        x = activation(x) if index else x
        x = tap(x, x @ layer["kernel"] + layer["bias"])
    return x


def initial_parameters(widths: Sequence[int], key: jax.Array) -> list[dict[str, jax.Array]]:
    """Weights of variance 1 / fan_in, and no bias."""
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"kernel": jax.random.normal(k, (n, m)) / np.sqrt(n), "bias": jnp.zeros(m)}
        for k, n, m in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def methods(damping: float) -> dict[str, tuple[optax.GradientTransformationExtraArgs, str]]:
    """The directions that are compared, and what each is shown besides the gradient.

    `damping` is that of the whole matrix: the factors of TNT have its square root. Shampoo's statistics have the
    dimension of the whole.
    """
    every_step: dict[str, Any] = {
        "statistics_decay": DECAY,
        "momentum": DECAY,
        "statistics_period": 1,
        "inverse_period": 1,
    }
    tnt = functools.partial(tnt_optax.scale_by_tnt, damping=damping**0.5, **every_step)
    return {
        "TNT": (tnt(), "sampled gradient"),
        "TNT-EF": (tnt(fisher="empirical"), "nothing"),
        "TNT-MLE": (baselines.tensor_normal_mle(-1.0, damping=damping**0.5, **every_step), "sampled gradient"),
        "KFAC": (baselines.kfac(-1.0, damping=damping, **every_step), "layer factors"),
        "Shampoo": (baselines.shampoo(-1.0, damping=damping, **every_step), "nothing"),
        "Adam": (optax.with_extra_args_support(optax.scale_by_adam(b1=DECAY, b2=DECAY)), "nothing"),
        "SGD-m": (optax.with_extra_args_support(optax.trace(DECAY)), "nothing"),
    }


def block_fisher(model: Callable[..., jax.Array], params: Any, inputs: jax.Array, labels: jax.Array) -> list[jax.Array]:
    """For each layer the mean over the examples of v v^T, v being the gradient of the example's loss for its label."""

    def loss(params: Any, x: jax.Array, label: jax.Array) -> jax.Array:
        return CATEGORICAL.loss(model(params, x[None]), label[None])

    gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(params, inputs, labels)
    vectors = [jax.vmap(as_vector)(layer) for layer in gradients]
    return [v.T @ v / len(inputs) for v in vectors]


def as_vector(layer: Any) -> jax.Array:
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(layer)])


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.vdot(x, y) / (jnp.linalg.norm(x) * jnp.linalg.norm(y))


def compare(
    images: tuple[np.ndarray, np.ndarray],
    *,
    widths: Sequence[int],
    activation: str = "tanh",
    batch_size: int = 1000,
    steps: int = 200,
    learning_rate: float = 0.1,
    damping: float = 0.01,
    seed: int = 0,
    on_step: Callable[[float], None] = lambda loss: None,
) -> tuple[dict[str, np.ndarray], list[float]]:
    """The cosines of each method, of shape (steps, layers), and the losses along the trajectory."""
    model = functools.partial(forward, ACTIVATIONS[activation])
    line_up = methods(damping)
    sampled = tnt_optax.value_and_sampled_grad(model, CATEGORICAL)
    with_factors = baselines.value_and_layer_factors(model, CATEGORICAL)

    @jax.jit
    def step(params: Any, fishers: Any, momentum: Any, states: Any, t: jax.Array, batch: Any, key: jax.Array) -> Any:
        inputs, labels = batch
        loss, grads, sampled_grads = sampled(params, inputs, labels, key)
        shown = {
            "sampled gradient": sampled_grads(),
            "layer factors": with_factors(params, inputs, labels, key)[2](),
            "nothing": None,
        }
        drawn = CATEGORICAL.sample(key, model(params, inputs))
        weight = jnp.maximum(1 - DECAY, 1 / (t + 1))
        new = block_fisher(model, params, inputs, drawn)
        fishers = [(1 - weight) * f + weight * n for f, n in zip(fishers, new, strict=True)]
        momentum = jax.tree.map(lambda m, g: DECAY * m + (1 - DECAY) * g, momentum, grads)
        directions = [
            jax.scipy.linalg.solve(f + damping * jnp.eye(len(f)), as_vector(m), assume_a="pos")
            for f, m in zip(fishers, momentum, strict=True)
        ]
        cosines = {}
        for name, (tx, what) in line_up.items():
            updates: Any
            updates, states[name] = tx.update(grads, states[name], params, sampled_grads=shown[what])
            cosines[name] = jnp.stack([cosine(as_vector(u), d) for u, d in zip(updates, directions, strict=True)])
        structure, leaves = jax.tree.structure(params), []
        for layer, direction in zip(params, directions, strict=True):
            bias, kernel = jax.tree.leaves(layer)
            leaves += [
                bias - learning_rate * direction[: bias.size],
                kernel - learning_rate * direction[bias.size :].reshape(kernel.shape),
            ]
        return structure.unflatten(leaves), fishers, momentum, states, loss, cosines

    start, key = jax.random.split(jax.random.key(seed))
    params = initial_parameters(widths, start)
    sizes = [as_vector(layer).size for layer in params]
    fishers, momentum = [jnp.zeros((d, d)) for d in sizes], jax.tree.map(jnp.zeros_like, params)
    states = {name: tx.init(params) for name, (tx, _) in line_up.items()}
    rng = np.random.default_rng(seed)
    cosines: dict[str, list[np.ndarray]] = {name: [] for name in line_up}
    losses = []
    for t in range(steps):
        chosen = rng.choice(len(images[0]), batch_size, replace=False)
        batch = jnp.asarray(images[0][chosen]), jnp.asarray(images[1][chosen])
        params, fishers, momentum, states, loss, now = step(
            params, fishers, momentum, states, jnp.int32(t), batch, jax.random.fold_in(key, t)
        )
        losses.append(float(loss))
        on_step(losses[-1])
        for name, values in now.items():
            cosines[name].append(np.asarray(values))
    return {name: np.array(values) for name, values in cosines.items()}, losses


def main() -> None:
    args = parse_args()
    console = Console()
    images = data.labelled(args.dataset, args.data_dir)
    widths = [images[0].shape[1], *HIDDEN, 10]
    with report.progress_bar(console) as progress:
        ticker = report.Ticker(progress, "block Fisher", args.steps)
        cosines, losses = compare(
            images,
            widths=widths,
            activation=args.activation,
            batch_size=args.batch_size,
            steps=args.steps,
            learning_rate=args.learning_rate,
            damping=args.damping,
            seed=args.seed,
            on_step=ticker,
        )
    rows = [[name, *(f"{value:.2f}" for value in values.mean(axis=0))] for name, values in cosines.items()]
    columns = ["direction of", *(f"{n}-{m}" for n, m in itertools.pairwise(widths))]
    report.print_table(console, f"Cosine with block Fisher's direction, mean of {args.steps} steps", columns, rows)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"fisher_cosine_{args.dataset}"
    report.save_json(
        stem.with_suffix(".json"),
        {
            "arguments": {key: value for key, value in vars(args).items() if not isinstance(value, Path)},
            "machine": report.machine(),
            "widths": widths,
            "losses": losses,
            "cosines": {name: np.round(values, 4).tolist() for name, values in cosines.items()},
        },
    )
    plot(stem.with_suffix(".png"), cosines, columns[1:])
    console.print(f"Block Fisher's loss went from {losses[0]:.3f} to {losses[-1]:.3f}.")
    console.print(f"Wrote {os.path.relpath(stem)}.json and .png.")


def plot(path: Path, cosines: dict[str, np.ndarray], layers: Sequence[str]) -> None:
    figure, axes = plt.subplots(1, len(layers), figsize=(13, 3.2), sharey=True, layout="constrained")
    for index, (layer, axis) in enumerate(zip(layers, axes, strict=True)):
        for name, values in cosines.items():
            axis.plot(values[:, index], color=report.COLORS.get(name), linewidth=1, label=name)
        axis.set(title=layer, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="cosine with block Fisher", ylim=(0, 1))
    axes[-1].legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--dataset", choices=("digits", "mnist"), default="digits", help="8x8 digits of scikit-learn, or 16x16 MNIST"
    )
    parser.add_argument("--data-dir", type=Path, help="where tensorflow_datasets has already prepared MNIST")
    parser.add_argument("--activation", choices=tuple(ACTIVATIONS), default="tanh")
    parser.add_argument("--batch-size", type=int, default=1000, help="images a step")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=0.1, help="of block Fisher")
    parser.add_argument("--damping", type=float, default=0.01, help="of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON file and the picture")
    return parser.parse_args()


if __name__ == "__main__":
    main()
