"""Algorithm 2 of the paper, compared with the bound of its Theorem 1, on a problem whose constants are all known.

Algorithm 2 is TNT with the exact covariance of the sampled gradient in place of an estimate, without momentum:
W <- W - alpha_t F_TNT^-1 g_t, where F_TNT = (U_1 + eps I) x ... x (U_k + eps I), the U_i are those of Eq. (5) from the
exact E[G^(i)], and g_t is the gradient of a batch of m examples, drawn with replacement. The problem is softmax
regression of the digits 0, 1 and 2: images x of 4x4 pixels, W of the shape (4, 4, 3). The gradient of one example is
the tensor product of x and p - e_y, where p(x, W) are the predicted probabilities and y is a label.

docs/benchmarks/theory.md derives constants that are valid for every W: L = lambda_max(E[x x^T]) / 2, sigma^2 = 2 E|x|^2
for one example, kappa_high = eps^-k, and kappa_low = prod_i 1 / (u_i + eps) with u_i >= |U_i|. From them follows the
bound of Theorem 1 for the step sizes alpha_t = kappa_low / (L kappa_high^2) t^-beta, with f(W_1) = log 3 at W_1 = 0,
and with 0 as the lowest loss.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import typer
from scipy.special import zeta
from sklearn.datasets import load_digits

from experiments import report
from tnt_optax.factors import Dense, mode_products, normalize_factor

CLASSES, DENSE, OUT = 3, Dense(), Path("results")
SETTINGS = ((0.6, 1), (0.75, 1), (0.9, 1), (0.75, 10), (0.75, 100))  # beta; multiples of the theorem's step sizes


class Constants(NamedTuple):
    """L, sigma^2, kappa_low, kappa_high and f(W_1)."""

    lipschitz: float
    variance: float
    kappa_low: float
    kappa_high: float
    start: float

    def step_size(self) -> float:
        """alpha_1."""
        return self.kappa_low / (self.lipschitz * self.kappa_high**2)

    def bound(self, steps: Any, beta: float, batch_size: int) -> np.ndarray:
        """The right-hand side of Theorem 1 for N = `steps`."""
        n, noise = np.asarray(steps, float), self.variance / batch_size
        ratio = 2 * self.lipschitz * (self.kappa_high / self.kappa_low) ** 2  # r
        highest = self.start + float(zeta(2 * beta)) * noise / ratio  # M
        return ratio * highest * n ** (beta - 1) + noise * (n**-beta - 1 / n) / (1 - beta)


def load(examples: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of each class (n, 4, 4), with mean 0 at each pixel and mean square 1 in all; the labels (n,)."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.concatenate([np.flatnonzero(labels == label)[:examples] for label in range(CLASSES)])
    inputs = images[chosen].reshape(-1, 4, 2, 4, 2).mean((2, 4))
    inputs -= inputs.mean(0)
    return (inputs / np.sqrt(np.mean(inputs**2))).astype(np.float32), labels[chosen]


def factor_bounds(inputs: np.ndarray) -> list[float]:
    """u_i = d_i (b_i / prod_j d_j)^(1/k), where b_i >= |E[G^(i)]|."""
    x = np.asarray(inputs, np.float64)
    dims = (*x.shape[1:], CLASSES)
    norms = [  # b_i: tr(diag(p) - p p^T) <= 1 - 1/K, and no eigenvalue of this matrix exceeds 1/2.
        (1 - 1 / CLASSES) * np.linalg.norm(np.einsum("nij,nkj->ik", x, x) / len(x), 2),
        (1 - 1 / CLASSES) * np.linalg.norm(np.einsum("nji,njk->ik", x, x) / len(x), 2),
        np.sum(x**2) / len(x) / 2,
    ]
    return [float(d * (b / math.prod(dims)) ** (1 / len(dims))) for d, b in zip(dims, norms, strict=True)]


def constants(inputs: np.ndarray, damping: float) -> Constants:
    x, bounds = np.asarray(inputs, np.float64).reshape(len(inputs), -1), factor_bounds(inputs)
    lipschitz = float(np.linalg.norm(x.T @ x / len(x), 2)) / 2
    kappa_low = 1 / math.prod(u + damping for u in bounds)
    return Constants(lipschitz, 2 * float(np.sum(x**2)) / len(x), kappa_low, damping ** -len(bounds), math.log(CLASSES))


def loss(w: jax.Array, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(jnp.einsum("nij,ijk->nk", inputs, w))
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=1))


def exact_contractions(w: jax.Array, inputs: jax.Array) -> list[jax.Array]:
    """E[G^(i)], i = 1, ..., k: the sum over all images x and all labels y, weighted by the model's probabilities."""
    p = jax.nn.softmax(jnp.einsum("nij,ijk->nk", inputs, w))
    errors = p[:, None] - jnp.eye(CLASSES, dtype=p.dtype)  # (n, y, k)
    gradients = jnp.einsum("nij,nyk->nyijk", inputs, errors).reshape(-1, *w.shape)
    every = (jax.vmap(functools.partial(DENSE.contraction, mode=mode))(gradients) for mode in range(w.ndim))
    return [jnp.tensordot(p.ravel() / len(inputs), contractions, 1) for contractions in every]


