"""Trains a ResNet-32 or a VGG16 to classify small images with TNT and other optimizers, as in the paper's Section 6.2.

All optimizers start from the same parameters and see the same batches. Hyper-parameters and schedule are the paper's
where it has published them (see `SETTINGS`); nothing is tuned here. A whole epoch is one compiled program: the images
stay on the device as bytes, and are shuffled, cropped, mirrored and normalized there.
"""

import argparse
import csv
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import cifar, report
from common.baselines import shampoo
from common.models import VGG16, ResNet32
from flax import nnx
from jax import lax
from matplotlib.ticker import LogFormatter
from rich.console import Console

import tnt_optax

PADDING = 4
EVALUATION_BATCH = 500


@dataclasses.dataclass(frozen=True)
class Settings:
    """An optimizer's hyper-parameters; `damping` is epsilon, which SGD has not."""

    learning_rate: float
    weight_decay: float
    damping: float | None = None


# TNT's, Shampoo's and SGD-m's are the paper's for CIFAR-10, and so is Adam's damping. Adam's learning rate and weight
# decay are not known: the learning rate is the usual one, and its product with the weight decay that of SGD-m. TNT-EF
# has TNT's.
SETTINGS = {
    "TNT": Settings(1e-4, 10.0, 0.01),
    "TNT-EF": Settings(1e-4, 10.0, 0.01),
    "SGD-m": Settings(0.03, 0.01),
    "Adam": Settings(1e-3, 0.3, 1e-8),
    "Shampoo": Settings(0.01, 0.1, 0.01),
}
FIRST_ORDER = ("SGD-m", "Adam")


@dataclasses.dataclass(frozen=True)
class Preset:
    """What fits a dataset."""

    model: str
    blocks: int
    channels: int
    epochs: tuple[int, int]  # of the first-order methods, and of the others
    warm_start_batches: int | None  # None: an epoch


PRESETS = {
    "digits": Preset("resnet32", blocks=1, channels=8, epochs=(10, 10), warm_start_batches=10),
    "cifar10": Preset("resnet32", blocks=5, channels=16, epochs=(200, 100), warm_start_batches=None),
    "cifar100": Preset("vgg16", blocks=5, channels=16, epochs=(200, 100), warm_start_batches=None),
}


def make_optimizer(
    name: str, settings: Settings, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """One of `SETTINGS`, with decoupled weight decay: W <- W - learning_rate (direction + weight_decay W)."""
    if name in ("TNT", "TNT-EF"):
        return tnt_optax.tnt(
            learning_rate,
            damping=settings.damping or 0.0,
            weight_decay=settings.weight_decay,
            statistics_period=10,
            inverse_period=100,
            fisher="sampled" if name == "TNT" else "empirical",
        )
    direction = {
        "SGD-m": lambda: optax.trace(0.9),
        "Adam": lambda: optax.scale_by_adam(eps=settings.damping or 0.0),
        # With a learning rate of 1 it is the direction, negated.
        "Shampoo": lambda: optax.chain(
            shampoo(1.0, damping=settings.damping or 0.0, statistics_period=10, inverse_period=100), optax.scale(-1.0)
        ),
    }[name]()
    tx = optax.chain(
        direction, optax.add_decayed_weights(settings.weight_decay), optax.scale_by_learning_rate(learning_rate)
    )
    return optax.with_extra_args_support(tx)


def augment(key: jax.Array, images: jax.Array, *, flip: bool) -> jax.Array:
    """A window of every image, at a random place of it after padding with zeros; with `flip`, half are mirrored."""
    crop_key, flip_key = jax.random.split(key)
    size = images.shape[1:]
    padded = jnp.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    corners = jax.random.randint(crop_key, (len(images), 2), 0, 2 * PADDING + 1)
    windows = jax.vmap(lambda image, corner: lax.dynamic_slice(image, (corner[0], corner[1], 0), size))(padded, corners)
    if not flip:
        return windows
    mirrored = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirrored, windows[:, :, ::-1], windows)


