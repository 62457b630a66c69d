"""The programs under examples/ run, and write what they say."""

import argparse
import contextlib
import functools
import importlib
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="the examples need the extra `examples`")
pytest.importorskip("matplotlib", reason="the examples need the extra `examples`")
pytest.importorskip("orbax.checkpoint", reason="the examples need the extra `examples`")
pytest.importorskip("rich", reason="the examples need the extra `examples`")
pytest.importorskip("sklearn", reason="the examples need the extra `examples`")
import bench
import meshes
import quadratic_model
from autoencoder import bound_of
from common import data, report
from common.methods import PUBLISHED, Bound
from common.problems import autoencoder_problem, poisson_problem
from rich.console import Console

ROOT = Path(__file__).parent.parent
SMALL = ("--widths", 4, "--batch-size", 400)  # A network that compiles fast, and three steps an epoch.


def program(name, *arguments):
    """The result of a program whose `main` runs in this process, where JAX is imported already."""
    main = importlib.import_module(name).main
    command = [f"{name}.py", *map(str, arguments)]
    code, stdout, stderr = 0, io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", command),
        mock.patch.dict(os.environ, COLUMNS="120"),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        jax.numpy_dtype_promotion("standard"),  # Flax and Optax rely on it.
    ):
        try:
            main()
        except SystemExit as error:  # As the interpreter does.
            code = error.code if isinstance(error.code, int) else 1
            stderr.write("" if isinstance(error.code, int) else str(error.code))
    return subprocess.CompletedProcess(command, code, stdout.getvalue(), stderr.getvalue())


