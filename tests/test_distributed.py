"""examples/distributed.py in one process and in two, which are stopped and go on, on meshes of several shapes."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ocp = pytest.importorskip("orbax.checkpoint", reason="the example needs the extra `examples`")
pytest.importorskip("sklearn", reason="the example needs the extra `examples`")


def start(directory, processes, *arguments):
    """The processes of a run, of four devices in all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    words = ["--directory", directory, "--virtual-devices", 4 // processes, "--widths", 16, "--every", 5, *arguments]
    if processes > 1:
        words += ["--coordinator", coordinator, "--processes", processes]
    # No cache of compiled programs: one that several processes made together is none for a process alone.
    environment = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "examples/distributed.py"), *map(str, words), "--process", str(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"JAX_ENABLE_COMPILATION_CACHE": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        )
        for process in range(processes)
    ]


def finished(running):
    """Exit status, last line and errors of each process."""
    results = []
    try:
        for process in running:
            stdout, stderr = process.communicate(timeout=240)
            results.append((process.returncode, stdout.splitlines()[-1] if stdout else "", stderr))
    finally:
        for process in running:
            process.kill()
    return results


def losses_and_digests(running):
    lines = []
    for code, line, stderr in finished(running):
        assert code == 0, stderr
        match = re.fullmatch(r"process \d: \d+ steps, loss of the last batch (\d+\.\d+), SHA-256 ([0-9a-f]{64})", line)
        assert match, line
        lines.append((float(match[1]), match[2]))
    return [loss for loss, _ in lines], {digest for _, digest in lines}


# Along `data` the processes hold different images, along `model` the same.
@pytest.mark.parametrize("mesh", [(2, 2), pytest.param((1, 4), marks=pytest.mark.slow)])
def test_two_processes_hold_the_same_and_what_one_alone_would(tmp_path, mesh):
    steps = ("--mesh", *mesh, "--steps", 12)  # Inverses are updated in the first steps, and in the eleventh.
    losses, digests = losses_and_digests(start(tmp_path / "two", 2, *steps))
    assert len(losses) == 2
    assert len(digests) == 1  # Bit for bit: parameters, momentum, statistics, inverses, counters.
    (alone,), _ = losses_and_digests(start(tmp_path / "one", 1, *steps))
    # The same float32 sums, but over the network in an order of its own; the loss falls from 46 to 33 in these steps.
    assert losses == pytest.approx([alone] * 2, rel=1e-3)


@pytest.mark.slow
def test_one_killed_ends_the_other_and_both_go_on_on_another_mesh(tmp_path):
    running = start(tmp_path / "killed", 2, "--mesh", 2, 2, "--steps", 1_000_000)
    try:
        deadline = time.monotonic() + 200
        while not any(path.name.isdigit() for path in (tmp_path / "killed").glob("*")):
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in running), running[0].communicate()[1]
            time.sleep(0.05)
        running[1].kill()
        _, stderr = running[0].communicate(timeout=120)
    finally:
        for process in running:
            process.kill()
    assert running[0].returncode != 0
    # One or the other comes first: a message from the collective that was under way, or the heartbeat that is missing.
    assert re.search(r"another task died|stopped sending heartbeats|Gloo|peer", stderr), stderr
    with ocp.CheckpointManager(tmp_path / "killed") as manager:
        step = manager.latest_step()
    arguments = ("--steps", step + 10)
    losses, digests = losses_and_digests(start(tmp_path / "killed", 2, "--mesh", 4, 1, *arguments))
    assert len(digests) == 1
    (alone,), _ = losses_and_digests(start(tmp_path / "alone", 1, "--mesh", 1, 4, *arguments))
    assert losses == pytest.approx([alone] * 2, rel=1e-3)  # See above.

    ((code, _, stderr),) = finished(start(tmp_path / "killed", 1, "--mesh", 2, 2, "--widths", 32, "--steps", step + 20))
    assert code == 1
    assert re.search(r"killed is of another run: .* is \(16,\) there, and \(32,\) here", stderr), stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mesh", 2, 4), "--mesh 2 4 needs 8 devices, got 4"),
        (("--mesh", 4, 1, "--batch-size", 30), "--batch-size 30 is no multiple of the 4 devices"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, arguments, message):
    ((code, _, stderr),) = finished(start(tmp_path, 1, *arguments))
    assert code == 2
    assert message in stderr
