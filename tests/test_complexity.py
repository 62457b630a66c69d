"""The example of Table 1: memory and operations against counts by hand."""

import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from test_examples import program

pytest.importorskip("matplotlib", reason="the examples need the extra `examples`")
pytest.importorskip("rich", reason="the examples need the extra `examples`")
import complexity
from complexity import FOUR, Case

ROOT = Path(__file__).parent.parent
CASES = [
    (Case((96,)), (96,)),
    (Case((40, 24)), (40, 24)),
    (Case((3, 3, 16, 20)), (9, 16, 20)),
    (Case((5, 6, 8, 9), FOUR), (5, 6, 8, 9)),
]


@pytest.mark.parametrize(("case", "dims"), CASES)
def test_memory(case, dims):
    size, matrices = math.prod(dims), sum(d * d for d in dims)
    expected = {
        # Momentum, C_i, P_i; the numbers of steps, statistics, three kinds of rejections and bounded steps; the
        # damping; the last inverse update.
        "TNT": 4 * (size + 2 * matrices) + 8 * 4,
        "Shampoo": 4 * (size + 2 * matrices) + 2 * 4,  # And the steps, the statistics.
        "Adam": 4 * 2 * size + 4,
    }
    for name, tx in complexity.optimizers(case).items():
        assert complexity.state_bytes(tx, case) == expected[name]
    assert 4 * complexity.memory_formula("TNT", dims) == expected["TNT"] - 32
    assert 4 * complexity.memory_formula("Adam", dims) == expected["Adam"] - 4


@pytest.mark.parametrize(("case", "dims"), CASES)
def test_operations_of_the_parts(case, dims):
    counted = complexity.parts(case)
    products = 2 * sum(dims) * math.prod(dims)
    # Exact: a matrix product for each mode, and nothing else.
    assert counted["preconditioning"] == products
    # The moving average is two products and a sum for each element of a C_i, and 1 - w once for all or for each mode.
    # An outer product, the contraction of a vector, has no additions: half the operations.
    expected = products + 3 * sum(d * d for d in dims) - (dims[0] ** 2 if len(dims) == 1 else 0)
    assert expected <= counted["statistics"] <= expected + len(dims)
    # Cholesky d^3/3, triangular system d^3, product 2 d^3. The rest (row sums, damping, triangles, transposes) is
    # elementwise: some 10 passes over a matrix.
    cubes = sum(d**3 for d in dims) * 10 / 3
    assert cubes <= counted["inverses"] <= cubes + 12 * sum(d * d for d in dims)


def test_operations_of_a_blocked_inverse():
    d = 512  # Two blocks of d/2.
    by_hand = d**3 / 3 + 2 * (1 + 2) * (d / 2) ** 3 + 4 * 2 * (d / 2) ** 3
    counted = complexity.parts(Case((d,)))["inverses"]
    assert by_hand <= counted <= by_hand + 18 * d * d  # As above, and the blocks put together.


def test_lapack_is_counted_wherever_it_stands():
    def function(a, b):
        return jax.jit(lambda a: jnp.linalg.cholesky(a) @ a)(a), jax.lax.linalg.triangular_solve(a, b, left_side=True)

    a, b = jax.ShapeDtypeStruct((6, 6), jnp.float32), jax.ShapeDtypeStruct((6, 4), jnp.float32)
    assert complexity.lapack_flops(function, a, b) == 6**3 / 3 + 6 * 6 * 4


def test_the_parts_are_all_of_the_update():
    case, dims = CASES[1]  # With modes of different lengths, so that no loop of inverses turns twice.
    counted = complexity.parts(case)
    lapack = sum(4 / 3 * d**3 for d in dims)
    whole = complexity.update(complexity.optimizers(case)["TNT"], case) + lapack
    # The rest (momentum, Eq. (5), finiteness, rejections, learning rate) is elementwise: some 4 passes over all arrays.
    rest = 6 * (math.prod(dims) + 2 * sum(d * d for d in dims))
    assert sum(counted.values()) <= whole <= sum(counted.values()) + rest


def test_operations_of_the_sampled_pass():
    # A product of (d_1, m) and (m, d_2), and the sampling: some 100 operations for each of m d_2 outputs.
    counted = complexity.sampled_pass(Case((40, 24)), 32)
    assert 2 * 32 * 40 * 24 <= counted <= 2 * 32 * 40 * 24 + 100 * 32 * 24


@pytest.mark.parametrize(("case", "dims"), CASES[:3])
def test_operations_of_shampoo(case, dims):
    """Statistics and preconditioning as TNT's; X <- X T, M <- T^p M with p = 2k."""
    products = {1: 1 + 2, 2: 2 + 2, 3: 3 + 2}[len(dims)]  # T^2; T^2, T^4; T^2, T^4, T^6: and the two others.
    expected = 4 * sum(dims) * math.prod(dims) + 2 * products * sum(d**3 for d in dims)
    assert complexity.update_formula("Shampoo", dims) == expected
    counted = complexity.update(complexity.optimizers(case)["Shampoo"], case)
    # The averages, the damping and what is elementwise in a turn are some 20 passes over a matrix, and 5 over the
    # tensor. A vector's outer product has half the operations.
    rest = 25 * sum(d * d for d in dims) + 6 * math.prod(dims)
    assert expected - (dims[0] ** 2 if len(dims) == 1 else 0) <= counted <= expected + rest


def test_operations_of_adam():
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it.
        counted = complexity.update(complexity.optimizers(CASES[1][0])["Adam"], CASES[1][0])
    assert complexity.update_formula("Adam", (40, 24)) == 12 * 40 * 24
    assert 12 * 40 * 24 <= counted <= 12 * 40 * 24 + 20  # The corrections' denominators, once.


@pytest.mark.parametrize(
    "cases",
    [(CASES[1][0], CASES[3][0]), pytest.param(complexity.CASES, marks=pytest.mark.slow)],
    ids=["small", "whole"],
)
def test_program(tmp_path, monkeypatch, cases):
    monkeypatch.setattr(complexity, "CASES", cases)
    result = program("complexity", "--batch-size", 32, "--max-dim", 128, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "complexity.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "complexity.json").read_text())["rows"]
    assert [tuple(row["dims"]) for row in written] == [case.dims() for case in cases if max(case.dims()) <= 128]
    for row in written:
        title = "x".join(map(str, row["dims"]))
        assert f"{row['memory']['TNT']['formula']:,} + 32" in result.stdout
        assert title in result.stdout


def test_the_page_has_the_numbers_of_the_program():
    page = (ROOT / "docs/theory.md").read_text()
    for row in json.loads((ROOT / "docs/complexity.json").read_text())["rows"]:
        memory = [f"{e['formula']:,} + {e['bytes'] - e['formula']}" for e in row["memory"].values()]
        ratios = [f"{e['flops'] / e['formula']:.2f}" for kind in ("parts", "updates") for e in row[kind].values()]
        title = " × ".join(map(str, row["dims"]))
        lines = re.findall(rf"^\| {title} \| .*$", page, re.MULTILINE)
        assert len(lines) == 2
        assert all(cell in lines[0] for cell in memory)
        assert all(cell in lines[1] for cell in ratios)
