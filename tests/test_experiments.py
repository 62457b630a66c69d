"""The runner, the workloads, the data and the reports of `examples/experiments`."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("typer", reason="the examples need the extra `examples`")

import matplotlib.pyplot as plt
from experiments import command_line, data, report, robustness, runner, workloads
from experiments.models import conv3x3
from experiments.optimizers import OPTIMIZERS, Optimizer
from typer.testing import CliRunner

import tnt_optax

pytestmark = pytest.mark.usefixtures("standard_promotion")
RNG = np.random.default_rng(0)
POSITIVE = ["epochs", "tuning-epochs", "seconds", "seeds", "learning-rate"]


@pytest.fixture
def standard_promotion():
    """Flax and Optax promote."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def line(seed, *, examples=12):
    """y = 2 x, with one weight."""
    x = jnp.float32(np.random.default_rng(seed).normal(size=(examples, 1)))
    forward = workloads.stateless(lambda params, x: params["w"] * x)
    return workloads.Problem({"w": jnp.zeros(())}, forward, lambda _: tnt_optax.Normal(), (x, 2 * x), (x, 2 * x), 4)


@pytest.fixture
def registered(monkeypatch):
    """A workload and optimizers that compile in no time: gradient descent with several grids."""
    monkeypatch.setitem(workloads.WORKLOADS, "line", workloads.Workload(line, "", epochs=4, tuning_epochs=2))

    def sgd(learning_rate, problem):
        return optax.sgd(learning_rate)

    for name, grid in {"narrow": [1e-3, 3e-3, 1e-2], "fixed": [0.1], "hot": [1e30, 1e31, 1e32]}.items():
        monkeypatch.setitem(OPTIMIZERS, name, Optimizer(sgd, grid))