def test_a_program_starts_from_the_command_line():
    command = [sys.executable, str(ROOT / "examples/demo.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "--data-dir" in result.stdout
    assert "learning rate" in result.stdout


def test_demo(tmp_path):
    grid = ("--learning-rates", 0.003, 0.03, "--dampings", 0.1)
    result = program("demo", *SMALL, "--epochs", 2, "--tuning-epochs", 1, *grid, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "[0.003, 0.03]" in result.stdout  # The grid is printed.
    written = json.loads((tmp_path / "demo_digits.json").read_text())
    assert set(written["curves"]) == {"Adaptive TNT", "TNT", "Adam", "SGD-m"}
    assert set(written["tuning"]) == {"TNT", "Adam", "SGD-m"}
    for name, curve in written["curves"].items():
        assert name in result.stdout
        assert len(curve["train_loss"]) == len(curve["test_loss"]) == len(curve["seconds"]) == 3
        assert curve["train_loss"][-1] < curve["train_loss"][0]
        # The same initial parameters.
        assert curve["train_loss"][0] == written["curves"]["TNT"]["train_loss"][0]
        assert f"{curve['train_loss'][-1]:.3f}" in result.stdout
    assert {len(trials) for trials in written["tuning"].values()} == {2}
    assert (tmp_path / "demo_digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_quadratic_model(tmp_path, monkeypatch):
    options = {"widths": (4,), "batch_size": 400, "epochs": 2}
    monkeypatch.setitem(quadratic_model.AUTOENCODERS, "digits", options)
    monkeypatch.setattr(quadratic_model, "poisson_problem", functools.partial(poisson_problem, widths=(8, 8)))
    result = program("quadratic_model", "--seconds", 0.5, "--seeds", 1, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "quadratic_model.json").read_text())
    for problem, runs in written["problems"].items():
        assert set(runs) == set(quadratic_model.USED[problem])
        for run in (run for of_seeds in runs.values() for run in of_seeds):
            assert run["train_loss"][-1] < run["train_loss"][0]
    assert quadratic_model.table(written) in result.stdout
    assert (tmp_path / "quadratic_model.png").read_bytes().startswith(b"\x89PNG")


def test_poisson_problem_has_the_residual_of_its_equation():
    """Against finite differences, and a function with a known Laplacian."""
    problem = poisson_problem(seed=0, widths=(8,))
    with jax.enable_x64(True):
        params, points = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (problem.params, problem.inputs))
        x, h = points["interior"][:20], 1e-4

        def network(x):
            return problem.forward(params, {"interior": x[:1], "boundary": x})["boundary"]

        steps = [h * jnp.eye(2)[i] for i in range(2)]
        laplacian = sum(network(x + e) + network(x - e) - 2 * network(x) for e in steps) / h**2
        source = 2 * np.pi**2 * np.sin(np.pi * x[:, 0]) * np.sin(np.pi * x[:, 1])
        residual = problem.forward(params, {"interior": x, "boundary": x})["interior"]
        # Differences of second order, and rounding errors divided by h^2.
        np.testing.assert_allclose(residual, -laplacian - source, rtol=1e-5, atol=1e-5)
    edges = np.asarray(problem.inputs["boundary"])
    assert np.all(np.any((edges == 0) | (edges == 1), axis=1))


@pytest.mark.parametrize(
    "models", [("MNIST autoencoder",), pytest.param(tuple(meshes.MODELS), marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_meshes(tmp_path, monkeypatch, models):
    monkeypatch.setattr(meshes, "MODELS", {name: meshes.MODELS[name] for name in models})
    result = program("meshes", "--devices", 1, 4, 8, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "meshes.json").read_text())["models"]
    assert tuple(written) == models
    one, four, eight = written["MNIST autoencoder"]
    lengths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    modes = [d for pair in itertools.pairwise(lengths) for d in (*pair, pair[1])]  # Of a kernel two, of a bias one.
    numbers = sum((d + 1) * e for d, e in itertools.pairwise(lengths))
    assert one["parameters"] == 4 * numbers
    counters = 7 + 2 * 8  # Of the optimizer, and for each parameter when its inverses were updated.
    assert one["state"] == 4 * (numbers + 2 * sum(d * d for d in modes) + counters)
    assert one["largest"] == one["ideal"] == 1
    assert four["one_mode"] == pytest.approx(1000**3 / sum(d**3 for d in modes))
    assert max(eight["ideal"], eight["one_mode"]) <= eight["largest"] <= 1.3 * eight["ideal"]
    shapes = [shape for pair in itertools.pairwise(lengths) for shape in (pair, pair[1:])]
    divided = [int(np.prod(shape)) // (4 if any(d % 4 == 0 for d in shape) else 1) for shape in shapes]
    assert four["parameters"] == 4 * sum(divided)


def test_demo_says_what_is_wrong(tmp_path):
    result = program("demo", "--data-dir", tmp_path)
    assert result.returncode == 2
    assert "--dataset mnist" in result.stderr
    pytest.importorskip("tensorflow_datasets")
    result = program("demo", "--dataset", "mnist", "--data-dir", tmp_path / "nowhere")
    assert result.returncode != 0
    assert str(tmp_path / "nowhere") in result.stderr
    assert "Traceback" not in result.stderr


def test_stability(tmp_path):
    result = program("stability", "--dataset", "digits", *SMALL, "--seeds", 1, "--epochs", 1, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "With the bound 0 of 1 diverged." in result.stdout
    runs = json.loads((tmp_path / "stability.json").read_text())["runs"]
    assert [run["trust_radius"] for run in runs] == [None, 0.0316]
    assert all(len(run["losses"]) == 3 for run in runs)


def test_fraction(tmp_path, monkeypatch):
    monkeypatch.setitem(importlib.import_module("fraction").WIDTHS, "digits", (4,))
    options = ("--epochs", 1, "--seeds", 1, "--subsamples", 1, 4, "--batch-size", 400)
    result = program("fraction", *options, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    curves = json.loads((tmp_path / "fraction_digits.json").read_text())["curves"]
    assert set(curves) == {"1/1", "1/4"}
    # The part makes a difference to the statistics, and so to the losses.
    assert curves["1/1"][0]["train_loss"][1:] != curves["1/4"][0]["train_loss"][1:]
    for (curve,) in curves.values():
        assert curve["train_loss"][-1] < curve["train_loss"][0]


def test_diagnostics(tmp_path):
    result = program("diagnostics", *SMALL, "--epochs", 3, "--every", 2, "--dampings", 0.1, 100, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    small_damping, large_damping = json.loads((tmp_path / "diagnostics_digits.json").read_text())["runs"]
    assert small_damping["epoch"] == [2, 3]
    assert all(len(values) == 2 for name, values in small_damping.items() if name != "damping")
    assert large_damping["share_below_damping"] == [1, 1]
    assert small_damping["condition"][-1] > 2 > large_damping["condition"][-1] >= 1
    assert f"{small_damping['test_loss'][-1]:.2f}" in result.stdout
    assert (tmp_path / "diagnostics_digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "names", [("TNT, bounded", "KFAC", "SGD-m"), pytest.param(tuple(PUBLISHED), marks=pytest.mark.slow)], ids=len
)
def test_autoencoder(tmp_path, names):
    small = (*SMALL, "--inverse-period", 2, "--bound", "0:0.2,3:0.1,2", "--warm-start", 2, "--out", tmp_path)
    result = program("autoencoder", *small, "--epochs", 1, "--optimizers", *names)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "autoencoder_digits.json").read_text())
    assert written["arguments"]["bound"] == {"radii": [[0, 0.2], [3, 0.1]], "inverse_period": 2}
    assert set(written["curves"]) == set(names)
    rows = (tmp_path / "autoencoder_digits.csv").read_text().splitlines()
    assert len(rows) == 1 + len(names) * 2  # Losses before and after the epoch.
    assert (tmp_path / "autoencoder_digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "names", [("Adam", "SGD-m"), pytest.param(("TNT", "TNT-MLE", "KFAC", "Shampoo"), marks=pytest.mark.slow)]
)
def test_autoencoder_on_a_grid(tmp_path, names):
    grid = ("--grid", 1, 3, "--tuning-epochs", 1, "--epochs", 1, "--optimizers", *names)
    result = program("autoencoder", *SMALL, *grid, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "autoencoder_digits.json").read_text())
    assert tuple(written["tuning"]) == names
    for name, trials in written["tuning"].items():
        assert len(trials) == (2 if name == "SGD-m" else 4)
        assert written["settings"][name]["learning_rate"] == trials[0]["learning_rate"]
        assert trials[0]["loss"] == min(trial["loss"] for trial in trials)


def test_the_radius_changes_exponentially_from_step_to_step():
    radius = Bound(((0, 2.0), (100, 0.5), (300, 0.5), (301, 8.0))).trust_radius()
    found = [float(radius(np.int32(step))) for step in (0, 50, 100, 200, 300, 301, 10_000)]
    np.testing.assert_allclose(found, [2, 1, 0.5, 0.5, 0.5, 8, 8], rtol=1e-5)  # float32


@pytest.mark.parametrize("bound", ["3", "5:1,0:2,3", "0:0,3", "0,3"])
def test_a_bound_that_makes_no_sense(bound):
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):  # What argparse turns into a message.
        bound_of(bound)


def test_autoencoder_goes_on_where_it_was(tmp_path):
    curves = []
    for out, runs in ((tmp_path / "interrupted", (1, 3)), (tmp_path / "whole", (3,))):
        for epochs in runs:
            result = program("autoencoder", *SMALL, "--optimizers", "TNT", "--out", out, "--epochs", epochs)
            assert result.returncode == 0, result.stderr
        curves.append(json.loads((out / "autoencoder_digits.json").read_text())["curves"]["TNT"][0])
    interrupted, whole = curves
    assert len(whole["train_loss"]) == 4
    assert interrupted["train_loss"] == whole["train_loss"]
    assert interrupted["warm_start_seconds"] > 0


def test_autoencoder_within_a_budget(tmp_path):
    budget = ("--epochs", 2, "--seconds", 1e-9)  # Spent after the first epoch.
    result = program("autoencoder", *SMALL, *budget, "--optimizers", "SGD-m", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    (curve,) = json.loads((tmp_path / "autoencoder_digits.json").read_text())["curves"]["SGD-m"]
    assert len(curve["train_loss"]) == 2


def test_bench_of_a_small_problem():
    problem = autoencoder_problem(data.digits(), (4,), 400, seed=0)
    others = ["Adam", "Muon", "TNT (10, 100)", "TNT (1, 20), 20 parts", "TNT-EF (1, 20)", "Shampoo (1, 20)"]
    skipped = [*others, "kfac-jax NaiveTNT (1, 20)", "PSGD-Kron (1/20)", "TNT (1, 20), 1/8 sampled"]
    with (
        jax.numpy_dtype_promotion("standard"),
        report.progress_bar(Console(file=io.StringIO())) as progress,
    ):
        rows = {row["optimizer"]: row for row in bench.race(problem, 2, skipped, progress)}
    assert {row["error"] for name, row in rows.items() if name in skipped} == {"skipped"}
    assert rows["SGD-m"]["ratio"] == 1
    assert rows["TNT (1, 20)"]["ratio"] > 0
    assert {row["part"]: row["ms"] > 0 for row in bench.parts(problem, 1)} == dict.fromkeys(bench.PARTS, True)


@pytest.mark.slow
def test_bench(tmp_path):
    peers = ["Adam", "Muon", "TNT (10, 100)", "TNT (1, 20), 20 parts", "TNT-EF (1, 20)", "Shampoo (1, 20)"]
    options = ("--models", "autoencoder", "--steps", 2, "--rounds", 1, "--widths", 16, "--depths", 2, "--skip", *peers)
    result = program("bench", *options, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["optimizer"]: row for row in written["models"]["autoencoder"]["race"]}
    # A peer that is not installed is there too, with its error.
    assert set(rows) >= {*peers, "SGD-m", "TNT (1, 20)", "kfac-jax NaiveTNT (1, 20)", "PSGD-Kron (1/20)"}
    assert rows["SGD-m"]["ratio"] == 1
    assert all("error" in row or row["ratio"] > 0 for row in rows.values())
    assert "ratio" in rows["TNT (1, 20)"]
    assert rows["Adam"]["error"] == "skipped"
    # Momentum, two factors and their inverses: 4 bytes each; counters.
    sizes = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    elements = sum(n * m + m for n, m in itertools.pairwise(sizes))
    factors = sum(n * n + m * m + m * m for n, m in itertools.pairwise(sizes))
    counters = 7 + 2 * 8  # Of the optimizer, and for each parameter when its inverses were updated.
    assert rows["TNT (1, 20)"]["state_bytes"] == 4 * (elements + 2 * factors + counters)
    assert {row["part"] for row in written["models"]["autoencoder"]["parts"]} >= {"contractions", "inverses"}
    assert written["large"]["parameters"] == 124_439_808
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
