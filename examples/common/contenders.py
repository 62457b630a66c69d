"""Optimizers whose steps are timed: each takes one step of the same problem at a time."""

import dataclasses
import functools
import importlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import tnt_optax
from common.baselines import shampoo
from common.training import Problem, subsampled


@dataclasses.dataclass
class Contender:
    """An optimizer after its first step: `step(i)` makes the i-th of those that follow, and waits for it."""

    compile_seconds: float
    state_bytes: int
    step: Callable[[int], None]


def contenders(kfac_problem: Callable[[], Problem]) -> dict[str, Callable[[Problem], Contender]]:
    """All of them by name; each raises what it fails with. `kfac_problem` makes a problem that kfac-jax can trace."""
    learning_rate = 1e-4  # No step gets far; only its cost is measured.

    def tnt(statistics_period: int, inverse_period: int, subsample: int = 1, **tx_options: Any) -> Any:
        tx = tnt_optax.tnt(
            learning_rate,
            damping=0.1,
            trust_radius=0.1,
            statistics_period=statistics_period,
            inverse_period=inverse_period,
            **tx_options,
        )
        subsample = 0 if tx_options.get("fisher") == "empirical" else subsample
        return functools.partial(with_optax, tx=tx, early_steps=inverse_period, subsample=subsample)

    def adaptive_tnt(statistics_period: int, inverse_period: int) -> Any:
        tx = tnt_optax.adaptive_tnt(learning_rate, statistics_period=statistics_period, inverse_period=inverse_period)
        return functools.partial(with_optax, tx=tx, early_steps=inverse_period, subsample=1)

    def psgd(problem: Problem) -> Contender:
        psgdax: Any = importlib.import_module("psgdax")
        return with_optax(problem, psgdax.kron(learning_rate, preconditioner_update_probability=1 / 20))

    return {
        "SGD-m": functools.partial(with_optax, tx=optax.sgd(learning_rate, momentum=0.9)),
        "Adam": functools.partial(with_optax, tx=optax.adam(learning_rate)),
        "Muon": functools.partial(with_optax, tx=optax.contrib.muon(learning_rate)),
        "TNT (10, 100)": tnt(10, 100),
        "TNT (1, 20)": tnt(1, 20),
        "TNT (1, 20), 20 parts": tnt(1, 20, inverse_parts=20),
        "TNT (1, 20), 1/8 sampled": tnt(1, 20, subsample=8),
        "TNT-EF (1, 20)": tnt(1, 20, fisher="empirical"),
        "adaptive TNT (1, 5)": adaptive_tnt(1, 5),
        "adaptive TNT (5, 20)": adaptive_tnt(5, 20),
        "kfac-jax NaiveTNT (1, 20)": lambda _: with_kfac_jax(kfac_problem(), learning_rate),
        "PSGD-Kron (1/20)": psgd,
        "Shampoo (1, 20)": functools.partial(with_optax, tx=shampoo(learning_rate), early_steps=20),
    }


def with_optax(problem: Problem, tx: Any, *, early_steps: int = 0, subsample: int = 0) -> Contender:
    """A gradient transformation.

    Args:
      problem: what it trains.
      tx: the transformation.
      early_steps: the number of first steps, in which it updates its inverses more often; they are skipped.
      subsample: 0: no labels are sampled; 1: for all examples; else for one in so many of a batch, with a forward pass
        of their own.
    """
    value_and_grads = subsampled(
        tnt_optax.value_and_sampled_grad(problem.forward, problem.predictive), max(subsample, 1)
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, inputs: Any, targets: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads, sampled_grads = value_and_grads(params, inputs, targets, key)
        extra = {"sampled_grads": sampled_grads} if subsample else {}
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, loss

    batch = problem.train[0][: problem.batch_size], problem.train[1][: problem.batch_size]
    key = jax.random.key(0)
    params = jax.tree.map(jnp.copy, problem.params)
    opt_state = tx.init(params)
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(opt_state))
    start = time.perf_counter()
    compiled = step.lower(params, opt_state, batch[0], batch[1], key).compile()
    compile_seconds = time.perf_counter() - start
    params, opt_state, _ = compiled(params, opt_state, *batch, key)
    if early_steps:

        def after(path: Any, x: jax.Array) -> jax.Array:
            return jnp.int32(early_steps) if str(path[-1]) == ".count" else x

        opt_state = jax.tree_util.tree_map_with_path(after, opt_state)
    carry = [params, opt_state]

    def advance(i: int) -> None:
        carry[0], carry[1], loss = compiled(*carry, *batch, jax.random.fold_in(key, i))
        jax.block_until_ready((carry, loss))

    return Contender(compile_seconds, state_bytes, advance)


def with_kfac_jax(problem: Problem, learning_rate: float) -> Contender:
    """DeepMind's kfac-jax with its TNT blocks: statistics at every step, inverses every 20 steps."""
    kfac_jax: Any = importlib.import_module("kfac_jax")
    # Its release 0.0.8 unpacks what JAX no longer returns; nothing public can replace that, and without it the one peer
    # that does the same arithmetic could not race.
    matcher: Any = importlib.import_module("kfac_jax._src.tag_graph_matcher")
    matcher.eval_jaxpr_eqn = _evaluate
    register: Any = {
        tnt_optax.Bernoulli: kfac_jax.register_sigmoid_cross_entropy_loss,
        tnt_optax.Categorical: lambda logits, labels: kfac_jax.register_softmax_cross_entropy_loss(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        ),
    }[type(problem.predictive)]

    def loss(params: Any, batch: Any) -> jax.Array:
        return problem.predictive.loss(problem.forward(params, batch[0]), batch[1])

    def registered(params: Any, batch: Any) -> jax.Array:
        outputs = problem.forward(params, batch[0])
        register(outputs, batch[1])
        return jnp.sum(outputs)  # What it returns does not matter; the loss itself has operations that it can't trace.

    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss),
        l2_reg=0.0,
        value_func_for_estimator=registered,
        learning_rate_schedule=lambda _: jnp.float32(learning_rate),
        momentum_schedule=lambda _: jnp.float32(0.9),
        damping_schedule=lambda _: jnp.float32(0.1),
        num_burnin_steps=0,
        estimation_mode="fisher_gradients",
        curvature_ema=0.9,
        curvature_update_period=1,
        inverse_update_period=20,
        register_only_generic=True,
        layer_tag_to_block_ctor={"generic": kfac_jax.NaiveTNT},
    )
    batch = problem.train[0][: problem.batch_size], problem.train[1][: problem.batch_size]
    params, key = jax.tree.map(jnp.copy, problem.params), jax.random.key_data(jax.random.key(0))
    start = time.perf_counter()
    state = optimizer.init(params, key, batch)
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state) if hasattr(x, "nbytes"))
    # It compiles in its first step, which is counted with the rest.
    carry = list(optimizer.step(params, state, key, batch=batch, global_step_int=0)[:2])
    jax.block_until_ready(carry[0])
    compile_seconds = time.perf_counter() - start

    def advance(i: int) -> None:
        carry[:] = optimizer.step(*carry, key, batch=batch, global_step_int=i + 1)[:2]
        jax.block_until_ready(carry[0])

    return Contender(compile_seconds, state_bytes, advance)


def _evaluate(equation: Any, inputs: Any) -> Any:
    outputs = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
    return outputs if isinstance(outputs, list | tuple) else [outputs]
