"""Real colour images with labels, as bytes in memory: a quarter of what floats would take."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Split(NamedTuple):
    """Images: uint8, (examples, 32, 32, 3). Labels: int32, (examples,)."""

    images: np.ndarray
    labels: np.ndarray


class LabelledImages(NamedTuple):
    """Two disjoint splits, and how many classes there are."""

    train: Split
    test: Split
    classes: int


def digits() -> LabelledImages:
    """The 1,797 handwritten 8x8 digits that ship inside scikit-learn, each pixel blown up to 4x4, in gray.

    Every fifth one is for testing, as in `data.digits`.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    small = np.rint(pixels * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)
    images = np.tile(small.repeat(4, axis=1).repeat(4, axis=2), 3)
    labels = labels.astype(np.int32)
    test = np.arange(len(images)) % 5 == 0
    return LabelledImages(Split(images[~test], labels[~test]), Split(images[test], labels[test]), 10)


def cifar(classes: int, data_dir: Path | None = None) -> LabelledImages:
    """CIFAR-10 or CIFAR-100: 50,000 and 10,000 images, through TFDS (without TensorFlow).

    Args:
      classes: 10 or 100.
      data_dir: a directory in which TFDS has prepared `cifar10` or `cifar100` in its array_record format. It is only
        read. None: TFDS's own directory, into which it downloads what is missing.

    Raises:
      FileNotFoundError: `data_dir` holds no such dataset.
    """
    name = f"cifar{classes}"
    if data_dir is not None and not any(Path(data_dir).glob(f"{name}/*/*.array_record*")):
        raise FileNotFoundError(f"{data_dir}: no `{name}` that TFDS has prepared in its array_record format is there.")
    import tensorflow_datasets as tfds

    def split(part: str) -> Split:
        source: Any = tfds.data_source(name, split=part, data_dir=data_dir, download=data_dir is None)
        # One call for all of them is three times as fast as one for each.
        examples = source.__getitems__(range(len(source)))
        images = np.stack([example["image"] for example in examples])
        return Split(images, np.array([example["label"] for example in examples], np.int32))

    return LabelledImages(split("train"), split("test"), classes)


def load(dataset: str, data_dir: Path | None = None) -> LabelledImages:
    """The images of that name; `data_dir` is for those that come through TFDS."""
    loaders = {"digits": digits, "cifar10": lambda: cifar(10, data_dir), "cifar100": lambda: cifar(100, data_dir)}
    return loaders[dataset]()
