"""The example of the memory: bytes against counts by hand, and what a narrowed state holds."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_examples import program

pytest.importorskip("matplotlib", reason="the examples need the extra `examples`")
pytest.importorskip("rich", reason="the examples need the extra `examples`")
import memory
from common import models

SHAPES = {"embeddings": [(50, 8)], "matrices": [(8, 24), (24, 8)], "vectors": [(24,), (8,)]}
SIZES = {"embeddings": 400, "matrices": 384, "vectors": 32}


def test_the_shapes_of_gpt2():
    shapes = models.gpt2()
    assert sum(np.prod(shape) for of_kind in shapes.values() for shape in of_kind) == 124_439_808
    assert [len(of_kind) for of_kind in shapes.values()] == [2, 48, 98]


@pytest.mark.parametrize(
    ("name", "floats", "counters"),
    [
        # Momentum, and for each mode two matrices or two diagonals. Seven counters, and one for each parameter.
        ("TNT, max_dim=30", (400 + 2 * (50 + 64), 384 + 4 * (64 + 576), 32 + 2 * (64 + 576)), 7 + 2),
        ("TNT, max_dim=10", (400 + 2 * (50 + 64), 384 + 4 * (64 + 24), 32 + 2 * (64 + 24)), 7 + 2),
        ("TNT, max_dim=30, vectors diagonal", (400 + 2 * (50 + 64), 384 + 4 * (64 + 576), 3 * 32), 7 + 2),
        ("AdamW", (800, 768, 64), 1),
        ("Muon", (400, 384, 64), 5),
        ("SOAP", (800 + 2 * (2500 + 64), 768 + 4 * (64 + 576), 64), 0),
        ("Shampoo", (400 + 2 * (2500 + 64), 384 + 4 * (64 + 576), 32 + 2 * (64 + 576)), 2),
    ],
)
def test_bytes_by_hand(name, floats, counters):
    (row,) = (row for row in memory.table(SHAPES, (10, 30)) if row["optimizer"] == name)
    by_hand = [4 * count for count in floats]
    for counted, expected in zip(row["bytes"].values(), by_hand, strict=True):
        assert 0 <= counted - expected <= 4 * counters
    assert row["total"] == sum(row["bytes"].values())
    assert row["per_parameter"] == row["total"] / sum(SIZES.values())


@pytest.mark.parametrize("storage", memory.STORAGES)
def test_storages(storage):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)}
    trees = [{"w": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)} for _ in range(4)]
    tx = memory.optimizer(storage)(0.1, 0.1)
    state = tx.init(params)
    plain = memory.tnt_optax.tnt(0.1, damping=0.1, trust_radius=0.1, **memory.STORAGES[storage][1])
    expected = plain.init(params)
    for tree in trees:
        updates, state = tx.update(tree, state, params, sampled_grads=tree)
        others, expected = plain.update(tree, expected, params, sampled_grads=tree)
        exact = "bfloat16" not in storage
        np.testing.assert_allclose(updates["w"], others["w"], rtol=1e-6 if exact else 0.1, atol=0 if exact else 2e-3)
    dtypes = [{x.dtype.name for x in jax.tree.leaves(part)} for part in (state[0].contractions, state[0].inverses)]
    assert dtypes == {
        "contractions bfloat16": [{"bfloat16"}, {"float32"}],
        "contractions, inverses bfloat16": [{"bfloat16"}, {"bfloat16"}],
        "no contractions, T1 = 20": [set(), {"float32"}],
    }.get(storage, [{"float32"}, {"float32"}])
    assert state[0].momentum["w"].dtype == jnp.float32
    assert isinstance(tx, optax.GradientTransformationExtraArgs)


@pytest.mark.parametrize(
    ("widths", "names"),
    [
        ((4,), ("float32", "contractions bfloat16", "no contractions, T1 = 20")),
        pytest.param(memory.WIDTHS, tuple(memory.STORAGES), marks=pytest.mark.slow),
    ],
    ids=["small", "whole"],
)
def test_the_program(tmp_path, monkeypatch, widths, names):
    monkeypatch.setattr(memory, "WIDTHS", widths)
    monkeypatch.setattr(memory, "STORAGES", {name: memory.STORAGES[name] for name in names})
    small = ("--seeds", 1, "--epochs", 1, "--dampings", 0.1, "--max-dims", 256, "--batch-size", 512)
    result = program("memory", *small, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "memory.json").read_text())
    assert written["parameters"] == 124_439_808
    assert {row["optimizer"] for row in written["state"]} >= {"AdamW", "TNT, max_dim=256"}
    assert {run["storage"] for run in written["runs"]} == set(memory.STORAGES)
    assert all(len(run["train_loss"]) == 2 for run in written["runs"])
    sizes = written["storages"]
    assert sizes["no contractions, T1 = 20"] < sizes["contractions bfloat16"] < sizes["float32"]
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
