"""The language model of the examples: its data, its masks, its causality, and the program."""

import functools
import json
import math
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax", reason="the examples need the extra `examples`")
pytest.importorskip("matplotlib", reason="the examples need the extra `examples`")
pytest.importorskip("rich", reason="the examples need the extra `examples`")
import language_model as program
from common import data
from common.models import StackedTransformer
from common.problems import language_problem, shifted
from flax import nnx
from test_examples import program as run

import tnt_optax

FILES = [b"import this\n", b"", b"x = 1\n", b"pass\n"]
LENGTH = 8


@pytest.fixture(autouse=True)
def _implicit_promotion():
    with jax.numpy_dtype_promotion("standard"):  # Flax relies on implicit promotion.
        yield


@functools.cache
def tiny():
    rows = data.sequences(FILES, LENGTH)
    sizes = {"width": 8, "layers": 2, "heads": 2, "batch_size": 4, "epoch_steps": 1, "measured": 4}
    return language_problem(data.Texts(rows, rows), **sizes, seed=0)


def scrambled(problem):
    """Larger parameters: the initial ones are so small that every prediction is nearly uniform."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype) / 2, problem.params)


def test_sequences():
    expected = [
        list(b"import t"),
        [*b"his\n", -1, -1, -1, -1],
        [*b"x = 1\n", -1, -1],
        [*b"pass\n", -1, -1, -1],
    ]
    rows = data.sequences(FILES, LENGTH)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(shifted(jnp.asarray(rows))[1], [0, *b"his\n", 0, 0, 0])


def test_sources_without_tests_and_other_libraries(tmp_path, monkeypatch):
    for index in range(5):
        (tmp_path / f"{index}.py").write_bytes(bytes([65 + index]) * 4)
    for folder in ("site-packages", "dist-packages", "test", "json/tests"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "other.py").write_bytes(b"other")
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    texts = data.python_sources(4, test_share=0.4)
    assert texts.train.shape == (3, 4)
    assert texts.test.shape == (2, 4)
    assert {bytes(row.astype(np.uint8)) for row in np.concatenate(texts)} == {
        b"AAAA",
        b"BBBB",
        b"CCCC",
        b"DDDD",
        b"EEEE",
    }
    np.testing.assert_array_equal(texts.test, data.python_sources(4, test_share=0.4).test)
    others = [data.python_sources(4, test_share=0.4, seed=seed).test for seed in range(1, 6)]
    assert any(not np.array_equal(texts.test, other) for other in others)


@pytest.mark.slow
def test_python_sources():
    texts = data.python_sources(4096, test_share=0.5)
    again, other = data.python_sources(4096, test_share=0.5), data.python_sources(4096, test_share=0.5, seed=1)
    np.testing.assert_array_equal(texts.test, again.test)
    assert texts.test.shape != other.test.shape
    rows = np.concatenate(texts)
    begun = {bytes(row[row >= 0].astype(np.uint8)) for row in rows}
    with open(json.__file__, "rb") as file:  # A module of the standard library,
        assert file.read(4096) in begun
    with open(pytest.__file__, "rb") as file:  # and one that is not.
        assert file.read(4096) not in begun
    train, test = ({row.tobytes() for row in part[part[:, -1] >= 0]} for part in texts)
    # Whole files are on one side. (A distribution's library may hold a few blocks twice, in files that were copied.)
    assert len(train & test) < 0.01 * min(len(train), len(test))


@pytest.mark.slow
def test_padded_positions_do_not_matter():
    problem = tiny()
    params, (inputs, labels) = scrambled(problem), problem.train
    padded = labels < 0
    assert int(jnp.sum(padded)) == 9

    @jax.jit
    def value_and_both(inputs, labels):
        predictive = problem.predictive_of(labels)
        value_and_grads = tnt_optax.value_and_sampled_grad(problem.forward, predictive)
        loss, grads, sampled_grads = value_and_grads(params, inputs, labels, jax.random.key(0))
        logits = problem.forward(params, inputs)
        return loss, grads, sampled_grads(), logits, predictive.batch_size(logits)

    loss, grads, sampled_grads, logits, m = value_and_both(inputs, labels)
    # A padded input follows the last byte of its file, and nothing that counts follows it.
    other_inputs = jnp.where(padded, 7, inputs)
    assert not bool(jnp.all(other_inputs == inputs))
    again = value_and_both(other_inputs, jnp.where(padded, -3, labels))
    chex.assert_trees_all_equal(again[:3], (loss, grads, sampled_grads))
    assert all(float(jnp.max(jnp.abs(x))) > 0 for x in jax.tree.leaves((grads["blocks"], sampled_grads["blocks"])))
    # The mean over the bytes there are, and m their number.
    losses = []
    for row, at in zip(np.asarray(labels), np.asarray(logits, np.float64), strict=True):
        losses += [np.log(np.exp(at[i]).sum()) - at[i, byte] for i, byte in enumerate(row) if byte >= 0]
    assert len(losses) == m == sum(map(len, FILES))
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)  # float32 logits of size 1


def test_the_model_does_not_see_the_future():
    problem = tiny()
    forward = jax.jit(problem.forward)
    params, inputs = scrambled(problem), problem.train[0][:1]
    logits = np.asarray(forward(params, inputs))
    for place in range(LENGTH):
        changed = np.asarray(forward(params, inputs.at[0, place].set(200)))
        differs = np.any(changed != logits, axis=(0, 2))
        np.testing.assert_array_equal(differs, np.arange(LENGTH) >= place)


def test_stacked_layers_are_applied_one_after_the_other():
    problem = tiny()
    params, tokens = scrambled(problem), problem.train[0]

    @jax.jit
    def both(params):
        model = StackedTransformer(256, 8, 2, 2, LENGTH, rngs=nnx.Rngs(0))
        nnx.update(model, nnx.State(params))
        x = model.embedding(tokens) + model.positions(jnp.arange(LENGTH))
        graphdef, stacked = nnx.split(model.blocks)
        for i in range(2):
            x = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))(x)
        return problem.forward(params, tokens), model.norm(x) @ params["embedding"]["embedding"].T

    # Sums of some ten products of numbers of size 1, in another order.
    np.testing.assert_allclose(*both(params), rtol=1e-4, atol=1e-4)


def test_bfloat16(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["language_model"])
    tx = program.optimizer(program.parse_args(), "TNT")(0.1, 10)
    model = nnx.eval_shape(lambda: StackedTransformer(256, 8, 2, 2, LENGTH, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model, nnx.Param)

    def forward(params, inputs):
        return nnx.merge(graphdef, params)(inputs)

    def step(params, inputs, labels):
        predictive = tnt_optax.Categorical(weights=labels >= 0)
        value_and_grads = tnt_optax.value_and_sampled_grad(forward, predictive)
        _, grads, sampled_grads = value_and_grads(params, inputs, labels, jax.random.key(0))
        updates, opt_state = tx.update(grads, tx.init(params), params, sampled_grads=sampled_grads)
        return forward(params, inputs), optax.apply_updates(params, updates), opt_state

    tokens = jax.ShapeDtypeStruct((4, LENGTH), jnp.int32)
    logits, params, opt_state = jax.eval_shape(step, nnx.as_pure(params), tokens, tokens)
    assert {x.dtype for x in jax.tree.leaves((logits, params))} == {jnp.dtype(jnp.bfloat16)}
    statistics = (opt_state[0].contractions, opt_state[0].inverses, opt_state[0].momentum)
    assert {x.dtype for x in jax.tree.leaves(statistics)} == {jnp.dtype(jnp.float32)}


def test_muon_gets_the_matrices_of_each_layer():
    dims = program.matrices(tiny().params)
    attention = dims["blocks"]["attention"]
    assert (attention["query"]["kernel"].reduction_axis, attention["query"]["kernel"].output_axis) == ((1,), (2, 3))
    assert (attention["out"]["kernel"].reduction_axis, attention["out"]["kernel"].output_axis) == ((1, 2), (3,))
    assert (dims["blocks"]["hidden"]["kernel"].reduction_axis, dims["blocks"]["hidden"]["kernel"].output_axis) == (
        (1,),
        (2,),
    )
    others = [dims["embedding"]["embedding"], dims["positions"]["embedding"], attention["query"]["bias"]]
    assert others == [None] * 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--heads", "3"], "--heads: 3 do not divide a --width of 64"),
        (["--steps", "120"], "--measure-every: 50 does not divide the 120 --steps"),
        (["--tuning-steps", "40"], "the 40 --tuning-steps"),
        (["--layers", "0"], "--layers: expected an integer >= 1, got 0"),
        (["--grid", "nan"], "--grid: expected a finite number > 0, got nan"),
        (["--optimizers", "SGD"], "invalid choice"),
        (["--steps", "many"], "--steps: invalid"),
    ],
)
def test_arguments(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["language_model", *arguments])
    with pytest.raises(SystemExit, match="2"):
        program.parse_args()
    assert said in capsys.readouterr().err


def one_module(length):
    """Texts that are read faster than Python's whole library."""
    rows = data.sequences([Path(json.__file__).read_bytes()], length)
    return data.Texts(rows[4:], rows[:4])


