"""The programs of examples/ that users copy from: training steps that learn, checkpoints, several processes."""

import contextlib
import io
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tnt_optax

EXAMPLES = Path(__file__).parent.parent / "examples"
PROGRAMS = sorted(EXAMPLES.glob("*.py"))
EXTRA = "the programs need the extra `examples`"
ocp, *_ = (pytest.importorskip(name, reason=EXTRA) for name in ("orbax.checkpoint", "sklearn", "typer"))


def run(program, *arguments):
    """What a program prints that runs in this process, where JAX is imported already."""
    path = str(EXAMPLES / program)
    with (
        mock.patch.object(sys, "argv", [path, *map(str, arguments)]),
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        jax.numpy_dtype_promotion("standard"),  # Flax relies on it.
        jax.set_mesh(jax.make_mesh((1,), ("any",), devices=jax.devices()[:1])),  # Its end removes the program's mesh.
    ):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    return stdout.getvalue()


@pytest.fixture
def start():
    """Starts a program in a process of its own, which ends with the test at the latest."""
    # No cache of compiled programs: one that several processes made together is none for a process alone.
    settings = {"JAX_ENABLE_COMPILATION_CACHE": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
    environment = {**os.environ, **settings, "PYTHONPATH": str(EXAMPLES.parent)}
    with contextlib.ExitStack() as stack:

        def start(program, *arguments):
            words, pipe = [sys.executable, str(EXAMPLES / program), *map(str, arguments)], subprocess.PIPE
            process = stack.enter_context(subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment))
            stack.callback(process.kill)
            return process

        yield start


def outputs(*processes):
    """What processes print that end well."""
    results = [process.communicate(timeout=240) for process in processes]
    assert all(process.returncode == 0 for process in processes), [stderr for _, stderr in results]
    return [stdout for stdout, _ in results]


def wait_until(condition, process):
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def loss_and_digest(stdout, steps):
    ((loss, digest),) = re.findall(rf"step {steps}, loss (\d+\.\d+), SHA-256 ([0-9a-f]{{64}})\n\Z", stdout)
    return float(loss), digest


def newest(directory, *, partial=False):
    """The step of the newest checkpoint that is complete, or also of one that is not."""
    names = (path.name for path in directory.glob("[0-9]*") if partial or path.name.isdigit())
    return max((int(name.partition(".")[0]) for name in names), default=0)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        pytest.param("jax", "jax", marks=pytest.mark.slow),  # The README has almost the same program.
        pytest.param("linen", "flax", marks=pytest.mark.slow),
        ("nnx", "flax"),
        pytest.param("equinox", "equinox", marks=pytest.mark.slow),
        pytest.param("haiku", "haiku", marks=pytest.mark.slow),
    ],
)
def test_steps_learn(name, package):
    pytest.importorskip(package, reason=EXTRA)
    rows = re.findall(r"step \d+: loss (\d\.\d+), test accuracy (\d+\.\d)%", run(f"step_{name}.py"))
    assert float(rows[-1][0]) < float(rows[0][0]) / 3
    assert float(rows[-1][1]) > 95


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_programs_can_be_copied_out_of_their_folder(program):
    imported = re.findall(r"^ *(?:import|from) (\w+)", program.read_text(), re.MULTILINE)
    assert {"tnt_optax", *(path.stem for path in EXAMPLES.iterdir())}.intersection(imported) == {"tnt_optax"}


def test_the_gallery_shows_every_program_and_only_files_that_exist():
    links = set(re.findall(r"\]\(([^)#:]+)", (EXAMPLES / "README.md").read_text()))
    assert links >= {path.name for path in PROGRAMS}
    assert all((EXAMPLES / link).exists() for link in links)