def direction(w: jax.Array, gradient: jax.Array, inputs: jax.Array, damping: float) -> jax.Array:
    """F_TNT^-1 g, computed by functions of the library."""
    factors = [normalize_factor(DENSE, c, w.ndim, w.size) for c in exact_contractions(w, inputs)]
    inverses = [DENSE.inverse(u, jnp.asarray(damping, u.dtype)) for u in factors]
    return mode_products([DENSE] * w.ndim, gradient, inverses)


def make_run(inputs: Any, labels: Any, *, steps: int, batch_size: int, damping: float) -> Callable[..., jax.Array]:
    """A function (alpha_1, beta, key) that returns |grad f|^2 at the steps t = 1, ..., `steps` of Algorithm 2."""
    inputs, labels = jnp.asarray(inputs), jnp.asarray(labels)

    @jax.jit
    def run(step_size: jax.Array, beta: jax.Array, key: jax.Array) -> jax.Array:
        def step(w: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
            squared_norm = jnp.sum(jnp.square(jax.grad(loss)(w, inputs, labels)))
            batch = jax.random.randint(jax.random.fold_in(key, t), (batch_size,), 0, len(inputs))
            p = direction(w, jax.grad(loss)(w, inputs[batch], labels[batch]), inputs, damping)
            return w - step_size * t.astype(w.dtype) ** -beta * p, squared_norm

        return jax.lax.scan(step, jnp.zeros((*inputs.shape[1:], CLASSES)), jnp.arange(1, steps + 1))[1]

    return run


def measure(run: Callable[..., jax.Array], known: Constants, steps: int, seeds: int, batch_size: int) -> list[Any]:
    """For each setting, the average over the steps t = 1, ..., N, its mean over the runs, and the bound."""
    counts = np.union1d(np.geomspace(1, steps, 50).round().astype(int), 10 ** np.arange(len(str(steps))))  # N
    rows = []
    for beta, multiple in SETTINGS:
        sizes = jnp.float32(multiple * known.step_size()), jnp.float32(beta)
        norms = np.array([run(*sizes, jax.random.key(seed)) for seed in range(seeds)], np.float64)
        averages = (np.cumsum(norms, axis=1) / np.arange(1, steps + 1))[:, counts - 1]
        mean, error = averages.mean(axis=0), averages.std(axis=0) / math.sqrt(max(seeds - 1, 1))
        before, end = np.interp(np.log([steps / 10, steps]), np.log(counts), np.log(mean))
        row = {"beta": beta, "multiple": multiple, "N": counts.tolist(), "measured": mean.tolist()}
        row |= {"standard_error": error.tolist(), "bound": known.bound(counts, beta, batch_size).tolist()}
        rows.append(row | {"slope": (end - before) / math.log(10)})  # Log-log slope, over the last factor of 10 in N.
    return rows


def main(
    steps: Annotated[int, typer.Option(help="number of steps N")] = 5000,
    seeds: Annotated[int, typer.Option(help="number of runs")] = 6,
    batch_size: Annotated[int, typer.Option(help="number of examples in a batch (m)")] = 8,
    damping: Annotated[float, typer.Option(help="damping of the inverses (epsilon)")] = 3.0,
    examples: Annotated[int, typer.Option(help="number of images of each class")] = 50,
    out: Annotated[Path, typer.Option(help="folder of convergence.json and convergence.png")] = OUT,
) -> None:
    """Measures the mean squared gradient norm over N steps of Algorithm 2, and compares it with Theorem 1's bound."""
    arguments = {name: value for name, value in locals().items() if name != "out"}
    data = load(examples)
    known = constants(data[0], damping)
    run = make_run(*data, steps=steps, batch_size=batch_size, damping=damping)
    rows = measure(run, known, steps, seeds, batch_size)
    below = all(np.all(np.less(row["measured"], row["bound"])) for row in rows if row["multiple"] == 1)
    shown = [(i, n) for i, n in enumerate(rows[0]["N"]) if n == steps or math.log10(n) % 1 == 0]
    cells = [[f"{n:,}", *(f"{row['measured'][i]:.3g} < {row['bound'][i]:.3g}" for row in rows)] for i, n in shown]
    columns = ["N", *(f"β = {row['beta']:g}, steps × {row['multiple']}" for row in rows)]
    slopes = ["slope", *(f"{row['slope']:.2f}, {row['beta'] - 1:.2f}" for row in rows)]
    table = report.markdown_table(columns, [*cells, slopes])
    print(table)
    print(f"With the theorem's steps the average is {'' if below else 'NOT '}below the bound for every N.")
    content = {"constants": {**known._asdict(), "step_size": known.step_size()}, "below_the_bound": below, "rows": rows}
    content["tables"] = {"convergence": table}
    report.write_json(out / "convergence.json", {"arguments": arguments, "machine": report.machine(), **content})
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for index, row in enumerate(rows):
        axis, label = axes[int(row["multiple"] > 1)], f"β = {row['beta']:g}"
        axis.loglog(row["N"], row["measured"], color=f"C{index}", label=f"{label}, step sizes x{row['multiple']}")
        if axis is axes[0]:
            axis.loglog(row["N"], row["bound"], "--", color=f"C{index}", label=f"{label}, bound")
    for axis, title in zip(axes, ("with Theorem 1's step sizes", "larger steps, outside the theorem"), strict=True):
        axis.set(title=title, xlabel="N", ylabel="squared gradient norm, mean over t ≤ N")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="lower left")
    figure.savefig(out / "convergence.png", dpi=120)


if __name__ == "__main__":
    typer.run(main)
