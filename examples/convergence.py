"""Does Algorithm 2 converge as Theorem 1 of the paper says? Average squared gradient norms, beside the bound.

Algorithm 2 is TNT with the exact covariance of the sampled gradient in place of an estimate, without momentum:
W <- W - alpha_t H_t g_t, where H_t is the inverse of F_TNT = (U_1 + eps I) x ... x (U_k + eps I), the U_i are those of
Eq. (5) from the exact E[G^(i)], and g_t is the gradient of a batch of m examples, drawn with replacement.

The problem is small, so that everything in the bound is known: softmax regression of the digits 0, 1 and 2. An image x
is averaged to 4x4 pixels, and W has the shape (4, 4, 3): rows, columns, classes. With p(x, W) the predicted
probabilities and y a label, the gradient of one example is the tensor product of x and p - e_y. Hence, for every W:

* L = lambda_max(E[x x^T]) / 2, because the Hessian is E[(diag(p) - p p^T) x (x x^T)], and no eigenvalue of
  diag(p) - p p^T exceeds 1/2.
* sigma^2 = 2 E|x|^2 for one example, because |p - e_y|^2 <= 2.
* kappa_high = eps^-k bounds H from above, because U_i >= 0.
* kappa_low = prod_i 1 / (u_i + eps), with u_i >= |U_i|. By Eq. (5), U_i = E[G^(i)] d_i / (T^(1-1/k) D^(1/k)), where T
  is the trace of E[G^(i)] (the same for all i) and D = prod_j d_j. If b_i >= |E[G^(i)]|, then |U_i| is at most
  min(T, b_i) d_i / (T^(1-1/k) D^(1/k)), which is largest where T = b_i: u_i = d_i (b_i / D)^(1/k). The b_i come from
  tr(diag(p) - p p^T) <= 1 - 1/K, and from the 1/2 above for the mode of the K classes.

Theorem 1 then follows as in Wang, Ma, Goldfarb & Liu (2017), with alpha_t = kappa_low / (L kappa_high^2) t^-beta. Write
r = 2 L kappa_high^2 / kappa_low^2, f_t for the expected loss and n_t for the expected squared gradient norm at step t.
By the Lipschitz constant,

    f_(t+1) <= f_t - alpha_t (kappa_low - L alpha_t kappa_high^2 / 2) n_t + L alpha_t^2 kappa_high^2 sigma^2 / (2 m)
            <= f_t - (t^-beta / r) n_t + (t^(-2 beta) / r) sigma^2 / m.

Solved for n_t, and summed by parts over t = 1, ..., N,

    1/N sum_t n_t <= r (M - f_low) N^(beta-1) + sigma^2 / m (N^-beta - 1/N) / (1 - beta)

if M >= f_t for all t. The inequality gives such an M too: f_1 + zeta(2 beta) sigma^2 / (r m). (The last term is the
integral of t^-beta. The sum is larger by at most 1, which the first term has to spare: at t = 1 it has M for f_1.)
Here f_1 = log 3, at W = 0, and f_low = 0.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from common import report
from rich.console import Console
from scipy.special import zeta

from tnt_optax.factors import Dense, mode_products, normalize_factor

CLASSES = 3
DENSE = Dense()


class Data(NamedTuple):
    """Images (n, 4, 4), every pixel with mean 0 and all together with mean square 1, and their labels (n,)."""

    inputs: np.ndarray
    labels: np.ndarray


class Constants(NamedTuple):
    """What Theorem 1's bound is made of; each holds for every W."""

    lipschitz: float
    variance: float  # sigma^2
    kappa_low: float
    kappa_high: float
    start: float  # f_1

    def step_size(self) -> float:
        """alpha_1."""
        return self.kappa_low / (self.lipschitz * self.kappa_high**2)

    def bound(self, steps: np.ndarray, beta: float, batch_size: int) -> np.ndarray:
        """The right-hand side of Theorem 1 for N = `steps`, with f_low = 0."""
        n, noise = np.asarray(steps, float), self.variance / batch_size
        ratio = 2 * self.lipschitz * (self.kappa_high / self.kappa_low) ** 2  # r
        highest = self.start + float(zeta(2 * beta)) * noise / ratio  # M
        return ratio * highest * n ** (beta - 1) + noise * (n**-beta - 1 / n) / (1 - beta)


