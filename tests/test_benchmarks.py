"""The benchmarks: bytes and operations against counts by hand, and what `step` writes."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("typer", reason="the benchmarks need the extra `examples`")
from benchmarks import counting, step
from benchmarks.__main__ import app
from typer.testing import CliRunner

import tnt_optax

CASES = [((96,), None, (96,)), ((40, 24), None, (40, 24)), ((3, 3, 16, 20), None, (9, 16, 20))]
KINDS = {"embeddings": [(50, 8)], "matrices": [(8, 24), (24, 8)], "vectors": [(24,), (8,)]}
WIDTHS = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]


@pytest.fixture(autouse=True)
def _strict_promotion():  # In place of that of conftest.py: Flax and Optax rely on implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        yield


def run(path, *arguments):
    result = CliRunner().invoke(app, [*map(str, arguments), "--out", str(path / "x.json")])
    assert result.exit_code == 0, result.output
    assert (path / "x.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((path / "x.json").read_text())


@pytest.mark.parametrize(("shape", "view", "dims"), [*CASES, ((5, 6, 8, 9), counting.FOUR, (5, 6, 8, 9))])
def test_bytes_and_operations_by_hand(shape, view, dims):
    counts = counting.count(shape, view, batch_size=32)
    size, squares, cubes = math.prod(dims), sum(d**2 for d in dims), sum(d**3 for d in dims)
    products, kept, outer = 2 * sum(dims) * size, 4 * (size + 2 * squares), size**2 if len(dims) == 1 else 0
    assert counts["TNT, bytes"] == (kept + 8 * 4, kept)  # Six counters, the damping, the last inverse update.
    assert counts["Adam, bytes"] == (8 * size + 4, 8 * size)
    assert counts["preconditioning"] == (products, products)  # A matrix product for each mode, and nothing else.
    # Products (that of a vector with itself has no additions), 3 for each element of a C_i, 1 - w for each mode or all.
    assert 0 <= counts["statistics"][0] - (products + 3 * squares - outer) <= len(dims)
    assert counts["inverses"][1] == pytest.approx(cubes / 3 + cubes + 2 * cubes)
    assert cubes * 10 / 3 <= counts["inverses"][0] <= cubes * 10 / 3 + 12 * squares  # Some 10 passes, elementwise.
    assert counts["Adam"][1] == 12 * size <= counts["Adam"][0] <= 12 * size + 20  # The corrections, once.
    if view is None:
        assert counts["Shampoo, bytes"] == (kept + 4, kept)
        # X <- X T, M <- T^p M with p = 2k: T^2; T^2, T^4; T^2, T^4, T^6. The rest: some 20 passes over a matrix.
        assert counts["Shampoo"][1] == (formula := 2 * products + 2 * (len(dims) + 2) * cubes)
        assert formula - outer <= counts["Shampoo"][0] <= formula + 25 * squares + 6 * size
    if len(shape) == 2:
        counted, formula = counts["sampled pass"]
        assert formula == 2 * 32 * size <= counted <= formula + 100 * 32 * dims[1]  # A product, and the sampling.
        tx, gradient = tnt_optax.tnt(0.1, statistics_period=1, inverse_period=1), counting.array(shape)
        state = jax.eval_shape(tx.init, gradient)
        whole = counting.flops(lambda g, s: tx.update(g, s, sampled_grads=g), gradient, state) + 4 / 3 * cubes
        parts = sum(counts[name][0] for name in ("statistics", "preconditioning", "inverses"))
        assert parts <= whole <= parts + 6 * (size + 2 * squares)  # The rest: some 4 passes over all arrays.


def test_lapack_is_counted_wherever_it_stands(tmp_path):
    solve = jax.jit(lambda a, b: jax.lax.linalg.triangular_solve(jnp.linalg.cholesky(a), b, left_side=True))
    jaxpr = jax.make_jaxpr(lambda a, b: solve(a, b) + a @ b)(counting.array((6, 6)), counting.array((6, 4)))
    assert counting.lapack_flops(jaxpr) == 6**3 / 3 + 6 * 6 * 4
    assert [row["modes"] for row in run(tmp_path, "complexity", "--max-dim", 12)["rows"]] == ["6 × 8 × 10 × 12"]


def test_memory(tmp_path, monkeypatch):
    assert sum(map(math.prod, counting.GPT2_SHAPES)) == 124_439_808
    monkeypatch.setattr(counting, "GPT2", KINDS)
    rows = {row["optimizer"]: row for row in run(tmp_path, "memory", "--max-dims", 10, "--max-dims", 30)["state"]}
    by_hand = {"Muon": (400, 384, 64), "SOAP": (800 + 2 * (2500 + 64), 768 + 4 * (64 + 576), 64)}
    by_hand["Shampoo"] = (400 + 2 * (2500 + 64), 384 + 4 * (64 + 576), 32 + 2 * (64 + 576))
    by_hand["TNT, max_dim=10"] = (400 + 2 * (50 + 64), 384 + 4 * (64 + 24), 32 + 2 * (64 + 24))
    by_hand["TNT, max_dim=30, vectors diagonal"] = (400 + 2 * (50 + 64), 384 + 4 * (64 + 576), 3 * 32)
    for row, floats in ((rows[name], floats) for name, floats in by_hand.items()):
        assert all(0 <= row[kind] - 4 * count <= 36 for kind, count in zip(KINDS, floats, strict=True))  # Counters.
        assert row["total"] == sum(row[kind] for kind in KINDS)


def test_meshes():
    modes = [d for pair in itertools.pairwise(WIDTHS) for d in (*pair, pair[1])]  # Of a kernel two, of a bias one.
    numbers = sum((d + 1) * e for d, e in itertools.pairwise(WIDTHS))
    one, four, eight = (counting.load(counting.AUTOENCODER, devices) for devices in (1, 4, 8))
    counters = 7 + 2 * 8  # The optimizer's, and when each parameter's inverses were updated.
    assert (one["parameters"], one["state"]) == (4 * numbers, 4 * (numbers + 2 * sum(d * d for d in modes) + counters))
    assert one["largest"] == one["ideal"] == 1
    assert four["one_mode"] == pytest.approx(1000**3 / sum(d**3 for d in modes))
    assert max(eight["ideal"], eight["one_mode"]) <= eight["largest"] <= 1.3 * eight["ideal"]
    divided = [math.prod(s) // (4 if any(d % 4 == 0 for d in s) else 1) for s in counting.AUTOENCODER]
    assert four["parameters"] == 4 * sum(divided)


def test_step(tmp_path, monkeypatch):
    seconds = [{7: 100, 100: 5}.get(i, 1 if i % 20 else 3) for i in range(1, 101)]  # 7: not of the optimizer.
    assert step.summary(seconds) == (pytest.approx((95 + 4 * 3 + 5) / 100), 1, 5)
    some, pick = ("SGD-m", "Adam", "TNT (1, 20)"), step.contenders
    monkeypatch.setattr(step, "contenders", lambda *args: {x: pick(*args)[x] for x in some} | {"broken": {}.popitem})
    options = ("step", "--models", "autoencoder", "--tiny", "--steps", 2, "--rounds", 1)
    with pytest.raises(AssertionError, match="--skip: expected some of"):
        run(tmp_path, *options, "--skip", "SGD-m")
    written = run(tmp_path, *options, "--skip", "Adam")["models"]["autoencoder"]
    sgd, tnt, broken = written["race"]
    assert broken == {"optimizer": "broken", "error": "KeyError: 'popitem(): dictionary is empty'"}
    assert sgd["ratio"] == 1 < len(tnt["ms"]) == 2
    pairs = [*itertools.pairwise([16, 8, 4, 8, 16])]
    numbers, matrices = sum((n + 1) * m for n, m in pairs), sum(n * n + m * m + m * m for n, m in pairs)
    assert written["parameters"] == numbers == sgd["state_bytes"] / 4
    assert tnt["state_bytes"] == 4 * (numbers + 2 * matrices + 7 + 2 * len(pairs))
    assert len([part for part in written["parts"] if part["ms"] > 0 < part["floor_ms"]]) == 5


@pytest.mark.slow
def test_peers(tmp_path):
    pytest.importorskip("kfac_jax"), pytest.importorskip("psgdax")
    step.measure([step.Model.autoencoder], tmp_path / "x.json", steps=1, rounds=1, tiny=True)
    assert '"error"' not in (tmp_path / "x.json").read_text()
