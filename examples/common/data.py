"""Real images as arrays in memory, with pixels in [0, 1]."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Images(NamedTuple):
    """Flattened images of two disjoint splits: float32, (examples, pixels)."""

    train: np.ndarray
    test: np.ndarray


def digits() -> Images:
    """The 1,797 handwritten 8x8 digits that ship inside scikit-learn; every fifth one is for testing."""
    from sklearn.datasets import load_digits

    images = (load_digits(return_X_y=True)[0] / 16).astype(np.float32)
    test = np.arange(len(images)) % 5 == 0
    return Images(images[~test], images[test])


def mnist(data_dir: Path | None = None) -> Images:
    """MNIST's 60,000 and 10,000 handwritten 28x28 digits, through TFDS (without TensorFlow).

    Args:
      data_dir: a directory in which TFDS has prepared `mnist` in its array_record format. It is only read. None:
        TFDS's own directory, into which it downloads what is missing.

    Raises:
      FileNotFoundError: `data_dir` holds no such dataset.
    """
    import tensorflow_datasets as tfds

    if data_dir is not None and not any(Path(data_dir).glob("mnist/*/*.array_record*")):
        raise FileNotFoundError(f"{data_dir}: no `mnist` that TFDS has prepared in its array_record format is there.")

    def split(name: str) -> np.ndarray:
        source: Any = tfds.data_source("mnist", split=name, data_dir=data_dir, download=data_dir is None)
        # One call for all of them is three times as fast as one for each.
        images = np.stack([example["image"] for example in source.__getitems__(range(len(source)))])
        return images.reshape(len(images), -1).astype(np.float32) / 255

    return Images(split("train"), split("test"))


def load(dataset: str, data_dir: Path | None = None) -> Images:
    """The images of that name; `data_dir` is for those that come through TFDS."""
    return {"digits": digits, "mnist": lambda: mnist(data_dir)}[dataset]()
