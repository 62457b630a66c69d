"""What a step of TNT costs, beside other optimizers, and where its time goes.

The optimizers take their steps in turn, in one process: a machine that slows down slows all of them down. The numbers
are ratios to the step of SGD with momentum. Data are random, because no step depends on them.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from common import report
from common.contenders import contenders
from common.models import Autoencoder, ResNet32, Transformer, gpt2
from common.training import Problem
from flax import nnx
from rich.console import Console

import tnt_optax
from tnt_optax import phases
from tnt_optax.blocks import describe
from tnt_optax.options import MAX_DIM

MODELS = ("autoencoder", "resnet32", "transformer")
PARTS = ("gradient", "sampled backward pass", "contractions", "preconditioning", "inverses")


def make_problem(model: str, plain: bool = False) -> Problem:
    """The model, a distribution of its targets, and one batch of random data."""
    on_cpu, keys, rngs = jax.default_backend() == "cpu", jax.random.split(jax.random.key(0)), nnx.Rngs(0)
    if model == "autoencoder":  # The paper's for MNIST.
        module: nnx.Module = Autoencoder(784, (1000, 500, 250, 30), plain=plain, rngs=rngs)
        inputs = targets = jax.random.uniform(keys[0], (1000, 784))
        predictive: Any = tnt_optax.Bernoulli()
    elif model == "resnet32":
        module, batch = ResNet32(plain=plain, rngs=rngs), 16 if on_cpu else 128
        inputs, targets = jax.random.normal(keys[0], (batch, 32, 32, 3)), jax.random.randint(keys[1], (batch,), 0, 10)
        predictive = tnt_optax.Categorical()
    else:
        module, batch = Transformer(vocabulary=4096, width=256, layers=4, length=128, rngs=rngs), 4 if on_cpu else 32
        inputs = jax.random.randint(keys[0], (batch, 128), 0, 4096)
        targets, predictive = jnp.roll(inputs, -1, axis=1), tnt_optax.Categorical()
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def forward(params: Any, inputs: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, rest, copy=True)(inputs)

    batch = (inputs, targets)
    return Problem(model, forward, predictive, nnx.as_pure(params), batch, batch, len(inputs))


def race(problem: Problem, steps: int, skip: Sequence[str], progress: Any) -> list[dict[str, Any]]:
    """One row for each optimizer; an optimizer that fails has the error instead of numbers."""
    rows: dict[str, dict[str, Any]] = {}
    running = {}
    for name, make in contenders(lambda: make_problem(problem.name, plain=True)).items():
        rows[name] = {"optimizer": name}
        if name in skip:
            rows[name]["error"] = "skipped"
            continue
        ticker = report.Ticker(progress, f"{problem.name}: {name}", steps, shows="ms")
        try:
            contender = make(problem)
            contender.step(0)
        except Exception as error:
            rows[name]["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            ticker.skip_to(steps, "failed")
            continue
        rows[name] |= {"compile_seconds": contender.compile_seconds, "state_bytes": contender.state_bytes}
        running[name] = (contender, ticker, [])
    for i in range(1, steps + 1):
        for contender, ticker, seconds in running.values():
            start = time.perf_counter()
            contender.step(i)
            seconds.append(time.perf_counter() - start)
            ticker(1e3 * seconds[-1])
    for name, (_, _, seconds) in running.items():
        rows[name] |= {
            "median_ms": 1e3 * float(np.median(seconds)),
            "ratio": typical_mean(seconds) / typical_mean(running["SGD-m"][2]),
            "median_ratio": float(np.median(seconds) / np.median(running["SGD-m"][2])),
            "worst_to_median": max(typical(seconds)) / float(np.median(seconds)),
            "ms": [round(1e3 * value, 2) for value in seconds],
        }
    return list(rows.values())


def typical(seconds: Sequence[float]) -> list[float]:
    """Of each step i = 1, 2, ... the median over those at the same place of a period of 20, which leaves out what the
    machine does besides; a step that ends a period of 100 has none like it."""
    places = [0 if i % 100 == 0 else 1 + i % 20 for i in range(1, len(seconds) + 1)]
    medians = {
        place: float(np.median([s for s, p in zip(seconds, places, strict=True) if p == place])) for place in places
    }
    return [medians[place] for place in places]


def typical_mean(seconds: Sequence[float]) -> float:
    return float(np.mean(typical(seconds)))


def seconds_of(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median seconds of each, called in turn; the first call, which may compile, does not count."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values[1:])) for name, values in times.items()}


def parts(problem: Problem, rounds: int) -> list[dict[str, Any]]:
    """The parts of a step, each alone, and what the arithmetic costs at the machine's rate of matrix products."""
    value_and_grads = tnt_optax.value_and_sampled_grad(problem.forward, problem.predictive, scale="mean")
    inputs, targets = problem.train
    loss = jax.jit(
        lambda p: jax.value_and_grad(lambda p: problem.predictive.loss(problem.forward(p, inputs), targets))(p)
    )
    sampled_grads = jax.jit(value_and_grads)(problem.params, inputs, targets, jax.random.key(0))[2]
    backward = jax.jit(lambda f: f())
    leaves = jax.tree.leaves(problem.params)
    blocks = describe(leaves, None, MAX_DIM)
    state: Any = tnt_optax.scale_by_tnt().init(leaves)
    statistics = jax.jit(lambda state, gradients: phases.absorb(blocks, state, gradients, due=True, decay=0.9))
    rng = np.random.default_rng(0)

    def positive(d: int, ndim: int) -> jax.Array:
        root = rng.normal(size=(d, d + 8)).astype(np.float32)
        return jnp.asarray(root @ root.T / d if ndim == 2 else np.square(root[:, 0]))

    matrices = [tuple(positive(c.shape[-1], c.ndim) for c in cs) for cs in state.contractions]
    invert = jax.jit(lambda matrices: phases.damped_inverses(blocks, matrices, jnp.float32(0.1), axis=None))
    precondition = jax.jit(lambda momentum, inverses: phases.precondition(blocks, inverses, momentum))
    n = 2048
    square = jnp.ones((n, n))
    product = jax.jit(lambda x: x @ x)
    numpy_matrices = [
        np.asarray(m) + 0.1 * np.eye(len(m), dtype=np.float32) for ms in matrices for m in ms if m.ndim == 2
    ]

    potrf, potri = scipy.linalg.get_lapack_funcs(("potrf", "potri"), dtype=np.float32)

    def lapack() -> None:
        for matrix in numpy_matrices:
            potri(potrf(matrix, lower=1)[0], lower=1)

    measured = seconds_of(
        {
            "gradient": lambda: loss(problem.params),
            "sampled backward pass": lambda: backward(sampled_grads),
            "contractions": lambda: statistics(state, leaves).contractions,
            "preconditioning": lambda: precondition(leaves, matrices),
            "inverses": lambda: invert(matrices),
            "product": lambda: product(square),
            "lapack": lapack,
        },
        rounds,
    )
    rate = 2 * n**3 / measured["product"]
    # A mode of length d costs d times the parameter's elements; of a contraction, one half is the mirror of the other.
    mode_flops = sum(
        2 * c.shape[-1] * x.size for x, cs in zip(leaves, state.contractions, strict=True) for c in cs if c.ndim == 2
    )
    floors = {
        "gradient": _flops(loss, problem.params) / rate,
        "sampled backward pass": _flops(backward, sampled_grads) / rate,
        "contractions": mode_flops / 2 / rate,
        "preconditioning": mode_flops / rate,
        "inverses": measured["lapack"],
    }
    return [{"part": name, "ms": 1e3 * measured[name], "floor_ms": 1e3 * floors[name]} for name in PARTS]