def load(examples: int) -> Data:
    """The first images of each of the classes, from the digits that ship inside scikit-learn."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    chosen = np.concatenate([np.flatnonzero(labels == label)[:examples] for label in range(CLASSES)])
    inputs = images[chosen].reshape(-1, 4, 2, 4, 2).mean((2, 4))
    inputs -= inputs.mean(0)
    return Data((inputs / np.sqrt(np.mean(inputs**2))).astype(np.float32), labels[chosen])


def factor_bounds(inputs: np.ndarray) -> list[float]:
    """u_i >= |U_i|, for every W."""
    x = np.asarray(inputs, np.float64)
    dims = (*x.shape[1:], CLASSES)
    norms = [  # b_i
        (1 - 1 / CLASSES) * np.linalg.norm(np.einsum("nij,nkj->ik", x, x) / len(x), 2),
        (1 - 1 / CLASSES) * np.linalg.norm(np.einsum("nji,njk->ik", x, x) / len(x), 2),
        np.sum(x**2) / len(x) / 2,
    ]
    return [float(d * (b / math.prod(dims)) ** (1 / len(dims))) for d, b in zip(dims, norms, strict=True)]


def constants(inputs: np.ndarray, damping: float) -> Constants:
    """See the top of this file."""
    x, bounds = np.asarray(inputs, np.float64).reshape(len(inputs), -1), factor_bounds(inputs)
    return Constants(
        lipschitz=float(np.linalg.norm(x.T @ x / len(x), 2)) / 2,
        variance=2 * float(np.sum(x**2)) / len(x),
        kappa_low=1 / math.prod(u + damping for u in bounds),
        kappa_high=damping ** -len(bounds),
        start=math.log(CLASSES),
    )


def loss(w: jax.Array, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross-entropy, the mean over the examples."""
    log_p = jax.nn.log_softmax(jnp.einsum("nij,ijk->nk", inputs, w))
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=1))


def exact_contractions(w: jax.Array, inputs: jax.Array) -> list[jax.Array]:
    """E[G^(i)], i = 1, ..., k, over the images x and the labels y that the model predicts: all of them, one by one."""
    p = jax.nn.softmax(jnp.einsum("nij,ijk->nk", inputs, w))

    def of_one_label(x: jax.Array, p: jax.Array, e_y: jax.Array) -> list[jax.Array]:
        gradient = x[:, :, None] * (p - e_y)
        return [jnp.vdot(e_y, p) * DENSE.contraction(gradient, mode) for mode in range(w.ndim)]

    every = jax.vmap(jax.vmap(of_one_label, (None, None, 0)), (0, 0, None))(inputs, p, jnp.eye(CLASSES, dtype=p.dtype))
    return [jnp.mean(jnp.sum(c, axis=1), axis=0) for c in every]


def direction(w: jax.Array, gradient: jax.Array, inputs: jax.Array, damping: float) -> jax.Array:
    """F_TNT^-1 g."""
    factors = [normalize_factor(DENSE, c, w.ndim, w.size) for c in exact_contractions(w, inputs)]
    inverses = [DENSE.inverse(u, jnp.asarray(damping, u.dtype)) for u in factors]
    return mode_products([DENSE] * w.ndim, gradient, inverses)