def test_the_grid_is_widened_until_its_best_is_inside(registered, tmp_path):
    result = runner.run("line", "narrow", tmp_path)
    rates = [trial["learning_rate"] for trial in result["tuning"]]
    losses = {trial["learning_rate"]: trial["epochs"][-1]["train_loss"] for trial in result["tuning"]}
    best = min(losses, key=losses.get)
    assert result["runs"][0]["learning_rate"] == best
    assert min(rates) < best < max(rates)
    assert rates[:5] == [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


def test_a_best_at_the_edge_is_not_reported(registered, tmp_path):
    with pytest.raises(runner.UsageError, match="still at an edge"):
        runner.run("line", "hot", tmp_path)
    assert json.loads((tmp_path / "line/hot.json").read_text())["runs"] == []


def test_steps_are_those_of_plain_gradient_descent(registered, tmp_path):
    run = runner.run("line", "fixed", tmp_path, seeds=[3])["runs"][0]
    (x, y), w, losses = (np.asarray(z, np.float64)[:, 0] for z in line(3).train), 0.0, []
    for epoch in range(4):
        order = np.random.default_rng([3, epoch]).permutation(12)
        for i in range(3):
            chosen = order[4 * i : 4 * i + 4]
            residual = w * x[chosen] - y[chosen]
            losses.append(np.mean(residual**2) / 2)
            w -= 0.1 * np.mean(residual * x[chosen])
    np.testing.assert_allclose(run["losses"], losses, rtol=1e-4)  # float32, written with six digits
    assert run["epochs"][-1]["train_loss"] == pytest.approx(np.mean((w * x - y) ** 2) / 2, rel=1e-4)
    assert [epoch["step"] for epoch in run["epochs"]] == [0, 3, 6, 9, 12]


def test_an_interrupted_run_resumes_and_loses_no_epoch(registered, tmp_path, monkeypatch):
    whole = runner.run("line", "fixed", tmp_path / "whole")["runs"][0]
    measured, calls, fatal = runner.Trainer.means, [], [6]

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) in fatal:  # In the evaluation after the second epoch.
            raise KeyboardInterrupt
        return measured(self, *args)

    monkeypatch.setattr(runner.Trainer, "means", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run("line", "fixed", tmp_path / "parts")
    calls.clear()
    fatal.clear()
    parts = runner.run("line", "fixed", tmp_path / "parts")["runs"][0]
    assert len(calls) == 2 * 3  # The losses after the epochs 2, 3 and 4.
    assert parts["losses"] == whole["losses"]
    assert [e["test_loss"] for e in parts["epochs"]] == [e["test_loss"] for e in whole["epochs"]]
    calls.clear()
    more = runner.run("line", "fixed", tmp_path / "parts", seeds=[0, 1])
    assert len(more["runs"]) == 2
    assert len(calls) == 2 * 5  # Seed 0 is not run again.
    assert not list((tmp_path / "parts/line").glob("fixed.runs*"))


def test_a_deadline_pauses(registered, tmp_path):
    with pytest.raises(runner.DeadlineError):
        runner.run("line", "fixed", tmp_path, deadline=0.0)
    assert len(runner.run("line", "fixed", tmp_path)["runs"][0]["losses"]) == 12


def test_other_settings_are_refused_with_the_difference(registered, tmp_path):
    runner.run("line", "fixed", tmp_path)
    with pytest.raises(runner.UsageError, match="epochs is 4 there, and 5 here"):
        runner.run("line", "fixed", tmp_path, budget=runner.Budget(5))
    with pytest.raises(runner.UsageError, match="examples is the default there, and 16 here"):
        runner.run("line", "fixed", tmp_path, options={"examples": 16})


def test_other_settings_are_refused_before_the_first_training_has_ended(registered, tmp_path):
    with pytest.raises(runner.DeadlineError):
        runner.run("line", "fixed", tmp_path, deadline=0.0)
    with pytest.raises(runner.UsageError, match="falling is False there, and True here"):
        runner.run("line", "fixed", tmp_path, budget=runner.Budget(4, falling=True))
    with pytest.raises(runner.UsageError, match="no results"):
        report.tables(tmp_path)


def test_a_second_run_into_a_folder_is_refused(tmp_path):
    second = runner.exclusive(tmp_path)
    with runner.exclusive(tmp_path), pytest.raises(runner.UsageError, match="Another run"), second:
        pass
    with runner.exclusive(tmp_path):
        pass


def test_a_divergence_ends_the_run(registered, tmp_path):
    run = runner.run("line", "fixed", tmp_path, learning_rate=1e30)["runs"][0]
    assert run["diverged_at"] == int(np.argmin([x is not None and math.isfinite(x) for x in run["losses"]]))
    assert report.diverged(run)
    assert "1 of 1" in report.summary(report.results(tmp_path)["line"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing", "-o", "adam"], "There are: digits, mnist"),
        (["run", "digits", "-o", "nothing"], "There are: adam, adamw"),
        (["run", "mnist", "-o", "adam", "--data-dir", "no/such"], "Prepare it"),
        (["run", "faces", "-o", "adam", "--data-dir", "no/such"], "scikit-learn then downloads"),
        (["run", "digits", "-o", "lbfgs"], "deterministic losses"),
        (["run", "digits", "-o", "adam", "--set", "size=3"], "no option 'size'"),
        (["run", "digits", "-o", "adam", "--set", "size"], "no option 'size'"),
        (["run", "image", "-o", "adam", "--set", "size=x"], "expected a value like 64"),
        (["run", "digits", "-o", "adam", "--steps", "7"], "expected --epochs in its place"),
        (["run", "poisson", "-o", "adam", "--steps", "7"], "expected a multiple of 100"),
        *((["run", "digits", "-o", "adam", f"--{x}", "0"], f"--{x}: expected a positive") for x in POSITIVE),
        (["run", "digits", "-o", "adam", "--learning-rate", "nan"], "--learning-rate: expected a positive"),
        (["report", "no/such"], "no results in no/such"),
    ],
)
def test_errors_say_what_to_do(arguments, message, tmp_path):
    result = CliRunner().invoke(command_line.app, [*arguments, *(["--out", str(tmp_path)] * (arguments[0] == "run"))])
    assert isinstance(result.exception, runner.UsageError | FileNotFoundError)
    assert message in str(result.exception)


def test_the_command_line(registered, tmp_path):
    result = CliRunner().invoke(command_line.app, ["run", "line", "-o", "narrow,fixed", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results line -->\nold\n<!-- /results -->\nafter")
    result = CliRunner().invoke(command_line.app, ["report", str(tmp_path), "--page", str(page)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "line.png").stat().st_size > 10_000
    rows = page.read_text().splitlines()
    assert (rows[0], rows[-1]) == ("before", "after")
    (row,) = (row for row in rows if row.startswith("| fixed"))
    loss = json.loads((tmp_path / "line/fixed.json").read_text())["runs"][0]["epochs"][-1]["train_loss"]
    assert f"| {loss:.4g} |" in row


def test_schedules():
    constant = runner.schedule(2.0, 100, falling=False, adaptive=False)
    cosine = runner.schedule(2.0, 100, falling=True, adaptive=False)
    factor = runner.schedule(1.0, 100, falling=True, adaptive=True)
    assert [float(constant(t)) for t in (0, 99)] == [2, 2]
    expected = [2 * 0.1, 2, 1, 0]  # A tenth of the rise, its end, the middle of the fall, the end.
    np.testing.assert_allclose([float(cosine(t)) for t in (0, 9, 54, 99)], expected, atol=1e-6)
    np.testing.assert_allclose([float(factor(t)) for t in (0, 50, 75, 99)], [1, 1, 0.5, 0.02], atol=1e-6)


@pytest.fixture
def small_data(monkeypatch):
    """In place of what needs files."""
    images = data.Split(RNG.uniform(size=(1000, 9)).astype("f"), RNG.uniform(size=(20, 9)).astype("f"))
    labelled = tuple((RNG.integers(256, size=(n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 10) for n in (128, 10))
    for name, value in {"mnist": images, "faces": images, "cifar10": data.Split(*labelled)}.items():
        monkeypatch.setattr(data, name, lambda data_dir, value=value: value)


OPTIONS = {"transformer": {"width": 16, "layers": 2, "length": 16}, "image": {"size": 24}}


QUICK = "digits", "transformer", "poisson"
CASES = [(name, False) for name in QUICK] + [
    pytest.param(name, every, marks=pytest.mark.slow)
    for name in workloads.WORKLOADS
    for every in (False, True)
    if every or name not in QUICK
]


@pytest.mark.parametrize(("name", "every"), CASES)
def test_every_workload_traces_with_the_optimizers(name, every, small_data):
    """Types only: nothing is compiled."""
    what = workloads.WORKLOADS[name]
    problem = what.make(0, **OPTIONS.get(name, {}))
    others = {"digits": {"kfac", "shampoo", "soap", "tnt_published", "tnt_part2"}, "poisson": {"lbfgs", "engd"}}
    if every:  # KFAC is for dense layers whose inputs it can tap.
        dense = {"kfac"} if name in ("digits", "mnist", "faces") else set()
        others[name] = {"tnt_published", "soap"} | (dense if problem.batch_size or problem.augment else {"lbfgs"})
    for optimizer in {"adaptive_tnt", "muon"} | others.get(name, set()):  # The first two depend on the views.
        trainer = runner.Trainer(problem, OPTIMIZERS[optimizer], True, what.epoch_steps)
        tx = trainer.tx(highest=0.1, steps=10)
        carry = (problem.params, problem.state, tx.init(problem.params))
        batch = next(trainer.batches(problem, 0, 0))
        step = functools.partial(trainer.step, tx=tx)
        after, loss = jax.eval_shape(step, carry, problem.train, jax.random.key(0), np.int32(0), batch)
        assert jax.tree.structure(after) == jax.tree.structure(carry)
        assert loss.shape == ()
    values = jax.eval_shape(trainer.evaluate, problem.params, problem.state, *problem.test)
    assert set(values) == {"loss", *problem.metrics}


SOLUTIONS = {
    "poisson": lambda x: jnp.sin(jnp.pi * x[:, 0]) * jnp.sin(jnp.pi * x[:, 1]),
    "poisson5": lambda x: jnp.cos(jnp.pi * x) @ jnp.ones(5),
    "heat": lambda x: jnp.exp(-(jnp.pi**2) / 20 * x[:, 0]) * jnp.sin(jnp.pi * x[:, 1]),
}


@pytest.mark.parametrize("name", SOLUTIONS)
@pytest.mark.parametrize("resampled", [0, 1])
def test_the_residual_is_zero_where_the_equation_holds(name, resampled, monkeypatch):
    """With the solution in place of the network, and second derivatives in float32."""
    monkeypatch.setattr(workloads, "dense", lambda activation, params, x: SOLUTIONS[name](x)[:, None])
    problem = getattr(workloads, name)(0, resampled=resampled)
    inputs = problem.train[0]
    if resampled:
        new = problem.augment(jax.random.key(0), inputs)
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, inputs)
        assert not np.any(new["interior"] == inputs["interior"])
        inputs = new
    outputs, _ = problem.forward(problem.params, inputs, None)
    np.testing.assert_allclose(outputs["interior"], 0, atol=1e-4)
    np.testing.assert_allclose(outputs["edge"], 0, atol=1e-5)
    assert problem.metrics["l2_error"](problem.params) < 1e-5


def test_burgers_equation(monkeypatch):
    """Its residual is 0 for a travelling wave. The solution for the error has it too, by central differences."""
    nu, width = 0.1 / np.pi, 0.1

    def wave(activation, params, x):
        z = 2 * x[:, 1:] - 1
        return -2 * nu / width * jax.nn.sigmoid(z / width + nu * x[:, :1] / width**2)

    monkeypatch.setattr(workloads, "dense", wave)
    problem = workloads.burgers(0)
    outputs, _ = problem.forward(problem.params, problem.train[0], None)
    np.testing.assert_allclose(outputs["interior"], 0, atol=1e-4)  # The terms are of size 1, in float32.
    edge = problem.train[0]["edge"]
    expected = np.where(edge[:, 0] == 0, -np.sin(np.pi * (2 * np.asarray(edge[:, 1], float) - 1)), 0)
    np.testing.assert_allclose(workloads.burgers_solution(np.asarray(edge)), expected, atol=1e-6)

    def u(t, z):
        return workloads.burgers_solution(np.stack([t, (z + 1) / 2], axis=1))

    t, z = np.random.default_rng(0).uniform([[0.1], [-0.9]], [[0.9], [0.9]], (2, 50))
    h = 1e-4
    u_t, u_z = (u(t + h, z) - u(t - h, z)) / (2 * h), (u(t, z + h) - u(t, z - h)) / (2 * h)
    u_zz = (u(t, z + h) - 2 * u(t, z) + u(t, z - h)) / h**2
    # The error of the differences is h^2 times higher derivatives, of up to (1 / (2 nu))^3 inside the shock.
    scale = 1 + np.abs(u_z) ** 3
    np.testing.assert_array_less(np.abs(u_t + u(t, z) * u_z - nu * u_zz), 1e-4 * scale)


@pytest.mark.parametrize(("dims", "sides"), [(2, 3), (5, 10)])
def test_points_on_the_boundary(dims, sides):
    along, side = RNG.uniform(0.1, 0.9, (200, dims - 1)), RNG.integers(sides, size=200)
    points = np.asarray(workloads.on_sides(jnp.asarray(along), jnp.asarray(side)))
    for point, rest, number in zip(points, np.float32(along), side, strict=True):
        axis = dims - 1 - number // 2
        assert point[axis] == number % 2
        np.testing.assert_array_equal(np.delete(point, axis), rest)


def test_batch_norm_averages_are_kept_and_used(small_data):
    problem = workloads.digits_resnet(0)
    x = problem.train[0][:8]
    _, state = problem.forward(problem.params, x, problem.state)
    before, after = (jax.tree.leaves(s) for s in (problem.state, state))
    assert any(not np.allclose(a, b) for a, b in zip(before, after, strict=True))
    assert not np.allclose(*(problem.predict(problem.params, x, s) for s in (problem.state, state)))


@pytest.mark.parametrize("stride", [1, 2])
def test_the_convolution_has_the_derivatives_of_jax(stride):
    x, kernel = jnp.float32(RNG.normal(size=(2, 8, 8, 3))), jnp.float32(RNG.normal(size=(3, 3, 3, 4)))
    layout = ("NHWC", "HWIO", "NHWC")

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, ((1, 1),) * 2, dimension_numbers=layout)

    ours, theirs = (
        jax.grad(lambda *args, f=f: jnp.sum(jnp.sin(f(*args))), (0, 1))(x, kernel)
        for f in (lambda x, k: conv3x3(x, k, stride), plain)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # The same sums in float32, in another order.


def test_packed_images_are_close(tmp_path):
    """Smooth images, as photographs are: the error is that of JPEG at quality 75."""
    rows, columns = np.mgrid[:32, :32] / 31
    phase = RNG.uniform(0, 6, size=(20, 1, 1, 3))
    images = 127.5 + 100 * np.sin(phase + 3 * rows[..., None] + 2 * columns[..., None])
    images = np.rint(images).astype(np.uint8)
    decoded = data.decode(data.encode(images))
    assert decoded.shape == images.shape
    assert np.abs(decoded.astype(int) - images).mean() < 4


def test_pieces_of_texts():
    expected = [[97, 98, 99], [100, -1, -1], [101, 102, -1]]
    np.testing.assert_array_equal(data.pieces([b"abcd", b"", b"ef"], 3), expected)


def test_faces_are_normalized(tmp_path):
    people = np.repeat(np.arange(40), 1)
    np.savez(tmp_path / "olivetti_faces.npz", faces=RNG.integers(256, size=(40, 64, 64)), person_ids=people)
    faces = data.faces.__wrapped__(tmp_path, copies=(2, 3))
    assert (faces.train.shape, faces.test.shape) == ((60, 625), (30, 625))
    together = np.concatenate(faces).astype(np.float64)
    np.testing.assert_allclose(together.mean(axis=0), 0, atol=1e-5)
    assert np.mean(together**2) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("losses", "share"), [([5, 3, 1, 0.5], "0.25"), ([5, 0.9, 1.1, 1], "0.38"), ([5, 1, 1, 2], "not")]
)
def test_the_race_is_to_a_loss_that_is_kept(losses, share):
    def result(losses, seconds):
        epochs = [{"train_loss": x, "seconds": seconds * i} for i, x in enumerate(losses)]
        return {"runs": [{"epochs": epochs, "warm_start_seconds": 0.0}] * 3, "tuning": [None] * 5}

    tables = report.comparison({"line": {"adaptive_tnt": result(losses, 1), "adamw": result([6, 1], 8)}})
    assert f"| line | {share}" in tables["race"]
    assert f"| line, train loss | {losses[-1]:.3g} (5) | 1 (5) |  |" in tables["comparison"]


@pytest.mark.parametrize(("seconds", "peer", "end"), [(10.0, 300.0, 15.0), (10.0, 5.0, 10.5), (0.0, 300.0, 315.0)])
def test_time_axis_is_not_squeezed_by_a_slow_peer(tmp_path, monkeypatch, seconds, peer, end):
    def result(last):
        epochs = [{"train_loss": 1.0, "test_loss": 1.0, "step": i, "seconds": last * i} for i in range(2)]
        return {"runs": [{"epochs": epochs, "warm_start_seconds": 0.0}]}

    monkeypatch.setattr(plt, "close", lambda figure: None)
    report.plot(tmp_path / "x.png", "x", {"adaptive_tnt": result(seconds), "engd": result(peer)}, False)
    figure = plt.gcf()
    monkeypatch.undo()
    # Matplotlib's margin is 5% of the range.
    assert figure.axes[1].get_xlim()[1] == pytest.approx(end)
    plt.close(figure)


def test_errors_after_equal_seconds():
    def result(errors, seconds):
        epochs = [{"train_loss": x, "l2_error": x, "seconds": seconds * i} for i, x in enumerate(errors)]
        return {"runs": [{"epochs": epochs, "warm_start_seconds": 0.0}], "tuning": []}

    runs = {"adaptive_tnt": result([1, 0.5, 0.1], 1), "lbfgs": result([3, 2], 1.5)}
    table = report.comparison({"heat": runs})["equal_seconds"]
    assert table.splitlines()[2:] == ["| heat |  |  |  |  | 4 |  |"]  # After 1.5 s, ours has 0.5.


def test_what_counts_as_diverged():
    falls, rises, poor = ({"initial": 3.0, "highest": h, "last": x} for h, x in ((2.0, 1.0), (3.1, 1.0), (2.0, 2.1)))
    broken = {"initial": 3.0, "highest": None, "last": None}
    assert robustness.diverged([falls, falls, falls, rises, poor, broken]) == 3
    assert robustness.diverged([broken]) == 1


def test_the_robustness_is_measured_once(registered, tmp_path, monkeypatch):
    monkeypatch.setattr(robustness, "SETTINGS", {"defaults": {}, "λ = 1": {"initial_model_damping": 1.0}})
    monkeypatch.setitem(workloads.WORKLOADS, "line", workloads.Workload(functools.partial(line, examples=20), "", 4, 2))
    robustness.measure(["line"], seeds=3, fewer=2, out=tmp_path)
    monkeypatch.setattr(robustness, "train", None)
    robustness.measure(["line"], out=tmp_path)
    trainings = json.loads((tmp_path / "robustness.json").read_text())["trainings"]["line"]["defaults"]
    for seed, training in enumerate(trainings):
        order = np.random.default_rng([seed, 0]).permutation(20)[:4]
        first = np.mean(np.square(2 * np.asarray(line(seed, examples=20).train[0], np.float64)[order])) / 2
        assert training["initial"] == pytest.approx(first, rel=1e-4)  # float32, written with six digits
        assert training["last"] < 1e-6 * first < training["highest"] < first  # y = 2 x is fitted in a few steps.
    assert "| line | 0 of 3 | 0 of 2 |" in report.tables(tmp_path)["robustness"]


@pytest.mark.slow
def test_the_gpu_program_in_a_tiny_form(small_data, tmp_path):
    from experiments import gpu

    gpu.run(tmp_path, data_dir=tmp_path, minutes=20, tiny=True)
    assert set(report.results(tmp_path)["cifar10"]) == set(gpu.CIFAR10)
    assert set(report.results(tmp_path)["transformer"]) == set(gpu.LANGUAGE)
    assert len(list(tmp_path.glob("step_*.json"))) == 3
