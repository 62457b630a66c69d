"""A run of examples/checkpoint.py that is stopped or killed, and started again, ends like one that ran through."""

import contextlib
import io
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import sampled_grad_of

import tnt_optax

ROOT = Path(__file__).parent.parent
ocp = pytest.importorskip("orbax.checkpoint", reason="the example needs the extra `examples`")
pytest.importorskip("sklearn", reason="the example needs the extra `examples`")


PROGRAM = str(ROOT / "examples/checkpoint.py")
RUN = ("--widths", 8)


def train(directory, steps, *arguments):
    """Runs the program in this process, where JAX is imported already, and returns its last line."""
    words = [PROGRAM, "--directory", directory, "--steps", steps, *RUN, *arguments]
    with (
        mock.patch.object(sys, "argv", [str(word) for word in words]),
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        jax.numpy_dtype_promotion("standard"),  # Flax relies on it.
    ):
        runpy.run_path(PROGRAM, run_name="__main__")
    return checked(stdout.getvalue(), steps)


def checked(stdout, steps):
    line = stdout.splitlines()[-1]
    assert re.fullmatch(rf"step {steps}, loss \d+\.\d{{4}}, SHA-256 [0-9a-f]{{64}}", line)
    return line


def start(directory, steps):
    """The program in a process of its own, which saves a checkpoint every third step."""
    words = ("--directory", directory, "--steps", steps, "--every", 3, *RUN)
    # Compiling would be most of what these small runs do: do little of it, and once.
    settings = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, PROGRAM, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings},
    )


def last_line(directory, steps):
    with start(directory, steps) as process:
        try:
            stdout, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0, stderr
    return checked(stdout, steps)


def complete(directory):
    """The steps whose checkpoints are complete."""
    return {int(path.name) for path in directory.glob("*") if path.name.isdigit()}


def kill(directory, rng):
    """Starts a run and kills it shortly after it began to write one of its first few checkpoints."""
    before, seen, wanted = set(directory.glob("*")), set(), rng.randint(1, 5)
    with start(directory, 40) as process:
        try:
            deadline = time.monotonic() + 120
            while len(seen) < wanted and process.poll() is None and time.monotonic() < deadline:
                seen |= {path.name.partition(".")[0] for path in set(directory.glob("*")) - before}
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.1))
        finally:
            process.kill()
    return process.returncode


def killed(directory, kills, seed):
    """The newest complete checkpoint after each of some kills, and the last line of the run that ends."""
    rng, newest = random.Random(seed), []
    for _ in range(kills):
        assert kill(directory, rng) == -signal.SIGKILL
        newest.append(max(complete(directory), default=0))
    return newest, last_line(directory, 40)


# Between two updates of the inverses, and before one.
@pytest.mark.parametrize("steps", [7, pytest.param(10, marks=pytest.mark.slow)])
def test_run_that_goes_on_ends_with_the_same_bytes(tmp_path, steps):
    through = train(tmp_path / "through", 12)
    train(tmp_path / "stopped", steps)
    assert max(complete(tmp_path / "stopped")) == steps
    assert train(tmp_path / "stopped", 12) == through

    with pytest.raises(SystemExit) as error:
        train(tmp_path / "through", 20, "--widths", 9)
    assert str(tmp_path / "through") in str(error.value)
    assert "['layers'][0]['bias'] is (8,) there, and (9,) here" in str(error.value)
    assert max(complete(tmp_path / "through")) == 12


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "seed"), [(2, 0), *((3, seed) for seed in range(1, 7))])
def test_run_that_is_killed_ends_with_the_same_bytes(tmp_path, kills, seed):
    through = last_line(tmp_path / "through", 40)
    newest, line = killed(tmp_path / "killed", kills, seed)
    assert 0 < newest[-1] < 40  # There was something to restore, and something left to do.
    assert newest == sorted(newest)
    assert line == through
    # Only the two newest remain, and nothing half written.
    assert complete(tmp_path / "killed") == {39, 40}
    assert not list((tmp_path / "killed").glob("*tmp*"))


OPTIMIZERS = {
    "tnt": lambda **kw: tnt_optax.tnt(0.03, damping=0.1, **kw),
    "adaptive_tnt": tnt_optax.adaptive_tnt,
}


@pytest.mark.parametrize("optimizer", ["tnt", pytest.param("adaptive_tnt", marks=pytest.mark.slow)])
def test_state_returns_as_it_was(tmp_path, optimizer):
    params = {"w": jnp.linspace(-1, 1, 12, dtype=jnp.bfloat16).reshape(4, 3), "b": [jnp.ones(3), jnp.float32(0.5)]}
    grads = jax.tree.map(lambda x: jnp.cos(x) + jnp.ones_like(x), params)
    tx = OPTIMIZERS[optimizer](trust_radius=0.1, statistics_period=2, inverse_period=5)
    sampled = grads if optimizer == "tnt" else sampled_grad_of(grads)
    update = jax.jit(lambda state: tx.update(grads, state, params, sampled_grads=sampled))
    state = tx.init(params)
    for _ in range(3):
        _, state = update(state)

    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(3, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        restored = manager.restore(3, args=ocp.args.StandardRestore(jax.eval_shape(tx.init, params)))

    assert isinstance(restored[0], tnt_optax.TNTState)
    assert int(restored[0].count) == 3
    for now, then in ((restored, state), (update(restored), update(state))):
        assert jax.tree.structure(now) == jax.tree.structure(then)
        for x, y in zip(jax.tree.leaves(now), jax.tree.leaves(then), strict=True):
            assert x.dtype == y.dtype
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