@pytest.mark.parametrize(
    ("names", "texts", "warm_start"),
    [
        (("TNT", "AdamW"), one_module, 0),
        pytest.param(("TNT", "AdamW", "Muon"), data.python_sources, program.WARM_START, marks=pytest.mark.slow),
    ],
    ids=["small", "whole"],
)
def test_program(tmp_path, monkeypatch, names, texts, warm_start):
    monkeypatch.setattr(data, "python_sources", texts)
    monkeypatch.setattr(program, "WARM_START", warm_start)
    steps = ("--steps", 6, "--tuning-steps", 2, "--measure-every", 2, "--grid", 0.3, 1, "--optimizers", *names)
    model = ("--width", 8, "--layers", 2, "--heads", 2, "--context", 16, "--batch-size", 4)
    result = run("language_model", *steps, *model, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "language_model.json").read_text())
    assert set(written["curves"]) == set(names)
    for name, (curve,) in written["curves"].items():
        assert [len(curve[key]) for key in ("train_loss", "test_loss", "seconds")] == [4, 4, 4]
        assert curve["train_loss"][0] == pytest.approx(math.log(256), abs=0.05)  # It knows nothing yet.
        assert curve["test_loss"][-1] < curve["test_loss"][0]
        (row,) = (line for line in result.stdout.splitlines() if line.startswith(f"│ {name}"))
        assert f"{curve['train_loss'][-1]:.3f}" in row
        assert f"{curve['test_loss'][-1]:.3f}" in row
        assert f"{curve['test_loss'][-1] / math.log(2):.3f}" in row
        rates = {trial["learning_rate"] for trial in written["tuning"][name]}
        assert rates == {0.3 * program.USUAL_RATES[name], program.USUAL_RATES[name]}
    assert written["curves"]["TNT"][0]["train_loss"][0] == written["curves"]["AdamW"][0]["train_loss"][0]
    assert (tmp_path / "language_model.png").read_bytes().startswith(b"\x89PNG")
