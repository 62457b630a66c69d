"""The program for the paper's Section 6.2: networks, data, augmentation, an epoch as one scan, and what it writes."""

import csv
import itertools
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("sklearn", reason="the examples need the extra `examples`")
pytest.importorskip("matplotlib", reason="the examples need the extra `examples`")
import image_classification as program
from common import cifar
from common.models import VGG16, ResNet32
from flax import nnx
from helpers import count
from test_examples import program as run_program

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _strict_promotion():
    """Not here: Flax itself relies on implicit promotion."""


def params_of(make):
    _, params, _ = nnx.split(make(), nnx.Param, ...)
    return nnx.as_pure(params)


# Networks


def test_resnet32_has_the_known_number_of_parameters():
    params = params_of(lambda: nnx.eval_shape(lambda: ResNet32(10, rngs=nnx.Rngs(0))))
    assert sum(x.size for x in jax.tree.leaves(params)) == 464_154  # 0.46M, Table 6 of He et al. (2016)


def vgg16_shapes(classes, divisor):
    """By formula, in order: of the convolutions, of the norms, of the linear layers."""
    widths = [64, 64, 128, 128, 256, 256, 256, *[512] * 6]
    widths = [3, *(width // divisor for width in widths)]
    sizes = [widths[-1], 4096 // divisor, 4096 // divisor, classes]
    return (
        [((3, 3, n, m), (m,)) for n, m in itertools.pairwise(widths)],
        [((m,), (m,)) for m in widths[1:]],
        [((n, m), (m,)) for n, m in itertools.pairwise(sizes)],
    )


@pytest.mark.parametrize(("classes", "divisor"), [(100, 1), (10, 8)])
def test_vgg16_has_the_shapes_of_the_paper(classes, divisor):
    params = params_of(lambda: nnx.eval_shape(lambda: VGG16(classes, width_divisor=divisor, rngs=nnx.Rngs(0))))
    convs, norms, layers = vgg16_shapes(classes, divisor)
    assert [(p["kernel"].shape, p["bias"].shape) for p in params["convs"].values()] == convs
    assert [(p["scale"].shape, p["bias"].shape) for p in params["norms"].values()] == norms
    assert [(p["kernel"].shape, p["bias"].shape) for p in params["layers"].values()] == layers
    expected = sum(math.prod(shape) for pair in (*convs, *norms, *layers) for shape in pair)
    assert sum(x.size for x in jax.tree.leaves(params)) == expected
    if divisor == 1:
        assert expected == 34_015_396


def assert_variance(weights, variance):
    # The variance of n samples has a deviation of about sqrt(2/n) of it; five of them. (A uniform one has less.)
    np.testing.assert_allclose(np.var(weights), variance, rtol=5 * math.sqrt(2 / weights.size))
    np.testing.assert_allclose(np.mean(weights), 0, atol=5 * math.sqrt(variance / weights.size))


@pytest.mark.slow
def test_initial_weights_of_the_resnet():
    params = params_of(lambda: ResNet32(10, rngs=nnx.Rngs(0)))
    kernels = [params["conv"]["kernel"], params["out"]["kernel"]]
    kernels += [block[name]["kernel"] for block in params["blocks"].values() for name in ("conv1", "conv2")]
    assert len(kernels) == 32  # The name of the network.
    for kernel in kernels:
        assert_variance(kernel, 2 / math.prod(kernel.shape[:-1]))
    # Normal, not cut off at two deviations, as Flax's he_normal is.
    assert np.abs(kernels[-1]).max() > 3 * np.std(kernels[-1])
    biases = {str(path[-2:]): x for path, x in jax.tree_util.tree_leaves_with_path(params) if "bias" in str(path)}
    assert not any(np.any(x) for x in biases.values())


@pytest.mark.slow
def test_initial_weights_of_the_vgg16():
    params = params_of(lambda: VGG16(100, width_divisor=8, rngs=nnx.Rngs(0)))
    for conv in params["convs"].values():
        assert_variance(conv["kernel"], 2 / (9 * conv["kernel"].shape[-1]))
        assert not np.any(conv["bias"])
    for layer in params["layers"].values():
        fan_in = len(layer["kernel"])
        assert_variance(layer["kernel"], 1 / (3 * fan_in))
        assert np.abs(layer["kernel"]).max() <= 1 / math.sqrt(fan_in)
        assert not np.any(layer["bias"])


def convolved(x, kernel, stride=1):
    """3x3, padded by one zero, in float64."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    size = x.shape[1]
    shifted = (padded[:, i : i + size, j : j + size] @ kernel[i, j] for i in range(3) for j in range(3))
    return sum(shifted)[:, ::stride, ::stride]


def normalized(x, norm):
    x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    return x * norm["scale"] + norm["bias"]


def resnet_in_numpy(params, x, blocks):
    x = np.maximum(normalized(convolved(x, params["conv"]["kernel"]), params["norm"]), 0)
    for index, block in params["blocks"].items():
        stride = 2 if index in (blocks, 2 * blocks) else 1
        y = np.maximum(normalized(convolved(x, block["conv1"]["kernel"], stride), block["norm1"]), 0)
        y = normalized(convolved(y, block["conv2"]["kernel"]), block["norm2"])
        shortcut = np.zeros_like(y)
        shortcut[..., : x.shape[-1]] = x[:, ::stride, ::stride]
        x = np.maximum(y + shortcut, 0)
    return x.mean((1, 2)) @ params["out"]["kernel"] + params["out"]["bias"]


def vgg16_in_numpy(params, x):
    for index in range(13):
        conv = params["convs"][index]
        x = np.maximum(normalized(convolved(x, conv["kernel"]) + conv["bias"], params["norms"][index]), 0)
        if index in (1, 3, 6, 9, 12):
            x = np.maximum(np.maximum(x[:, ::2, ::2], x[:, 1::2, ::2]), np.maximum(x[:, ::2, 1::2], x[:, 1::2, 1::2]))
    x = x.reshape(len(x), -1)
    for index in range(3):
        layer = params["layers"][index]
        x = x @ layer["kernel"] + layer["bias"]
        x = np.maximum(x, 0) if index < 2 else x
    return x


@pytest.mark.parametrize(
    ("model", "in_numpy", "size"),
    [
        (lambda: ResNet32(5, channels=2, blocks=2, rngs=nnx.Rngs(0)), lambda p, x: resnet_in_numpy(p, x, 2), 8),
        (lambda: VGG16(5, width_divisor=32, rngs=nnx.Rngs(0)), vgg16_in_numpy, 32),
    ],
    ids=["resnet", "vgg16"],
)
def test_networks_against_numpy(model, in_numpy, size):
    # Any numbers will do, and NumPy's cost no compilation.
    graphdef, params, averages = nnx.split(nnx.eval_shape(model), nnx.Param, ...)
    rng = np.random.default_rng(0)
    params, averages = jax.tree.map(
        lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), nnx.as_pure((params, averages))
    )
    images = rng.normal(size=(6, size, size, 3)).astype(np.float32)

    @jax.jit
    def forward(params, averages, images):
        model = nnx.merge(graphdef, params, averages)
        return model(images), nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))

    logits, new = forward(params, averages, images)
    expected = in_numpy(jax.tree.map(np.float64, params), np.float64(images))
    # float32 through 13 layers; norms over as few as 24 numbers, whose variance may be small, stretch the rounding.
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    conv, old, new = (
        tree[name] if name in tree else tree[f"{name}s"][0]
        for tree, name in ((params, "conv"), (averages, "norm"), (new, "norm"))
    )
    mean = (convolved(np.float64(images), conv["kernel"]) + conv.get("bias", 0)).mean((0, 1, 2))
    # The averages take in a tenth of the new, as PyTorch's. Rounding of sums of some hundred numbers.
    np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * mean, rtol=1e-4, atol=1e-5)


# Data


def test_digits():
    from sklearn.datasets import load_digits

    data = cifar.digits()
    assert data.classes == 10
    pixels, labels = load_digits(return_X_y=True)
    images = np.empty((1797, 32, 32, 3), np.uint8)
    images[np.arange(1797) % 5 != 0], images[::5] = data.train.images, data.test.images
    of_images = np.empty(1797, np.int32)
    of_images[np.arange(1797) % 5 != 0], of_images[::5] = data.train.labels, data.test.labels
    np.testing.assert_array_equal(of_images, labels)
    blocks = images.reshape(1797, 8, 4, 8, 4, 3).swapaxes(2, 3).reshape(1797, 64, 48)
    # Half a level of rounding.
    np.testing.assert_allclose(blocks, np.broadcast_to(pixels[..., None] * 255 / 16, blocks.shape), atol=0.51)


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_says_what_is_missing(tmp_path, classes):
    (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
    (tmp_path / "mnist" / "3.0.1" / "mnist-train.array_record-00000-of-00001").touch()
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}: no `cifar{classes}`"):
        cifar.cifar(classes, tmp_path)


class FakeSource:
    """What `tfds.data_source` returns."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitems__(self, indices):
        return [self.examples[i] for i in indices]


@pytest.mark.parametrize("prepared", [True, False])
def test_cifar100_through_a_fake_source(tmp_path, monkeypatch, prepared):
    tfds = pytest.importorskip("tensorflow_datasets", reason="the examples need the extra `examples`")
    rng = np.random.default_rng(0)
    examples = {
        part: [
            {"image": rng.integers(0, 256, (32, 32, 3)).astype(np.uint8), "label": label, "coarse_label": 0, "id": b""}
            for label in labels
        ]
        for part, labels in {"train": (99, 3, 41), "test": (7, 0)}.items()
    }
    calls = []

    def data_source(name, *, split, data_dir, download):
        calls.append((name, data_dir, download))
        return FakeSource(examples[split])

    monkeypatch.setattr(tfds, "data_source", data_source)
    (tmp_path / "cifar100" / "3.0.2").mkdir(parents=True)
    (tmp_path / "cifar100" / "3.0.2" / "cifar100-train.array_record-00000-of-00001").touch()
    folder = tmp_path if prepared else None
    data = cifar.load("cifar100", folder)
    assert calls == [("cifar100", folder, not prepared)] * 2  # A given directory is only read.
    assert data.classes == 100
    for split, part in ((data.train, "train"), (data.test, "test")):
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        np.testing.assert_array_equal(split.images, [example["image"] for example in examples[part]])
        np.testing.assert_array_equal(split.labels, [example["label"] for example in examples[part]])


# Augmentation


def test_augmentation_against_numpy():
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (2000, 5, 5, 3)).astype(np.uint8)
    key = jax.random.key(3)
    windows = np.asarray(program.augment(key, jnp.asarray(images), flip=True))
    assert windows.dtype == np.uint8
    padded = np.zeros((2000, 13, 13, 3), np.uint8)
    padded[:, 4:9, 4:9] = images
    places = list(itertools.product(range(9), range(9)))
    crops = np.stack([padded[:, i : i + 5, j : j + 5] for i, j in places])
    upright = (crops == windows).all((2, 3, 4))
    mirrored = (crops[:, :, :, ::-1] == windows).all((2, 3, 4))
    # An image of random pixels fits one window only, and one direction (where anything of the image is left).
    assert (upright | mirrored).any(0).all()
    assert (upright.sum(0) <= 1).all()
    assert (mirrored.sum(0) <= 1).all()
    assert set(np.flatnonzero(upright.any(1))) == set(np.flatnonzero(mirrored.any(1))) == set(range(81))
    # 2000 coins: five deviations of 22.
    assert abs(int(mirrored.any(0).sum()) - 1000) < 112

    np.testing.assert_array_equal(windows, program.augment(key, jnp.asarray(images), flip=True))
    assert not np.array_equal(windows, program.augment(jax.random.key(4), jnp.asarray(images), flip=True))
    unmirrored = np.asarray(program.augment(key, jnp.asarray(images), flip=False))
    assert (crops == unmirrored).all((2, 3, 4)).any(0).all()


def test_moments():
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3)).astype(np.uint8)
    mean, deviation = program.moments(jnp.asarray(images))
    pixels = images.reshape(-1, 3) / 255
    # Rounding of a sum of some hundred numbers.
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-5)
    np.testing.assert_allclose(deviation, pixels.std(0), rtol=1e-5)