def moments(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of each channel, of pixels in [0, 1]."""
    # First of every image: so long a sum of float32 would not be exact.
    pixels = images.astype(jnp.float32) / 255
    mean = pixels.mean(axis=(1, 2)).mean(axis=0)
    return mean, jnp.sqrt(jnp.square(pixels - mean).mean(axis=(1, 2)).mean(axis=0))


Data = tuple[jax.Array, jax.Array]  # images and labels


class State(NamedTuple):
    """All that changes in a training. `averages` are BatchNorm's."""

    params: Any
    averages: Any
    opt_state: Any


class Epoch(NamedTuple):
    """The result of an epoch: the mean loss of its steps, and loss and error rate on the test images after it."""

    train_loss: float
    test_loss: float
    test_error: float
    seconds: float


class Trainer:
    """Trains a classifier with one optimizer, from as many seeds as wanted, compiling it once.

    Args:
      make_model: from a seed.
      tx: the optimizer.
      train: images, as bytes, and labels.
      test: the same.
      batch_size: images a step; an epoch's incomplete last batch is dropped.
      flip: whether images are mirrored.
      empirical: the warm start takes the gradients themselves, for TNT-EF.
    """

    def __init__(
        self,
        make_model: Callable[[int], nnx.Module],
        tx: optax.GradientTransformationExtraArgs,
        train: Data,
        test: Data,
        *,
        batch_size: int,
        flip: bool,
        empirical: bool = False,
    ):
        self.make_model, self.tx, self.train, self.test = make_model, tx, train, test
        self.batch_size, self.flip, self.empirical = batch_size, flip, empirical
        self.mean, self.deviation = jax.jit(moments)(self.train[0])
        model = nnx.eval_shape(lambda: make_model(0))
        model.train()
        self.graphdef = nnx.graphdef(model)
        model.eval()
        self.graphdef_of_evaluation = nnx.graphdef(model)
        self.value_and_grads = tnt_optax.value_and_sampled_grad(
            self.forward, tnt_optax.Categorical(), has_aux=True, scale="mean"
        )
        # The images are arguments, because those that a function closes over become constants of its program.
        self.jitted_epoch: Any = jax.jit(self.epoch, donate_argnums=0)
        self.jitted_evaluate = jax.jit(self.evaluate)
        self.jitted_gradient = jax.jit(self.gradient)
        self.compiled: Any = None
        self.compile_seconds = 0.0

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train[0]) // self.batch_size

    def init(self, seed: int) -> State:
        _, params, averages = nnx.split(self.make_model(seed), nnx.Param, ...)
        params, averages = nnx.as_pure(params), nnx.as_pure(averages)
        return State(params, averages, self.tx.init(params))

    def normalize(self, images: jax.Array) -> jax.Array:
        return (images.astype(jnp.float32) / 255 - self.mean) / self.deviation

    def forward(self, params: Any, inputs: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        images, averages = inputs
        model: Any = nnx.merge(self.graphdef, params, averages, copy=True)
        return model(self.normalize(images)), nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))

    def losses_of_batch(self, state: State, data: Data, indices: jax.Array, key: jax.Array) -> Any:
        """The loss with BatchNorm's new averages, the gradient, and the sampled gradient as a function."""
        augment_key, label_key = jax.random.split(key)
        images, labels = data[0][indices], data[1][indices]
        inputs = (augment(augment_key, images, flip=self.flip), state.averages)
        return self.value_and_grads(state.params, inputs, labels, label_key)

    def step(self, state: State, data: Data, indices: jax.Array, key: jax.Array) -> tuple[State, jax.Array]:
        (loss, averages), grads, sampled_grads = self.losses_of_batch(state, data, indices, key)
        # As a function the sampled gradient costs nothing but on the steps that use it.
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params, sampled_grads=sampled_grads)
        return State(optax.apply_updates(state.params, updates), averages, opt_state), loss

    def batches(self, data: Data, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The indices (steps, batch) of an epoch's batches, and a key for each."""
        order_key, step_key = jax.random.split(key)
        steps = len(data[0]) // self.batch_size
        order = jax.random.permutation(order_key, len(data[0]))[: steps * self.batch_size]
        return order.reshape(steps, self.batch_size), jax.random.split(step_key, steps)

    def epoch(self, state: State, data: Data, key: jax.Array) -> tuple[State, jax.Array]:
        """One pass over the shuffled images; also the loss of every step."""
        return lax.scan(lambda state, batch: self.step(state, data, *batch), state, self.batches(data, key))

    def gradient(self, state: State, data: Data, indices: jax.Array, key: jax.Array) -> Any:
        """What the warm start absorbs."""
        _, grads, sampled_grads = self.losses_of_batch(state, data, indices, key)
        return grads if self.empirical else sampled_grads()

    def evaluate(self, state: State, data: Data) -> jax.Array:
        """Sum of the losses and number of errors, in batches, with BatchNorm's running averages."""
        number = len(data[0])
        size = min(EVALUATION_BATCH, number)
        places = jnp.arange(-(-number // size) * size).reshape(-1, size)

        def add(total: jax.Array, place: jax.Array) -> tuple[jax.Array, None]:
            indices, valid = place % number, place < number  # The last batch is filled up.
            model: Any = nnx.merge(self.graphdef_of_evaluation, state.params, state.averages, copy=True)
            logits, labels = model(self.normalize(data[0][indices])), data[1][indices]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            wrong = jnp.argmax(logits, axis=-1) != labels
            return total + jnp.stack([jnp.where(valid, losses, 0).sum(), jnp.where(valid, wrong, 0.0).sum()]), None

        return lax.scan(add, jnp.zeros(2), places)[0]

    def warm_start(self, state: State, seed: int, number: int) -> State:
        """TNT's statistics from so many batches at the initial parameters; those after an epoch are of the next."""

        _, key = jax.random.split(jax.random.key(seed))

        def gradients() -> Iterator[Any]:
            for first in range(0, number, self.steps_per_epoch):
                indices, keys = self.batches(self.train, jax.random.fold_in(key, first))
                for batch in range(min(number - first, self.steps_per_epoch)):
                    yield self.jitted_gradient(state, self.train, indices[batch], keys[batch])

        opt_state = tnt_optax.warm_start(self.tx, state.opt_state, state.params, gradients())
        return state._replace(opt_state=opt_state)

    def run(self, state: State, seed: int, epochs: int) -> Iterator[Epoch]:
        """Trains, and yields the result of every epoch; stops if a loss is not finite. `seconds` exclude evaluation."""
        key, _ = jax.random.split(jax.random.key(seed))
        if self.compiled is None:  # Ahead, so that no second of it is counted.
            start = time.perf_counter()
            self.compiled = self.jitted_epoch.lower(state, self.train, key).compile()
            self.compile_seconds = time.perf_counter() - start
        seconds = 0.0
        for number in range(epochs):
            start = time.perf_counter()
            state, losses = self.compiled(state, self.train, jax.random.fold_in(key, number))
            train_loss = float(np.mean(losses))  # Waits for them.
            seconds += time.perf_counter() - start
            test_loss, errors = map(float, self.jitted_evaluate(state, self.test))
            yield Epoch(train_loss, test_loss / len(self.test[0]), errors / len(self.test[0]), seconds)
            if not math.isfinite(train_loss):
                return


def main() -> None:
    args = parse_args()
    console = Console()
    try:
        data = cifar.load(args.dataset, args.data_dir)
    except FileNotFoundError as error:
        raise SystemExit(f"--data-dir: {error}") from None
    train: Data = (jnp.asarray(data.train.images[: args.examples]), jnp.asarray(data.train.labels[: args.examples]))
    test: Data = (jnp.asarray(data.test.images), jnp.asarray(data.test.labels))
    if args.batch_size > len(train[0]):
        raise SystemExit(f"--batch-size: there are only {len(train[0])} training images.")
    trainers = {name: make_trainer(args, name, train, test, data.classes) for name in args.optimizers}
    steps = next(iter(trainers.values())).steps_per_epoch
    warm_start_batches = steps if args.warm_start_batches is None else args.warm_start_batches
    params = trainers[args.optimizers[0]].init(0).params
    size = sum(x.size for x in jax.tree.leaves(params))
    title = f"{args.model} ({size:,} parameters) on {args.dataset}"
    console.print(
        f"[bold]{title}[/bold]: {len(train[0])} training and {len(test[0])} test images, batches of "
        f"{args.batch_size}, {steps} steps an epoch, {args.seeds} seed(s)."
    )
    for name in args.optimizers:
        settings = dataclasses.asdict(settings_of(args, name))
        numbers = (f"{key.replace('_', ' ')} {value:g}" for key, value in settings.items() if value is not None)
        console.print(f"{name}: {number_of_epochs(args, name)} epochs, {', '.join(numbers)}")

    runs: list[dict[str, Any]] = []
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"image_classification_{args.dataset}"
    with report.progress_bar(console) as progress:
        for name, trainer in trainers.items():
            for seed in range(args.seeds):
                epochs = number_of_epochs(args, name)
                task = progress.add_task(f"{name} {seed}", total=epochs, status="compiling")
                state, start = trainer.init(seed), time.perf_counter()
                if name in ("TNT", "TNT-EF") and warm_start_batches:
                    state = jax.block_until_ready(trainer.warm_start(state, seed, warm_start_batches))
                warm_start_seconds = time.perf_counter() - start
                history = []
                for epoch in trainer.run(state, seed, epochs):
                    history.append(epoch)
                    status = f"loss {epoch.train_loss:.3f}  test error {100 * epoch.test_error:.2f}%"
                    progress.update(task, advance=1, status=status)
                runs.append(
                    {
                        "optimizer": name,
                        "seed": seed,
                        **dataclasses.asdict(settings_of(args, name)),
                        "epochs": epochs,
                        "warm_start_seconds": warm_start_seconds,
                        "compile_seconds": trainer.compile_seconds,
                        "diverged": not math.isfinite(history[-1].train_loss),
                        **{field: [getattr(epoch, field) for epoch in history] for field in Epoch._fields},
                    }
                )
                save(stem, args, runs)  # After every run: a full one takes hours.

    plot(stem.with_suffix(".png"), title, runs)
    print_results(console, runs)
    console.print(
        f"Wrote {os.path.relpath(stem)}.json, .csv and .png, on {os.cpu_count()} cores ({report.machine()['device']})."
    )


def make_trainer(args: argparse.Namespace, name: str, train: Data, test: Data, classes: int) -> Trainer:
    def make_model(seed: int) -> nnx.Module:
        if args.model == "vgg16":
            return VGG16(classes, width_divisor=args.width_divisor, rngs=nnx.Rngs(seed))
        return ResNet32(classes, channels=args.channels, blocks=args.blocks, rngs=nnx.Rngs(seed))

    return Trainer(
        make_model,
        make_optimizer(name, settings_of(args, name), schedule_of(args, name, len(train[0]) // args.batch_size)),
        train,
        test,
        batch_size=args.batch_size,
        flip=args.dataset != "digits",
        empirical=name == "TNT-EF",
    )


def settings_of(args: argparse.Namespace, name: str) -> Settings:
    """The table's, or what the arguments say instead."""
    given = {key: getattr(args, key) for key in ("learning_rate", "weight_decay", "damping")}
    return dataclasses.replace(SETTINGS[name], **{key: value for key, value in given.items() if value is not None})


def schedule_of(args: argparse.Namespace, name: str, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate, divided by ten at regular intervals of epochs."""
    every = args.drop_every or (60 if name in FIRST_ORDER else 40)
    drops = range(every, number_of_epochs(args, name), every)
    initial = settings_of(args, name).learning_rate
    return optax.piecewise_constant_schedule(initial, {epoch * steps_per_epoch: 0.1 for epoch in drops})


def number_of_epochs(args: argparse.Namespace, name: str) -> int:
    first_order, others = PRESETS[args.dataset].epochs
    return args.epochs or (first_order if name in FIRST_ORDER else others)


def save(stem: Path, args: argparse.Namespace, runs: Sequence[Mapping[str, Any]]) -> None:
    """All runs as JSON, and their epochs as CSV."""
    arguments = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
    report.save_json(stem.with_suffix(".json"), {"arguments": arguments, "machine": report.machine(), "runs": runs})
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["optimizer", "seed", "epoch", *Epoch._fields])
        for run in runs:
            for epoch, row in enumerate(zip(*(run[field] for field in Epoch._fields), strict=True), 1):
                writer.writerow([run["optimizer"], run["seed"], epoch, *row])


def over_seeds(runs: Sequence[Mapping[str, Any]], name: str, field: str) -> np.ndarray:
    """(seeds, epochs), as far as all seeds go."""
    columns = [run[field] for run in runs if run["optimizer"] == name]
    return np.array([column[: min(map(len, columns))] for column in columns])


def plot(path: Path, title: str, runs: Sequence[Mapping[str, Any]]) -> None:
    """Training loss and test error against epochs and seconds: the mean over the seeds, and their deviation."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharex="col", sharey="row")
    for name in dict.fromkeys(run["optimizer"] for run in runs):
        seconds = over_seeds(runs, name, "seconds").mean(axis=0)
        for row, (field, factor) in zip(axes, (("train_loss", 1), ("test_error", 100)), strict=True):
            values = factor * over_seeds(runs, name, field)
            mean, deviation = values.mean(axis=0), values.std(axis=0)
            for axis, x in zip(row, (np.arange(1, len(seconds) + 1), seconds), strict=True):
                axis.plot(x, mean, color=report.COLORS[name], label=name)
                axis.fill_between(
                    x, mean - deviation, mean + deviation, color=report.COLORS[name], alpha=0.2, linewidth=0
                )
                axis.grid(visible=True, alpha=0.3)
    axes[0, 0].set(yscale="log", ylabel="training loss, nats")
    axes[1, 0].set(yscale="log", ylabel="test error, %", xlabel="epoch")
    for axis in axes[:, 0]:
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter())
    axes[1, 1].set(xlabel="seconds")
    axes[0, 1].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_results(console: Console, runs: Sequence[Mapping[str, Any]]) -> None:
    rows = []
    for name in dict.fromkeys(run["optimizer"] for run in runs):
        accuracies = 100 * (1 - over_seeds(runs, name, "test_error")[:, -1])
        seconds = over_seeds(runs, name, "seconds")
        deviation = f" ± {accuracies.std(ddof=1):.2f}" if len(accuracies) > 1 else ""
        rows.append(
            [
                name,
                str(seconds.shape[1]),
                f"{over_seeds(runs, name, 'train_loss')[:, -1].mean():.3f}",
                f"{over_seeds(runs, name, 'test_loss')[:, -1].mean():.3f}",
                f"{accuracies.mean():.2f}{deviation}",
                f"{seconds[:, -1].mean() / seconds.shape[1]:.2f}",
            ]
        )
    columns = ["optimizer", "epochs", "train loss", "test loss", "test accuracy %", "s/epoch"]
    report.print_table(console, "After the last epoch (means over the seeds)", columns, rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--dataset",
        choices=PRESETS,
        default="digits",
        help="digits: 1,797 8x8 images from scikit-learn blown up to 32x32, no download, with a small network by "
        "default; cifar10, cifar100: 60,000 32x32 images, through tensorflow_datasets",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        help="where tensorflow_datasets has already prepared the dataset; it is only read, and the network not used "
        "(default: its own folder, downloading what is missing)",
    )
    parser.add_argument("--model", choices=("resnet32", "vgg16"), help="default: vgg16 for cifar100, else resnet32")
    parser.add_argument("--optimizers", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="which to compare")
    parser.add_argument(
        "--epochs",
        type=int,
        help="passes over the training images (default: as in the paper 200 for SGD-m and Adam and 100 for the others; "
        "10 for digits)",
    )
    parser.add_argument(
        "--drop-every",
        type=int,
        help="after so many epochs the learning rate drops to a tenth (default: as in the paper 60 for SGD-m and Adam, "
        "40 for the others)",
    )
    parser.add_argument("--batch-size", type=int, default=128, help="images a step")
    parser.add_argument("--seeds", type=int, default=1, help="how many, counted from 0")
    parser.add_argument("--learning-rate", type=float, help="instead of the table's, for one optimizer")
    parser.add_argument("--damping", type=float, help="the same")
    parser.add_argument("--weight-decay", type=float, help="the same")
    parser.add_argument(
        "--warm-start-batches",
        type=int,
        help="for TNT's first statistics; 0: none (default: an epoch, as in the paper; 10 for digits)",
    )
    parser.add_argument("--examples", type=int, help="use only the first so many training images")
    parser.add_argument("--blocks", type=int, help="of a stage of the ResNet (default: 5; 1 for digits)")
    parser.add_argument("--channels", type=int, help="of the ResNet's first stage (default: 16; 8 for digits)")
    parser.add_argument("--width-divisor", type=int, default=1, help="makes the VGG16 so many times narrower")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the picture, JSON and CSV files")
    args = parser.parse_args()
    if args.data_dir and args.dataset == "digits":
        parser.error("--data-dir goes with --dataset cifar10 and cifar100: the digits come with scikit-learn.")
    args.optimizers = list(dict.fromkeys(args.optimizers))
    for name in ("learning_rate", "damping", "weight_decay"):
        if getattr(args, name) is not None and len(args.optimizers) > 1:
            parser.error(f"--{name.replace('_', '-')} goes with one of the --optimizers.")
    if args.damping is not None and args.optimizers == ["SGD-m"]:
        parser.error("--damping: SGD-m has none.")
    for name in ("epochs", "drop_every", "batch_size", "seeds", "examples", "blocks", "channels", "width_divisor"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1.")
    for name in ("model", "blocks", "channels", "warm_start_batches"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(PRESETS[args.dataset], name))
    return args


if __name__ == "__main__":
    main()
