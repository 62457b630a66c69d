"""The programs under examples/ run, and write what they say."""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from autoencoder import bound_of
from common.methods import Bound

ROOT = Path(__file__).parent.parent
pytest.importorskip("sklearn", reason="the examples need the extra `examples`")


def program(name, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / f"examples/{name}.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_demo(tmp_path):
    grid = ("--learning-rates", 0.003, 0.03, "--dampings", 0.1)
    result = program("demo", "--epochs", 2, "--tuning-epochs", 1, *grid, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "[0.003, 0.03]" in result.stdout  # The grid is said.
    written = json.loads((tmp_path / "demo_digits.json").read_text())
    assert set(written["curves"]) == {"TNT", "Adam", "SGD-m"}
    for name, curve in written["curves"].items():
        assert name in result.stdout
        assert len(curve["train_loss"]) == len(curve["test_loss"]) == len(curve["seconds"]) == 3
        assert curve["train_loss"][-1] < curve["train_loss"][0]
        # The same initial parameters.
        assert curve["train_loss"][0] == written["curves"]["TNT"]["train_loss"][0]
        assert f"{curve['train_loss'][-1]:.3f}" in result.stdout
    assert {len(trials) for trials in written["tuning"].values()} == {2}
    assert (tmp_path / "demo_digits.png").read_bytes().startswith(b"\x89PNG")


def test_meshes(tmp_path):
    result = program("meshes", "--devices", 1, 4, 8, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    one, four, eight = json.loads((tmp_path / "meshes.json").read_text())["models"]["MNIST autoencoder"]
    lengths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    modes = [d for pair in itertools.pairwise(lengths) for d in (*pair, pair[1])]  # Of a kernel two, of a bias one.
    numbers = sum((d + 1) * e for d, e in itertools.pairwise(lengths))
    assert one["parameters"] == 4 * numbers
    counters = 4 * 7
    assert one["state"] == 4 * (numbers + 2 * sum(d * d for d in modes)) + counters
    assert one["largest"] == one["ideal"] == 1
    assert four["one_mode"] == pytest.approx(1000**3 / sum(d**3 for d in modes))
    assert max(eight["ideal"], eight["one_mode"]) <= eight["largest"] <= 1.3 * eight["ideal"]
    shapes = [shape for pair in itertools.pairwise(lengths) for shape in (pair, pair[1:])]
    divided = [int(np.prod(shape)) // (4 if any(d % 4 == 0 for d in shape) else 1) for shape in shapes]
    assert four["parameters"] == 4 * sum(divided)


def test_demo_help():
    result = program("demo", "--help")
    assert result.returncode == 0
    assert "--data-dir" in result.stdout
    assert "learning rate" in result.stdout


def test_demo_says_what_is_wrong(tmp_path):
    result = program("demo", "--data-dir", tmp_path)
    assert result.returncode == 2
    assert "--dataset mnist" in result.stderr
    pytest.importorskip("tensorflow_datasets")
    result = program("demo", "--dataset", "mnist", "--data-dir", tmp_path / "nowhere")
    assert result.returncode != 0
    assert str(tmp_path / "nowhere") in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_stability(tmp_path):
    options = ("--dataset", "digits", "--seeds", 1, "--epochs", 1, "--batch-size", 400, "--widths", 32, 8)
    result = program("stability", *options, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "With the bound 0 of 1 diverged." in result.stdout
    runs = json.loads((tmp_path / "stability.json").read_text())["runs"]
    assert [run["trust_radius"] for run in runs] == [None, 0.0316]
    assert all(len(run["losses"]) == 3 for run in runs)


@pytest.mark.slow
def test_fraction(tmp_path):
    result = program("fraction", "--epochs", 1, "--seeds", 1, "--shares", 1, 4, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    curves = json.loads((tmp_path / "fraction_digits.json").read_text())["curves"]
    assert set(curves) == {"1/1", "1/4"}
    # The part makes a difference to the statistics, and so to the losses.
    assert curves["1/1"][0]["train_loss"][1:] != curves["1/4"][0]["train_loss"][1:]
    for (curve,) in curves.values():
        assert curve["train_loss"][-1] < curve["train_loss"][0]


def test_diagnostics(tmp_path):
    small = ("--widths", 8, 4, "--batch-size", 400, "--epochs", 3, "--every", 2, "--dampings", 0.1, 100)
    result = program("diagnostics", *small, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    small_damping, large_damping = json.loads((tmp_path / "diagnostics_digits.json").read_text())["runs"]
    assert small_damping["epoch"] == [2, 3]
    assert all(len(values) == 2 for name, values in small_damping.items() if name != "damping")
    assert large_damping["share_below_damping"] == [1, 1]
    assert small_damping["condition"][-1] > 2 > large_damping["condition"][-1] >= 1
    assert f"{small_damping['test_loss'][-1]:.2f}" in result.stdout
    assert (tmp_path / "diagnostics_digits.png").read_bytes().startswith(b"\x89PNG")


def test_autoencoder(tmp_path):
    names = ("TNT", "TNT, bounded", "TNT-MLE", "KFAC", "Shampoo", "Adam", "SGD-m")
    small = ("--widths", 8, 4, "--batch-size", 400, "--inverse-period", 2, "--out", tmp_path)
    bound = ("--bound", "0:0.2,3:0.1,2")
    result = program("autoencoder", *small, *bound, "--epochs", 1, "--grid", 1, 3, "--tuning-epochs", 1)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "autoencoder_digits.json").read_text())
    assert written["arguments"]["bound"] == {"radii": [[0, 0.2], [3, 0.1]], "inverse_period": 2}
    assert set(written["curves"]) == set(names)
    for name, trials in written["tuning"].items():
        assert len(trials) == (2 if name == "SGD-m" else 4)
        assert written["settings"][name]["learning_rate"] == trials[0]["learning_rate"]
        assert trials[0]["loss"] == min(trial["loss"] for trial in trials)
    rows = (tmp_path / "autoencoder_digits.csv").read_text().splitlines()
    assert len(rows) == 1 + len(names) * 2  # Losses before and after the epoch.
    assert (tmp_path / "autoencoder_digits.png").read_bytes().startswith(b"\x89PNG")


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
            small = ("--widths", 8, 4, "--batch-size", 400, "--optimizers", "TNT", "--out", out)
            result = program("autoencoder", *small, "--epochs", epochs)
            assert result.returncode == 0, result.stderr
        curves.append(json.loads((out / "autoencoder_digits.json").read_text())["curves"]["TNT"][0])
    interrupted, whole = curves
    assert len(whole["train_loss"]) == 4
    assert interrupted["train_loss"] == whole["train_loss"]
    assert interrupted["warm_start_seconds"] > 0


def test_autoencoder_within_a_budget(tmp_path):
    small = ("--widths", 8, 4, "--batch-size", 400, "--optimizers", "SGD-m", "--out", tmp_path)
    result = program("autoencoder", *small, "--epochs", 2, "--seconds", 1e-9)  # Spent after the first epoch.
    assert result.returncode == 0, result.stderr
    (curve,) = json.loads((tmp_path / "autoencoder_digits.json").read_text())["curves"]["SGD-m"]
    assert len(curve["train_loss"]) == 2


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
    assert rows["TNT (1, 20)"]["state_bytes"] == 4 * (elements + 2 * factors + 7)
    assert {row["part"] for row in written["models"]["autoencoder"]["parts"]} >= {"contractions", "inverses"}
    assert written["large"]["parameters"] == 124_439_808
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