# Optimizers


@pytest.mark.parametrize(
    ("options", "name", "every", "epochs"),
    [
        ("", "TNT", 40, 100),
        ("", "Shampoo", 40, 100),
        ("", "SGD-m", 60, 200),
        ("--epochs 130", "Adam", 60, 130),
        ("--epochs 8 --drop-every 3", "SGD-m", 3, 8),
    ],
)
def test_the_learning_rate_drops_where_the_papers_does(options, name, every, epochs, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["image_classification.py", "--dataset", "cifar10", *options.split()])
    args = program.parse_args()
    schedule = program.schedule_of(args, name, 390)
    numbers = np.arange(epochs)
    for step in (0, 389):  # The last step of an epoch still belongs to it.
        rates = schedule(jnp.asarray(numbers * 390 + step, jnp.int32))
        expected = program.SETTINGS[name].learning_rate * 0.1 ** (numbers // every)
        np.testing.assert_allclose(rates, expected, rtol=1e-5)  # float32


@pytest.mark.parametrize("name", program.SETTINGS)
def test_weight_decay_is_decoupled_and_steps_descend(name):
    settings = program.SETTINGS[name]
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32), "b": jnp.ones(5)}
    tx = program.make_optimizer(name, settings, 0.5)
    state, update = tx.init(params), jax.jit(tx.update)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = update(zeros, state, params, sampled_grads=zeros)
    for u, x in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(u, -0.5 * settings.weight_decay * x, rtol=1e-5)  # A few roundings in float32.
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    with_gradient, _ = update(grads, state, params, sampled_grads=grads)
    direction = jax.tree.map(jnp.subtract, with_gradient, updates)
    assert optax.tree.vdot(direction, grads) < 0


