"""Real images and texts as arrays in memory."""

import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Images(NamedTuple):
    """Flattened images of two disjoint splits: float32, (examples, pixels), in [0, 1] but for faces."""

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

    def split(name: str) -> np.ndarray:
        images = np.stack([example["image"] for example in _mnist(name, data_dir)])
        return images.reshape(len(images), -1).astype(np.float32) / 255

    return Images(split("train"), split("test"))


def _mnist(split: str, data_dir: Path | None) -> Any:
    import tensorflow_datasets as tfds

    if data_dir is not None and not any(Path(data_dir).glob("mnist/*/*.array_record*")):
        raise FileNotFoundError(f"{data_dir}: no `mnist` that TFDS has prepared in its array_record format is there.")
    source: Any = tfds.data_source("mnist", split=split, data_dir=data_dir, download=data_dir is None)
    # One call for all of them is three times as fast as one for each.
    return source.__getitems__(range(len(source)))


def labelled(dataset: str, data_dir: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The training images of digits, or of MNIST reduced to 16x16 pixels, flattened, with their labels (int32)."""
    if dataset == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        return (images / 16).astype(np.float32), labels.astype(np.int32)
    examples = _mnist("train", data_dir)
    from scipy.ndimage import zoom

    images = np.stack([example["image"][..., 0] for example in examples]).astype(np.float32) / 255
    # Bilinear between the centres of the pixels.
    small: Any = zoom(images, (1, 16 / 28, 16 / 28), order=1, grid_mode=True, mode="nearest")
    return small.reshape(len(small), -1), np.array([example["label"] for example in examples], np.int32)


def faces(data_dir: Path | None = None, *, copies: tuple[int, int] = (345, 414), seed: int = 0) -> Images:
    """25x25 faces made of the 400 Olivetti faces, as Hinton & Salakhutdinov (2006, supplement) made theirs.

    Each is turned by -90 to 90 degrees, enlarged 1.4 to 1.8 times, cropped and subsampled (every second pixel); then
    all are shifted to mean 0 at every pixel, and scaled to an average variance of 1. The first 30 people are for
    training, the other 10 for testing. A reconstruction: their random numbers and the details of their cropping are not
    known.

    Args:
      data_dir: where `olivetti_faces.npz` is, with the arrays faces (400, 64, 64) and person_ids (400,). None:
        scikit-learn downloads the faces.
      copies: how many are made of each training and of each test face: as many as theirs, 103,500 and 41,400.
      seed: of the angles and the scales.

    Raises:
      FileNotFoundError: `data_dir` holds no such file.
    """
    from scipy.ndimage import map_coordinates

    if data_dir is None:
        from sklearn.datasets import fetch_olivetti_faces

        olivetti: Any = fetch_olivetti_faces()
        originals, people = olivetti.images, olivetti.target
    else:
        with np.load(Path(data_dir) / "olivetti_faces.npz") as file:
            originals, people = file["faces"], file["person_ids"]
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(-12, 13), np.arange(-12, 13), indexing="ij"))  # (2, 25, 25)

    def made_of(image: np.ndarray, number: int) -> np.ndarray:
        angles, scales = np.radians(rng.uniform(-90, 90, number)), rng.uniform(1.4, 1.8, number)
        turns = np.array([[np.cos(angles), -np.sin(angles)], [np.sin(angles), np.cos(angles)]])
        places = (np.array(image.shape)[:, None, None, None] - 1) / 2 + np.einsum(
            "ijn,jhw->inhw", 2 * turns / scales, grid
        )
        return map_coordinates(image.astype(np.float32), places, order=1).reshape(number, -1)

    train, test = (
        np.concatenate([made_of(image, number) for image in originals[chosen]])
        for chosen, number in zip((people < 30, people >= 30), copies, strict=True)
    )
    pixels = np.concatenate([train, test])
    pixels -= pixels.mean(axis=0, dtype=np.float64).astype(np.float32)
    pixels /= np.sqrt(np.mean(np.square(pixels), dtype=np.float64)).astype(np.float32)
    return Images(pixels[: len(train)], pixels[len(train) :])


def load(dataset: str, data_dir: Path | None = None) -> Images:
    """The images of that name; `data_dir` is for those that don't come with scikit-learn."""
    return {"digits": digits, "mnist": lambda: mnist(data_dir), "faces": lambda: faces(data_dir)}[dataset]()


class Texts(NamedTuple):
    """Sequences of bytes of two disjoint sets of files: int32, (sequences, length), -1 where a file has ended."""

    train: np.ndarray
    test: np.ndarray


def python_sources(length: int, *, test_share: float = 0.1, seed: int = 0) -> Texts:
    """The source of Python's standard library as it is installed, without its tests: about 12 MB.

    Args:
      length: of a sequence, see `sequences`.
      test_share: of the files, at least one of them.
      seed: of which files these are.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    others = {"site-packages", "dist-packages", "test", "tests"}
    files = sorted(path for path in folder.rglob("*.py") if others.isdisjoint(path.relative_to(folder).parts))
    order = np.random.default_rng(seed).permutation(len(files))
    number = max(round(test_share * len(files)), 1)
    train, test = (
        sequences((files[index].read_bytes() for index in chosen), length)
        for chosen in (np.sort(order[number:]), np.sort(order[:number]))
    )
    return Texts(train, test)


def sequences(texts: Iterable[bytes], length: int) -> np.ndarray:
    """Each text cut into pieces of `length` bytes: int32, (pieces, length); the last one of each is padded with -1."""
    rows = [np.zeros((0, length), np.int32)]
    for text in texts:
        padded = np.full((-(-len(text) // length), length), -1, np.int32)
        padded.ravel()[: len(text)] = np.frombuffer(text, np.uint8)
        rows.append(padded)
    return np.concatenate(rows)
