"""Benchmarks that measure time: steps of several optimizers in turn, parts of a step, and updates by model size."""

import enum
import functools
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from experiments.baselines import shampoo
from experiments.models import Autoencoder, ResNet, Transformer, parameter_count
from flax import nnx
from rich.progress import track

import tnt_optax
from benchmarks.counting import GPT2_SHAPES, array, flops, panels, save, show
from tnt_optax import blocks, options, phases

Model = enum.StrEnum("Model", ["autoencoder", "resnet32", "transformer"])
MODELS = list(Model)
WIDTHS, DEPTHS = [256, 512, 1024, 2048, 4096], [2, 4, 8, 16, 32, 64]
RATE = 1e-4  # A step changes little: only its cost is measured.


class Problem(NamedTuple):
    forward: Callable[..., jax.Array]
    predictive: Any
    params: Any
    batch: tuple[jax.Array, jax.Array]


def make_problem(model: str, width: int, dtype: str, tiny: bool = False, plain: bool = False) -> Problem:
    """A model and random data, which do not change the cost. `width` and `dtype` are those of the transformer."""
    key, rngs, times = jax.random.key(0), nnx.Rngs(0), 1 if tiny or jax.default_backend() == "cpu" else 8
    predictive: Any = tnt_optax.Bernoulli() if model == "autoencoder" else tnt_optax.Categorical()
    if model == "autoencoder":  # The paper's model for MNIST.
        pixels, widths = (16, (8, 4)) if tiny else (784, (1000, 500, 250, 30))
        module: Any = Autoencoder(pixels, widths, rngs=rngs)
        inputs = jax.random.uniform(key, (1000, pixels))
    elif model == "resnet32":
        module = ResNet(*((1, 2) if tiny else (5, 16)), plain=plain, rngs=rngs)
        inputs = jax.random.normal(key, (16 * times, 32, 32, 3))
    else:
        sizes: Any = (64, width, 1, 2, 16) if tiny else (4096, width, 4, max(width // 64, 1), 128)
        module = Transformer(*sizes, stacked=False, dtype=jnp.dtype(dtype), rngs=rngs)
        inputs = jax.random.randint(key, (4 * times, sizes[-1]), 0, sizes[0])
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def forward(params: Any, inputs: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, rest, copy=True)(inputs)

    targets = jax.jit(lambda: predictive.sample(key, forward(params, inputs)))()
    return Problem(forward, predictive, nnx.as_pure(params), (inputs, targets))


def contenders(problem: Problem, plain: Callable[[], Problem]) -> dict[str, Callable[[], Any]]:
    """Functions that return a step, (params, state, i) -> (params, state), and its first arguments, or raise."""
    tnt = functools.partial(tnt_optax.tnt, damping=0.1, trust_radius=0.1, statistics_period=1, inverse_period=20)
    adaptive, of = tnt_optax.adaptive_tnt, functools.partial(functools.partial, with_optax, problem)

    def psgd(rate: float) -> Any:  # It accepts only its own extra arguments.
        kron = importlib.import_module("psgdax").kron(rate, preconditioner_update_probability=1 / 20)
        return optax.GradientTransformation(*kron)

    return {
        "SGD-m": of(optax.sgd, momentum=0.9),
        "Adam": of(optax.adam),
        "Muon": of(optax.contrib.muon),
        "TNT (10, 100)": of(tnt, statistics_period=10, inverse_period=100),
        "TNT (1, 20)": of(tnt),
        "TNT (1, 20), 20 parts": of(tnt, inverse_parts=20),
        "TNT (1, 20), 1/8 sampled": of(tnt, subsample=8),
        "TNT-EF (1, 20)": of(tnt, fisher="empirical"),
        "adaptive TNT (1, 10)": of(adaptive),
        "adaptive TNT (5, 20)": of(adaptive, statistics_period=5, inverse_period=20),
        "kfac-jax NaiveTNT (1, 20)": lambda: with_kfac_jax(plain()),
        "PSGD-Kron (1/20)": of(psgd),
        "Shampoo (1, 20)": of(shampoo),
    }


def with_optax(problem: Problem, make: Callable[..., Any], subsample: int = 1, **settings: Any) -> Any:
    """A gradient transformation. Labels are sampled for 1/`subsample` of the batch, in a separate forward pass."""
    value_and_grads: Any = tnt_optax.value_and_sampled_grad(problem.forward, problem.predictive)
    tx = optax.with_extra_args_support(make(RATE, **settings))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any, i: jax.Array) -> Any:
        key, part = jax.random.key(i), [x[: max(len(x) // subsample, 1)] for x in batch]
        _, grads, whole = value_and_grads(params, *batch, key)
        sampled = whole if subsample == 1 else lambda: value_and_grads(params, *part, key)[2]()
        updates, state = tx.update(grads, state, params, sampled_grads=sampled)  # No cost if it is not called.
        return optax.apply_updates(params, updates), state

    params, state = jax.tree.map(jnp.copy, problem.params), tx.init(problem.params)
    if optax.tree.get_all_with_path(state, "count"):  # After the first period, which has more inverse updates.
        state = optax.tree.set(state, count=np.int32(99))
    return lambda params, state, i: step(params, state, problem.batch, i), (params, state)


def with_kfac_jax(problem: Problem) -> Any:
    """DeepMind's kfac-jax with its TNT blocks: statistics at each step, inverses every 20 steps."""
    kfac_jax: Any = importlib.import_module("kfac_jax")
    matcher: Any = importlib.import_module("kfac_jax._src.tag_graph_matcher")
    # The function of release 0.0.8 unpacks a result that JAX no longer returns. No public function replaces it.
    matcher.eval_jaxpr_eqn = lambda e, x: jax.tree.leaves(e.primitive.bind(*x, **e.primitive.get_bind_params(e.params)))

    def registered(params: Any, batch: Any) -> jax.Array:
        logits = problem.forward(params, batch[0])
        if isinstance(problem.predictive, tnt_optax.Bernoulli):
            kfac_jax.register_sigmoid_cross_entropy_loss(logits, batch[1])
        else:
            kfac_jax.register_softmax_cross_entropy_loss(logits.reshape(-1, logits.shape[-1]), batch[1].reshape(-1))
        return jnp.sum(logits)  # The result is not used. kfac-jax cannot trace some operations of the loss.

    settings = {"l2_reg": 0.0, "num_burnin_steps": 0, "curvature_ema": 0.9, "inverse_update_period": 20}
    settings |= {"value_func_for_estimator": registered, "estimation_mode": "fisher_gradients"}
    settings |= {"register_only_generic": True, "layer_tag_to_block_ctor": {"generic": kfac_jax.NaiveTNT}}
    loss = jax.value_and_grad(lambda p, batch: problem.predictive.loss(problem.forward(p, batch[0]), batch[1]))
    optimizer = kfac_jax.Optimizer(loss, **settings)
    params, key = jax.tree.map(jnp.copy, problem.params), jax.random.key_data(jax.random.key(0))
    args = {name: jnp.float32(x) for name, x in {"learning_rate": RATE, "momentum": 0.9, "damping": 0.1}.items()}
    step = functools.partial(optimizer.step, rng=key, batch=problem.batch, **args)
    state = optimizer.init(params, key, problem.batch)
    return lambda params, state, i: step(params, state, global_step_int=i)[:2], (params, state)


def race(runners: Mapping[str, Callable[[], Any]], steps: int) -> list[dict[str, Any]]:
    """A row for each optimizer, with its error if it has one. The first two steps, which may compile, do not count."""
    rows: dict[str, dict[str, Any]] = {name: {"optimizer": name} for name in runners}
    carries, seconds = {}, {name: [] for name in runners}
    for i, name in track([(i, name) for i in range(steps + 2) for name in runners], "steps in turn"):
        if "error" not in rows[name]:
            try:
                step, carry = carries[name] if i else runners[name]()
                start = time.perf_counter()
                carries[name] = step, jax.block_until_ready(step(*carry, i))
                seconds[name].append(time.perf_counter() - start)
            except Exception as error:
                rows[name] = {"optimizer": name, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    mean, median, _ = summary(seconds["SGD-m"][2:])
    for name in [name for name, row in rows.items() if "error" not in row]:
        its_mean, its_median, its_worst = summary(times := seconds[name][2:])
        rows[name] |= {"median_ms": 1e3 * its_median, "ratio": its_mean / mean, "median_ratio": its_median / median}
        rows[name] |= {"worst_to_median": its_worst / its_median, "ms": [round(1e3 * x, 2) for x in times]}
        state = [x for x in jax.tree.leaves(carries[name][1][1]) if hasattr(x, "nbytes")]
        rows[name] |= {"compile_seconds": seconds[name][0], "state_bytes": sum(x.nbytes for x in state)}
    return list(rows.values())


def summary(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Mean, median and worst. For the mean and the worst, the time of a step is replaced by the median of the steps at
    its place in the period of 20, which removes disturbances. The steps that end a period of 100 are a place of their
    own."""
    places = np.asarray([0 if i % 100 == 0 else 1 + i % 20 for i in range(1, len(seconds) + 1)])
    typical = [np.median(np.asarray(seconds)[places == place]) for place in places]
    return float(np.mean(typical)), float(np.median(seconds)), float(max(typical))


def milliseconds(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median time of each function. They are called in turn. The first call, which may compile, does not count."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for name, function in (rounds + 1) * [*functions.items()]:
        start = time.perf_counter()
        jax.block_until_ready(function())
        times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values[1:])) for name, values in times.items()}


def parts(problem: Problem, rounds: int) -> list[dict[str, Any]]:
    """The time of each part of a step alone, and the time of its arithmetic at the rate of float32 matrix products."""
    params, leaves = problem.params, jax.tree.leaves(problem.params)
    described: Any = blocks.describe(leaves, None, options.MAX_DIM)
    state: Any = tnt_optax.scale_by_tnt().init(leaves)
    value_and_grads: Any = tnt_optax.value_and_sampled_grad(problem.forward, problem.predictive, scale="mean")
    arguments = params, *problem.batch, jax.random.key(0)
    matrices = jax.tree.map(lambda c: jnp.eye(len(c)) if c.ndim == 2 else c + 1, state.contractions)
    functions: dict[str, tuple[Callable[..., Any], Any]] = {
        "gradient": (lambda *args: value_and_grads(*args)[:2], arguments),
        "sampled backward pass": (lambda function: function(), (jax.jit(value_and_grads)(*arguments)[2],)),
        "contractions": (lambda s, g: phases.absorb(described, s, g, due=True).contractions, (state, leaves)),
        "preconditioning": (functools.partial(phases.precondition, described), (matrices, state.momentum)),
        "inverses": (functools.partial(phases.damped_inverses, described, axis=None), (matrices, jnp.float32(0.1))),
        "product": (functools.partial(jnp.matmul, precision="highest"), 2 * (jnp.ones((2048, 2048)),)),
    }
    ms = milliseconds({name: functools.partial(jax.jit(f), *args) for name, (f, args) in functions.items()}, rounds)
    counts = {name: flops(f, *args) for name, (f, args) in functions.items() if name != "inverses"}
    counts["contractions"] /= 2  # They are symmetric: half of the operations suffice.
    counts["inverses"] = sum(len(c) ** 3 for c in jax.tree.leaves(matrices) if c.ndim == 2)  # LAPACK's potrf and potri.
    rate = counts.pop("product") / ms.pop("product")
    return [{"part": name, "ms": ms[name], "floor_ms": counts[name] / rate} for name in ms]


def measure(
    models: Annotated[list[Model], typer.Option(help="name of a model; repeatable")] = MODELS,
    out: Annotated[Path, typer.Option(help="file of the results")] = Path("results/step.json"),
    steps: Annotated[int, typer.Option(help="number of steps, a multiple of 20")] = 100,
    skip: Annotated[list[str] | None, typer.Option(help="optimizer to leave out; repeatable")] = None,
    rounds: Annotated[int, typer.Option(help="number of repetitions of each part of a step")] = 10,
    width: Annotated[int, typer.Option(help="width of the transformer")] = 256,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="dtype of the transformer")] = "float32",
    tiny: Annotated[bool, typer.Option(help="small models, for tests")] = False,
) -> None:
    """Measures the time of a step of each optimizer, relative to SGD with momentum, and of the parts of TNT's step."""
    results, tables = {}, {}
    for model in models:
        make = functools.partial(make_problem, model, width, dtype, tiny)
        runners = contenders(problem := make(), functools.partial(make, plain=True))
        if not {*runners} - {"SGD-m"} >= {*(skip or [])}:
            raise SystemExit(f"--skip: expected some of {[*runners][1:]}, got {skip}.")
        rows = race({name: runner for name, runner in runners.items() if name not in (skip or [])}, steps)
        numbers = {"parameters": parameter_count(problem.params), "batch": len(problem.batch[0])}
        results[model] = {**numbers, "race": rows, "parts": parts(problem, rounds)}
        tables[f"step-{model}"] = show(f"step-{model}", rows)
        tables[f"parts-{model}"] = show(f"parts-{model}", results[model]["parts"])
        save(out, {"steps": steps, "width": width, "dtype": dtype, "models": results, "tables": tables})
    if importlib.util.find_spec("matplotlib"):  # A machine with a GPU may lack it.
        figure, axes = panels(len(results))
        for axis, (name, entry) in zip(axes, results.items(), strict=True):
            ratios = {row["optimizer"]: row["ratio"] for row in reversed(entry["race"]) if "ratio" in row}
            colors = ["tab:red" if name.startswith(("TNT", "adaptive")) else "tab:gray" for name in ratios]
            axis.bar_label(axis.barh([*ratios], [*ratios.values()], color=colors), fmt="%.2f", padding=2)
            axis.set(title=f"{name}, batch {entry['batch']}", xlabel="step / step of SGD-m", xmargin=0.2)
        figure.savefig(out.with_suffix(".png"), dpi=120)


def of_update(params: Any, run: bool = True) -> dict[str, float]:
    """Milliseconds of an update of Adam, and of TNT with an inverse update ("refresh") and without; compile times."""
    seconds, updates, tnt = {}, {}, tnt_optax.tnt(RATE, statistics_period=1, inverse_period=20)
    for name, tx, counts in (("adam", optax.adam(RATE), {"_ms": 41}), ("tnt", tnt, {"_ms": 41, "_refresh_ms": 20})):
        start, update = time.perf_counter(), optax.with_extra_args_support(tx).update
        function: Any = jax.jit(lambda g, state, update=update: update(g, state, g, sampled_grads=lambda: g))
        function = function.lower(params, jax.eval_shape(tx.init, params)).compile()
        seconds[f"{name}_compile_s"] = time.perf_counter() - start
        for label, count in counts.items() if run else ():
            state = optax.tree.set(tx.init(params), count=np.int32(count))
            updates[f"{name}{label}"] = functools.partial(function, params, state)
    return milliseconds(updates, rounds=3) | seconds


def growth(
    widths: Annotated[list[int], typer.Option(help="width of one layer; repeatable")] = WIDTHS,
    depths: Annotated[list[int], typer.Option(help="number of layers of 128x128; repeatable")] = DEPTHS,
    out: Annotated[Path, typer.Option(help="file of the results")] = Path("results/growth.json"),
) -> None:
    """Measures the time of an update alone, by the width of a layer and the number of layers (of GPT-2, to compile)."""
    layers = {"width": (widths, lambda n: jnp.ones((n, n))), "depth": (depths, lambda n: [jnp.ones((128, 128))] * n)}
    results = {k: [{k: n} | of_update(make(n)) for n in track(sizes, k)] for k, (sizes, make) in layers.items()}
    large = of_update([*map(array, GPT2_SHAPES)], run=False)
    figure, axes = panels(2)
    for axis, (name, rows) in zip(axes, results.items(), strict=True):
        sizes = [row[name] for row in rows]
        for key, label in {"tnt_ms": "TNT", "tnt_refresh_ms": "TNT, refreshing", "adam_ms": "Adam"}.items():
            axis.loglog(sizes, [row[key] for row in rows], "o-", label=label)
        axis.minorticks_off()
        axis.set(title=f"an update alone, by {name}", xlabel=name, ylabel="ms", xticks=sizes, xticklabels=sizes)
        axis.legend()
    tables = {f"growth-{name}": show(f"growth-{name}", rows) for name, rows in (results | {"gpt2": [large]}).items()}
    save(out, {"growth": results, "large": large, "tables": tables}, figure)