# Training


class Tiny(nnx.Module):
    """A convolution with BatchNorm and a linear layer: TNT's step for it compiles fast."""

    def __init__(self, classes=5, *, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(4, classes, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def make_trainer(name="TNT", number=100, batch_size=8, learning_rate=None, size=8):
    rng = np.random.default_rng(0)

    def split(number):
        images = rng.integers(0, 256, (number, size, size, 3)).astype(np.uint8)
        return jnp.asarray(images), jnp.asarray(rng.integers(0, 5, number), jnp.int32)

    return program.Trainer(
        lambda seed: Tiny(rngs=nnx.Rngs(seed)),
        program.make_optimizer(name, program.SETTINGS[name], learning_rate or program.SETTINGS[name].learning_rate),
        split(number),
        split(13),
        batch_size=batch_size,
        flip=True,
        empirical=name == "TNT-EF",
    )


def test_the_batches_of_an_epoch():
    trainer = make_trainer()
    indices, keys = trainer.batches(trainer.train, jax.random.key(0))
    assert indices.shape == (12, 8)
    assert len(np.unique(indices)) == 96  # No image twice.
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == 12
    others, _ = trainer.batches(trainer.train, jax.random.key(1))
    assert not np.array_equal(indices, others)


def test_an_epoch_is_its_steps_one_by_one():
    trainer = make_trainer()
    key = jax.random.key(5)
    state = trainer.init(0)
    step = jax.jit(trainer.step)
    expected, losses = state, []
    for indices, subkey in zip(*trainer.batches(trainer.train, key), strict=True):
        expected, loss = step(expected, trainer.train, indices, subkey)
        losses.append(loss)
    start, averages = jax.tree.map(np.array, state[:2])  # Copies, because it is donated.
    result, of_scan = trainer.jitted_epoch(state, trainer.train, key)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.opt_state))  # Its memory is used again.
    # Two compilations of one step round differently, and twelve steps with inverses of condition 1e2 enlarge it.
    np.testing.assert_allclose(of_scan, losses, rtol=1e-4)
    moved = max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (start, expected.params)), strict=True))
    for name in ("params", "averages"):
        for x, y in zip(*(jax.tree.leaves(getattr(each, name)) for each in (result, expected)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-2 * moved)
    for before, after in zip(*map(jax.tree.leaves, (averages, result.averages)), strict=True):
        assert (before != after).all()
    tnt = result.opt_state[0]
    assert int(tnt.count) == 12
    assert int(tnt.statistics_count) == 2  # Of steps 0 and 10.


@pytest.mark.parametrize(("name", "second"), [("TNT", 1), ("TNT-EF", 0), ("SGD-m", 0)])
def test_the_second_backward_pass_is_conditional(name, second):
    trainer = make_trainer(name)
    state = jax.eval_shape(lambda: trainer.init(0))
    jaxpr = jax.make_jaxpr(trainer.epoch)(state, trainer.train, jax.random.key(0))
    # Forwards, and backwards to the kernel; nothing goes back to the images.
    assert count(jaxpr, "conv_general_dilated", inside_cond=False) == 2
    assert count(jaxpr, "conv_general_dilated", inside_cond=True) == second


@pytest.mark.parametrize("name", ["TNT", "TNT-EF"])
def test_the_warm_start_takes_a_mean_over_more_than_an_epoch(name):
    trainer = make_trainer(name, number=20)
    trainer.train = (trainer.train[0], jnp.zeros(20, jnp.int32))
    batches, gradients, jitted = [], [], trainer.jitted_gradient

    def spy(state, data, indices, key):
        batches.append(tuple(sorted(indices.tolist())))
        gradients.append(jitted(state, data, indices, key)["out"])
        return jitted(state, data, indices, key)

    trainer.jitted_gradient = spy
    state = trainer.init(1)
    warm = trainer.warm_start(state, 1, 5)
    for before, after in zip(jax.tree.leaves(state[:2]), jax.tree.leaves(warm[:2]), strict=True):
        np.testing.assert_array_equal(before, after)
    assert len(set(batches)) == 5  # Two steps an epoch; the next one has another order.
    assert not set(batches[0]) & set(batches[1])
    tnt = warm.opt_state[0]
    assert int(tnt.statistics_count) == 5
    g, (left, right) = np.float64([each["kernel"] for each in gradients]), tnt.contractions["out"]["kernel"]
    # Sums of a few products in float32.
    np.testing.assert_allclose(left, (g @ g.swapaxes(1, 2)).mean(0), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(right, (g.swapaxes(1, 2) @ g).mean(0), rtol=1e-4, atol=1e-9)
    # All labels are 0: the gradient of the output's bias is then p - (1, 0, ...), that of sampled labels is not.
    signs = np.sign([each["bias"] for each in gradients])
    assert (signs == [-1, 1, 1, 1, 1]).all() == (name == "TNT-EF")


def test_evaluation_counts_every_test_image_once(monkeypatch):
    trainer = make_trainer("SGD-m")
    images, labels = trainer.test
    state, _ = trainer.jitted_epoch(trainer.init(0), trainer.train, jax.random.key(0))
    monkeypatch.setattr(program, "EVALUATION_BATCH", 5)  # 13 = 5 + 5 + 3
    loss, errors = trainer.jitted_evaluate(state, trainer.test)
    model = nnx.merge(trainer.graphdef, state.params, state.averages)
    model.eval()
    train = np.asarray(trainer.train[0]).reshape(-1, 3) / 255
    logits = np.float64(model(jnp.asarray((np.asarray(images) / 255 - train.mean(0)) / train.std(0), jnp.float32)))
    nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(13), labels]
    np.testing.assert_allclose(loss, nll.sum(), rtol=1e-4)  # float32
    assert errors == (logits.argmax(1) != np.asarray(labels)).sum()


def test_labels_go_with_their_images():
    """A problem that is easy, but not where the one or the other is shuffled alone."""
    trainer = make_trainer("SGD-m", number=120)
    labels = np.arange(120) % 3
    images = np.full((120, 8, 8, 3), 20, np.uint8)
    images[np.arange(120), ..., labels] = 220  # Red, green and blue.
    trainer.train = trainer.test = (jnp.asarray(images), jnp.asarray(labels, jnp.int32))
    epochs = list(trainer.run(trainer.init(0), 0, 5))
    assert epochs[0].test_loss > epochs[-1].test_loss
    assert epochs[-1].test_error == 0
    assert epochs[-1].train_loss < 0.5  # Of three classes by chance: 1.1.


def test_a_training_that_diverges_stops():
    trainer = make_trainer("SGD-m", number=24, learning_rate=1e30)
    epochs = list(trainer.run(trainer.init(0), 0, 3))
    assert len(epochs) < 3
    assert not math.isfinite(epochs[-1].train_loss)


# The program


@pytest.mark.parametrize(
    ("model", "examples", "warm_start"), [("tiny", 128, 0), pytest.param("resnet32", 256, 2, marks=pytest.mark.slow)]
)
def test_the_program(tmp_path, monkeypatch, model, examples, warm_start):
    if model == "tiny":
        monkeypatch.setattr(program, "ResNet32", lambda classes, *, rngs, **_: Tiny(classes, rngs=rngs))
    sizes = ("--examples", examples, "--batch-size", 64, "--epochs", 3, "--channels", 2)
    names = ("TNT", "SGD-m")  # To compile all five takes twice as long.
    result = run_program(
        "image_classification",
        *sizes,
        "--warm-start-batches",
        warm_start,
        "--seeds",
        2,
        "--optimizers",
        *names,
        "--out",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "TNT: 3 epochs, learning rate 0.0001, weight decay 10, damping 0.01" in result.stdout
    stem = tmp_path / "image_classification_digits"
    written = json.loads(stem.with_suffix(".json").read_text())
    assert written["arguments"]["channels"] == 2
    assert written["machine"]["platform"]
    runs = written["runs"]
    assert [(run["optimizer"], run["seed"]) for run in runs] == [(name, seed) for name in names for seed in (0, 1)]
    for run in runs:
        for field in ("train_loss", "test_loss", "test_error", "seconds"):
            assert len(run[field]) == 3
        assert run["seconds"] == sorted(run["seconds"])
        assert run["learning_rate"] == program.SETTINGS[run["optimizer"]].learning_rate
        assert 0 < run["train_loss"][-1] < 10
        # 360 test images.
        assert all(abs(360 * error - round(360 * error)) < 1e-9 for error in run["test_error"])
    assert len({tuple(run["train_loss"]) for run in runs}) == 4
    for name in names:
        accuracies = [100 * (1 - run["test_error"][-1]) for run in runs if run["optimizer"] == name]
        assert f"{np.mean(accuracies):.2f}" in result.stdout
    rows = list(csv.DictReader(stem.with_suffix(".csv").open()))
    assert len(rows) == 12
    for run, row in zip(np.repeat(runs, 3), rows, strict=True):
        epoch = int(row["epoch"]) - 1
        assert (row["optimizer"], int(row["seed"])) == (run["optimizer"], run["seed"])
        assert all(float(row[field]) == run[field][epoch] for field in ("train_loss", "test_loss", "test_error"))
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--learning-rate 0.1 --optimizers TNT Adam", "--learning-rate goes with one of the --optimizers"),
        ("--damping 0.1 --optimizers SGD-m", "SGD-m has none"),
        ("--data-dir here", "--dataset cifar10"),
        ("--epochs 0", "--epochs: expected at least 1"),
    ],
)
def test_wrong_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["image_classification.py", *arguments.split()])
    with pytest.raises(SystemExit) as caught:
        program.parse_args()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_directory_without_the_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["image_classification.py", "--dataset", "cifar10", "--data-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match=str(tmp_path)):
        program.main()


def test_the_presets_are_the_papers(monkeypatch):
    for dataset, model in (("cifar10", "resnet32"), ("cifar100", "vgg16")):
        monkeypatch.setattr(sys, "argv", ["image_classification.py", "--dataset", dataset])
        args = program.parse_args()
        assert (args.model, args.blocks, args.channels, args.batch_size) == (model, 5, 16, 128)
        assert args.warm_start_batches is None
        assert {name: program.number_of_epochs(args, name) for name in program.SETTINGS} == {
            "TNT": 100,
            "TNT-EF": 100,
            "SGD-m": 200,
            "Adam": 200,
            "Shampoo": 100,
        }


def test_the_page_has_the_numbers_of_its_program():
    page = (ROOT / "docs/image_classification.md").read_text()
    written = json.loads((ROOT / "docs/image_classification_cifar10.json").read_text())
    for run in written["runs"]:
        numbers = [f"{run['train_loss'][-1]:.3f}", f"{run['test_loss'][-1]:.3f}"]
        numbers += [f"{100 * (1 - error):.1f}" for error in (run["test_error"][-1], min(run["test_error"]))]
        assert (
            f"| {run['optimizer']} | {run['learning_rate']:g} | {run['weight_decay']:g} | {' | '.join(numbers)} |"
            in page
        )
    for name, settings in program.SETTINGS.items():
        damping = "" if settings.damping is None else f" {settings.damping:g}"
        assert f"| {name} | {settings.learning_rate:g} | {settings.weight_decay:g} |{damping} |" in page