def make_run(data: Data, *, steps: int, batch_size: int, damping: float) -> Callable[..., jax.Array]:
    """A function (alpha_1, beta, key) that gives |grad f|^2 at the steps t = 1, ..., `steps` of Algorithm 2."""
    inputs, labels = jnp.asarray(data.inputs), jnp.asarray(data.labels)

    @jax.jit
    def run(step_size: jax.Array, beta: jax.Array, key: jax.Array) -> jax.Array:
        def step(w: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
            squared_norm = jnp.sum(jnp.square(jax.grad(loss)(w, inputs, labels)))
            batch = jax.random.randint(jax.random.fold_in(key, t), (batch_size,), 0, len(inputs))
            p = direction(w, jax.grad(loss)(w, inputs[batch], labels[batch]), inputs, damping)
            return w - step_size * t.astype(w.dtype) ** -beta * p, squared_norm

        start = jnp.zeros((*inputs.shape[1:], CLASSES))
        return jax.lax.scan(step, start, jnp.arange(1, steps + 1))[1]

    return run


def measure(
    data: Data, known: Constants, args: argparse.Namespace, on_run: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """For every beta (and for one of them with larger steps): the average over t = 1, ..., N and over the runs, beside
    Theorem 1's bound."""
    run = make_run(data, steps=args.steps, batch_size=args.batch_size, damping=args.damping)
    counts = np.union1d(np.geomspace(1, args.steps, 50).round().astype(int), decades(args.steps))  # N
    settings = [(beta, 1) for beta in args.betas] + [(args.betas[len(args.betas) // 2], m) for m in args.multiples]
    rows = []
    for beta, multiple in settings:
        averages = []
        for seed in range(args.seeds):
            step_size = jnp.float32(multiple * known.step_size())
            norms = np.asarray(run(step_size, jnp.float32(beta), jax.random.key(seed)), np.float64)
            averages.append((np.cumsum(norms) / np.arange(1, args.steps + 1))[counts - 1])
            on_run()
        mean = np.mean(averages, axis=0)
        before, end = np.interp(np.log([args.steps / 10, args.steps]), np.log(counts), np.log(mean))
        rows.append(
            {
                "beta": beta,
                "multiple": multiple,
                "N": counts.tolist(),
                "measured": mean.tolist(),
                # Of the mean over the runs; a single run tells nothing of it.
                "standard_error": (np.std(averages, axis=0) / math.sqrt(max(args.seeds - 1, 1))).tolist(),
                "bound": known.bound(counts, beta, args.batch_size).tolist(),
                "slope": (end - before) / math.log(10),  # log-log, over the last tenfold of N
            }
        )
    return rows


def decades(steps: int) -> list[int]:
    """1, 10, 100, ..., and `steps`."""
    return [*(10**i for i in range(len(str(steps))) if 10**i < steps), steps]


def main() -> None:
    args = parse_args()
    console = Console()
    data = load(args.examples)
    known = constants(data.inputs, args.damping)
    console.print(
        f"Algorithm 2 on {len(data.inputs)} images, batches of {args.batch_size}, damping {args.damping:g}: "
        f"L = {known.lipschitz:.3g}, sigma^2 = {known.variance:.3g}, kappa between {known.kappa_low:.3g} and "
        f"{known.kappa_high:.3g}, alpha_1 = {known.step_size():.3g}."
    )
    with report.progress_bar(console) as progress:
        task = progress.add_task("runs", total=args.seeds * (len(args.betas) + len(args.multiples)), status="")
        rows = measure(data, known, args, lambda: progress.advance(task))
    theorem = [row for row in rows if row["multiple"] == 1]
    below = all(m <= b for row in theorem for m, b in zip(row["measured"], row["bound"], strict=True))
    print_results(console, args, rows, theorem)
    console.print(f"With the theorem's steps the average is {'' if below else 'NOT '}below the bound for every N.")
    args.out.mkdir(parents=True, exist_ok=True)
    plot(args.out / "convergence.png", rows, theorem)
    report.save_json(
        args.out / "convergence.json",
        {
            "arguments": {key: value for key, value in vars(args).items() if not isinstance(value, Path)},
            "machine": report.machine(),
            "constants": {**known._asdict(), "step_size": known.step_size()},
            "below_the_bound": below,
            "rows": rows,
        },
    )


def print_results(
    console: Console, args: argparse.Namespace, rows: Sequence[dict[str, Any]], theorem: Sequence[dict[str, Any]]
) -> None:
    def lines(rows: Sequence[dict[str, Any]], cells: Callable[[dict[str, Any], int], list[str]]) -> list[list[str]]:
        return [
            [str(n), *(cell for row in rows for cell in cells(row, row["N"].index(n)))] for n in decades(args.steps)
        ]

    columns = ["N", *(name for row in theorem for name in (f"beta {row['beta']:g}", "bound"))]
    table = lines(
        theorem,
        lambda row, i: [f"{row['measured'][i]:.3g} ±{row['standard_error'][i]:.1g}", f"{row['bound'][i]:.3g}"],
    )
    slopes = ["slope", *(cell for row in theorem for cell in (f"{row['slope']:.2f}", f"{row['beta'] - 1:.2f}"))]
    report.print_table(console, "Mean squared gradient norm over N steps", columns, [*table, slopes])
    same_beta = [row for row in rows if row["beta"] == rows[-1]["beta"]]
    if len(same_beta) > 1:
        columns = ["N", *(f"steps x{row['multiple']:g}" for row in same_beta)]
        table = lines(same_beta, lambda row, i: [f"{row['measured'][i]:.3g}"])
        slopes = ["slope", *(f"{row['slope']:.2f}" for row in same_beta)]
        title = f"Larger steps, outside the theorem (beta {same_beta[0]['beta']:g})"
        report.print_table(console, title, columns, [*table, slopes])


def plot(path: Path, rows: Sequence[dict[str, Any]], theorem: Sequence[dict[str, Any]]) -> None:
    """On the left what the theorem speaks of, on the right larger steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for index, row in enumerate(theorem):
        left.loglog(row["N"], row["measured"], color=f"C{index}", label=f"β = {row['beta']:g}, measured")
        left.loglog(row["N"], row["bound"], "--", color=f"C{index}", label=f"β = {row['beta']:g}, bound")
    left.set(title="with Theorem 1's step sizes", ylabel="squared gradient norm, mean over t ≤ N")
    same_beta = [row for row in rows if row["beta"] == rows[-1]["beta"]]
    for index, row in enumerate(same_beta):
        color = f"C{index + len(theorem)}" if index else f"C{theorem.index(row)}"
        right.loglog(row["N"], row["measured"], color=color, label=f"step sizes x{row['multiple']:g}")
    right.set(title=f"larger steps, outside the theorem (β = {rows[-1]['beta']:g})")
    for axis in (left, right):
        axis.set(xlabel="N")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", loc="lower left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Algorithm 2 of the paper, beside the bound of its Theorem 1.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--betas", type=float, nargs="+", default=(0.6, 0.75, 0.9), help="each between 0.5 and 1")
    parser.add_argument(
        "--multiples",
        type=float,
        nargs="*",
        default=(10, 100),
        help="also run the middle beta with step sizes so many times the theorem's",
    )
    parser.add_argument("--steps", type=int, default=5000, help="the largest N")
    parser.add_argument("--seeds", type=int, default=6, help="how many runs of each, with the seeds 0, 1, ...")
    parser.add_argument("--batch-size", type=int, default=8, help="m")
    parser.add_argument("--damping", type=float, default=3.0, help="eps")
    parser.add_argument("--examples", type=int, default=50, help="images of each of the three classes")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the picture and the JSON file")
    args = parser.parse_args()
    if not all(0.5 < beta < 1 for beta in args.betas):
        parser.error(f"--betas: expected numbers between 0.5 and 1, got {args.betas}.")
    if min(args.seeds, args.batch_size, args.examples, *args.multiples, 1) <= 0 or args.damping <= 0:
        parser.error("--seeds, --batch-size, --examples, --multiples and --damping: expected positive numbers.")
    if args.steps < 10:
        parser.error(f"--steps: expected at least 10, the slope is that of a tenfold, got {args.steps}.")
    return args


if __name__ == "__main__":
    main()