@pytest.mark.slow
def test_run_that_goes_on_ends_with_the_same_bytes(tmp_path):
    def train(name, steps, *arguments):
        words = ("--directory", tmp_path / name, "--steps", steps, "--width", 8, *arguments)
        return loss_and_digest(run("checkpoint.py", *words), steps)

    through, stopped = train("through", 12), train("stopped", 7)  # Between two updates of the inverses.
    assert newest(tmp_path / "stopped") == 7
    assert train("stopped", 12) == through != stopped
    for option, there, here in (("--width", "'width': 8", "'width': 9"), ("--seed", "'seed': 0", "'seed': 9")):
        with pytest.raises(SystemExit, match=f"through is of another run: .*{there}.* there, and .*{here}.* here"):
            train("through", 20, option, 9)
    assert newest(tmp_path / "through") == 12


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_run_that_is_killed_ends_with_the_same_bytes(tmp_path, start, seed):
    directory, rng = tmp_path / "killed", np.random.default_rng(seed)
    train = lambda name: start("checkpoint.py", "--directory", tmp_path / name, "--steps", 100, "--every", 3)  # noqa: E731
    for _ in range(3):  # Each shortly after it began to write one of its first few checkpoints.
        target, process = newest(directory) + 3 * rng.integers(1, 5), train("killed")
        wait_until(lambda target=target: newest(directory, partial=True) >= target, process)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert 0 < newest(directory) < 100  # There is something to restore, and something left to do.
    assert outputs(train("killed")) == outputs(train("through"))
    assert {path.name for path in directory.iterdir()} == {"99", "100"}  # The two newest, and nothing half written.


def test_state_returns_as_it_was(tmp_path):
    params = {"w": jnp.linspace(-1, 1, 12, dtype=jnp.bfloat16).reshape(4, 3), "b": [jnp.ones(3), jnp.float32(0.5)]}
    tx = tnt_optax.tnt(0.03, damping=0.1, trust_radius=0.1, statistics_period=2, inverse_period=5)
    update = jax.jit(lambda state: tx.update(params, state, params, sampled_grads=params))
    _, state = update(tx.init(params))
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        restored = manager.restore(1, args=ocp.args.StandardRestore(jax.eval_shape(tx.init, params)))
    chex.assert_trees_all_equal((restored, update(restored)), (state, update(state)), strict=True)


def start_two(start, directory, *arguments):
    """Two processes of two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        words = ("--coordinator", f"localhost:{free.getsockname()[1]}", "--processes", 2, "--virtual-devices", 2)
    words += ("--directory", directory, "--width", 16, "--every", 3, *arguments)
    return [start("distributed.py", "--process", process, *words) for process in range(2)]


# Along `data` the processes hold different images, along `model` the same.
@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 2), (1, 4)])
def test_two_processes_hold_the_same_and_what_one_alone_would(tmp_path, start, mesh):
    def alone(name, *arguments):
        words = ("--mesh", jax.device_count(), 1, "--directory", tmp_path / name, "--width", 16, "--steps", 4)
        return loss_and_digest(run("distributed.py", *words, *arguments), 4)

    two = outputs(*start_two(start, tmp_path / "two", "--mesh", *mesh, "--steps", 4))
    loss, digest = loss_and_digest(two[0], 4)
    assert loss_and_digest(two[1], 4) == (loss, digest)  # Bit for bit: parameters, statistics, inverses, counters.
    assert alone("two")[1] == digest  # Restored on another mesh.
    with pytest.raises(SystemExit, match=r"two is of another run: .*'batch_size': 128} there, .*: 64} here"):
        alone("two", "--batch-size", 64)
    shutil.rmtree(tmp_path / "two" / "4")
    # The same float32 sums, but over the network in an order of its own; the loss falls from 2.3 in these steps.
    assert [alone("two")[0], alone("one")[0]] == pytest.approx([loss] * 2, rel=1e-3)  # From step 3, and from 0.


@pytest.mark.slow
def test_one_killed_ends_the_other_and_both_go_on_on_another_mesh(tmp_path, start):
    first, second = start_two(start, tmp_path, "--mesh", 2, 2, "--steps", 1_000_000)
    wait_until(lambda: newest(tmp_path), first)
    second.kill()
    _, stderr = first.communicate(timeout=120)
    assert first.returncode != 0
    # One or the other comes first: a message from the collective that was under way, or the heartbeat that is missing.
    assert re.search(r"another task died|stopped sending heartbeats|Gloo|peer", stderr), stderr
    steps = newest(tmp_path) + 10
    two = outputs(*start_two(start, tmp_path, "--mesh", 4, 1, "--steps", steps))
    assert loss_and_digest(two[0], steps) == loss_and_digest(two[1], steps)


def test_what_does_not_fit_is_said(tmp_path):
    for words, message in (
        ("--mesh 3 7 --batch-size 21", f"--mesh 3 7 needs 21 devices, got {jax.device_count()}"),
        ("--mesh 4 1 --batch-size 30", "--batch-size 30 is no multiple of the 4 devices"),
    ):
        with pytest.raises(SystemExit, match=message):
            run("distributed.py", "--directory", tmp_path, *words.split())