def _flops(function: Any, *args: Any) -> float:
    analysis = function.lower(*args).compile().cost_analysis()
    return float((analysis or {}).get("flops", math.nan))


def growth(widths: Sequence[int], depths: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """An update alone, of one dense layer that grows wider, and of more and more layers of 128x128."""
    by_width = []
    for width in widths:
        params = {"w": jnp.ones((width, width))}
        seconds, _ = _updates(params, rounds=3)
        by_width.append({"width": width, **{f"{name}_ms": 1e3 * value for name, value in seconds.items()}})
    by_depth = []
    for depth in depths:
        params = [jnp.ones((128, 128)) for _ in range(depth)]
        seconds, compiling = _updates(params, rounds=5)
        by_depth.append(
            {
                "depth": depth,
                **{f"{name}_ms": 1e3 * value for name, value in seconds.items()},
                **{f"{name}_compile_s": value for name, value in compiling.items()},
            }
        )
    return {"width": by_width, "depth": by_depth}


def _updates(params: Any, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    adam, tnt = optax.adam(1e-3), tnt_optax.tnt(1e-3, statistics_period=1, inverse_period=20)
    state: Any = tnt.init(params)
    later = (state[0]._replace(count=jnp.int32(41), inverses=state[0].contractions), *state[1:])
    compiling: dict[str, float] = {}

    def compiled(name: str, update: Callable[..., Any], state: Any) -> Callable[..., Any]:
        start = time.perf_counter()
        result = jax.jit(update).lower(params, state, params).compile()
        compiling[name] = time.perf_counter() - start
        return result

    adam_state = adam.init(params)
    first_order = compiled("adam", adam.update, adam_state)
    second_order = compiled("tnt", lambda g, s, p: tnt.update(g, s, p, sampled_grads=g), state)
    seconds = seconds_of(
        {
            "adam": lambda: first_order(params, adam_state, params),
            "tnt": lambda: second_order(params, later, params),
            "tnt_refresh": lambda: second_order(params, state, params),
        },
        rounds,
    )
    return seconds, compiling


def large() -> dict[str, float]:
    """Seconds until the update of a transformer of 124M parameters (GPT-2's shapes) is compiled; nothing is run."""
    shapes = [shape for of_kind in gpt2().values() for shape in of_kind]
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    tx = tnt_optax.tnt(1e-3)
    start = time.perf_counter()
    state = jax.eval_shape(tx.init, params)
    jax.jit(lambda g, s: tx.update(g, s, sampled_grads=lambda: g)).lower(params, state).compile()
    return {
        "parameters": sum(math.prod(shape) for shape in shapes),
        "compile_seconds": time.perf_counter() - start,
        "state_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
    }


def main() -> None:
    args = parse_args()
    console = Console()
    result: dict[str, Any] = {"machine": report.machine(), "steps": args.steps, "models": {}}
    args.out.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        problem = make_problem(model)
        parameters = sum(x.size for x in jax.tree.leaves(problem.params))
        with report.progress_bar(console) as progress:
            rows = race(problem, args.steps, args.skip, progress)
        entry = {
            "parameters": parameters,
            "batch": problem.batch_size,
            "race": rows,
            "parts": parts(problem, args.rounds),
        }
        result["models"][model] = entry
        print_race(console, f"{model}: {parameters:,} parameters, batch {problem.batch_size}", rows)
        print_parts(console, entry["parts"])
        report.save_json(args.out / "bench.json", result)
    if args.growth:
        result["growth"] = growth(args.widths, args.depths)
        result["large"] = large()
        for name, rows in result["growth"].items():
            columns = list(rows[0])
            report.print_table(
                console, f"An update alone, by {name}", columns, [[f"{r[c]:.4g}" for c in columns] for r in rows]
            )
        console.print(
            f"{result['large']['parameters']:,} parameters: compiled in {result['large']['compile_seconds']:.1f} s, "
            f"{result['large']['state_bytes'] / 1e9:.2f} GB of state."
        )
        report.save_json(args.out / "bench.json", result)
    report.plot_bench(args.out / "bench.png", result)


def print_race(console: Console, title: str, rows: Sequence[dict[str, Any]]) -> None:
    columns = ["optimizer", "ms per step", "/ SGD-m", "median / SGD-m", "worst / median", "compile s", "state MB"]
    table = [
        [row["optimizer"], row["error"], *[""] * 5]
        if "error" in row
        else [
            row["optimizer"],
            f"{row['median_ms']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['median_ratio']:.2f}",
            f"{row['worst_to_median']:.2f}",
            f"{row['compile_seconds']:.1f}",
            f"{row['state_bytes'] / 1e6:.1f}",
        ]
        for row in rows
    ]
    report.print_table(console, title, columns, table)


def print_parts(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    table = [[row["part"], f"{row['ms']:.2f}", f"{row['floor_ms']:.2f}"] for row in rows]
    report.print_table(console, "Each part alone", ["part", "ms", "floor, ms"], table)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--steps", type=int, default=100, help="of each optimizer; 100 is one period of TNT (10, 100)")
    parser.add_argument("--skip", nargs="*", default=(), help="names of optimizers to leave out")
    parser.add_argument("--rounds", type=int, default=10, help="how often each part is timed")
    parser.add_argument("--growth", action=argparse.BooleanOptionalAction, default=True, help="width, depth, 124M")
    parser.add_argument("--widths", type=int, nargs="+", default=(256, 512, 1024, 2048, 4096))
    parser.add_argument("--depths", type=int, nargs="+", default=(2, 4, 8, 16, 32, 64))
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON file and the picture")
    return parser.parse_args()


if __name__ == "__main__":
    main()
