"""Real data as arrays in memory: images, bytes of text, tables."""

import functools
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import fft, ndimage


class Split(NamedTuple):
    """Two disjoint sets: arrays with the examples along the first axis, or pairs of images and labels."""

    train: Any
    test: Any


def splits(x: np.ndarray) -> Split:
    """For a dataset without a test set: each fifth example is for testing."""
    test = np.arange(len(x)) % 5 == 0
    return Split(x[~test], x[test])


def labelled_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 handwritten 8x8 digits of scikit-learn, flattened, in [0, 1], and their labels (int32)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32), labels.astype(np.int32)


def digits() -> Split:
    return splits(labelled_digits()[0])


def digit_images() -> Split:
    """The same digits as images (examples, 32, 32, 3) of bytes, each pixel repeated 4x4, and their labels (int32)."""
    pixels, labels = labelled_digits()
    small = np.rint(pixels * 255).astype(np.uint8).reshape(-1, 8, 8, 1)
    (train, test), labels = splits(np.tile(small.repeat(4, axis=1).repeat(4, axis=2), 3)), splits(labels)
    return Split((train, labels.train), (test, labels.test))


def tfds(name: str, split: str, data_dir: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels, read without TensorFlow. Without `data_dir`, TFDS downloads the dataset if it is missing."""
    if data_dir is not None and not any(Path(data_dir).glob(f"{name}/*/*.array_record*")):
        raise FileNotFoundError(
            f"--data-dir {data_dir} holds no `{name}` that TFDS has prepared in its array_record format. Prepare it "
            f"there with tfds.builder({name!r}, file_format='array_record'), or leave --data-dir out to download it."
        )
    import tensorflow_datasets

    source: Any = tensorflow_datasets.data_source(name, split=split, data_dir=data_dir, download=data_dir is None)
    examples = source.__getitems__(range(len(source)))  # One call is three times as fast as a call for each.
    return np.stack([x["image"] for x in examples]), np.array([x["label"] for x in examples], np.int32)


@functools.cache
def mnist(data_dir: Path | None = None) -> Split:
    """MNIST's 60,000 and 10,000 handwritten 28x28 digits, flattened, in [0, 1]."""
    images = (tfds("mnist", split, data_dir)[0] for split in ("train", "test"))
    return Split(*(x.reshape(len(x), -1).astype(np.float32) / 255 for x in images))


def labelled(dataset: str, data_dir: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The training images of "digits", or of "mnist" reduced to 16x16 pixels, flattened, with their labels (int32)."""
    if dataset == "digits":
        return labelled_digits()
    images, labels = tfds("mnist", "train", data_dir)
    pixels = images[..., 0].astype(np.float32) / 255
    # Bilinear between the centres of the pixels.
    small: Any = ndimage.zoom(pixels, (1, 16 / 28, 16 / 28), order=1, grid_mode=True, mode="nearest")
    return small.reshape(len(small), -1), labels


@functools.cache
def faces(data_dir: Path | None = None, copies: tuple[int, int] = (345, 414)) -> Split:
    """FACES: 25x25 faces, made of the 400 Olivetti faces as in Hinton & Salakhutdinov (2006, supplement).

    Each face is rotated by -90 to 90 degrees, enlarged 1.4 to 1.8 times, cropped and subsampled (every second pixel).
    Then all are shifted to mean 0 at each pixel, and scaled to an average variance of 1. The first 30 people are for
    training, the other 10 for testing. The random numbers of the authors, and details of their cropping, are unknown.

    Args:
      data_dir: the folder of `olivetti_faces.npz`, with the arrays faces (400, 64, 64) and person_ids (400,). None:
        scikit-learn downloads the faces.
      copies: numbers of images that are made of each training and of each test face. The default gives 103,500 and
        41,400 images.
    """
    if data_dir is None:
        from sklearn.datasets import fetch_olivetti_faces

        olivetti: Any = fetch_olivetti_faces()
        originals, people = olivetti.images, olivetti.target
    elif not (path := Path(data_dir) / "olivetti_faces.npz").exists():
        raise FileNotFoundError(f"{path} is missing. Leave --data-dir out: scikit-learn then downloads the faces.")
    else:
        with np.load(path) as file:
            originals, people = file["faces"], file["person_ids"]
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(-12, 13), np.arange(-12, 13), indexing="ij"))  # (2, 25, 25)

    def made_of(image: np.ndarray, number: int) -> np.ndarray:
        angles, scales = np.radians(rng.uniform(-90, 90, number)), rng.uniform(1.4, 1.8, number)
        rotations = np.array([[np.cos(angles), -np.sin(angles)], [np.sin(angles), np.cos(angles)]])
        places = (np.array(image.shape)[:, None, None, None] - 1) / 2
        places = places + np.einsum("ijn,jhw->inhw", 2 * rotations / scales, grid)
        return ndimage.map_coordinates(image.astype(np.float32), places, order=1).reshape(number, -1)

    train, test = (
        np.concatenate([made_of(image, number) for image in originals[chosen]])
        for chosen, number in zip((people < 30, people >= 30), copies, strict=True)
    )
    pixels = np.concatenate([train, test])
    pixels -= np.float32(pixels.mean(axis=0, dtype=np.float64))
    pixels /= np.sqrt(np.mean(np.square(pixels), dtype=np.float64)).astype(np.float32)
    return Split(pixels[: len(train)], pixels[len(train) :])


@functools.cache
def cifar10(data_dir: Path | None = None) -> Split:
    """CIFAR-10, from the `cifar10.npz` of `pack_cifar10` if `data_dir` has it, or else from TFDS."""
    if data_dir is not None and (path := Path(data_dir) / "cifar10.npz").exists():
        with np.load(path) as file:
            return Split(*((decode(file[name]), file[f"{name}_labels"]) for name in Split._fields))
    return Split(*(tfds("cifar10", split, data_dir) for split in Split._fields))


def pack_cifar10(data_dir: Path | None, path: Path) -> None:
    """Writes CIFAR-10 to one file of 20 MB, for machines without TFDS. Only `decode` is needed to read it."""
    arrays = {}
    for name, (images, labels) in cifar10(data_dir)._asdict().items():
        arrays |= {name: encode(images), f"{name}_labels": labels}
    np.savez_compressed(path, **arrays)


# As in JPEG: a cosine transform of blocks of 8x8 pixels, with quanta that grow with the frequency. A cosine transform
# along the channels separates brightness and colours. The colours are quantized more coarsely.
ROW, COLUMN, CHANNEL = np.mgrid[:8, :8, :3]
QUANTA: Any = (14 + 3 * (1 + (CHANNEL > 0)) * (ROW + COLUMN))[..., None, None, None].astype(np.float32)


def encode(images: np.ndarray) -> np.ndarray:
    """Quantized coefficients: int8, (8, 8, 3, examples, 4, 4)."""
    blocks = images.reshape(-1, 4, 8, 4, 8, 3).transpose(2, 4, 5, 0, 1, 3) - np.float32(128)
    transformed: Any = fft.dctn(blocks, axes=(0, 1, 2), norm="ortho")
    return np.clip(np.rint(transformed / QUANTA), -128, 127).astype(np.int8)


def decode(coefficients: np.ndarray) -> np.ndarray:
    """The images as bytes. A pixel of a JPEG changes by two or three of 256 levels."""
    blocks: Any = fft.idctn(coefficients * QUANTA, axes=(0, 1, 2), norm="ortho")
    pixels = blocks.transpose(3, 4, 0, 5, 1, 2).reshape(-1, 32, 32, 3)
    return np.clip(np.rint(pixels + 128), 0, 255).astype(np.uint8)


@functools.cache
def python_sources(length: int) -> Split:
    """The bytes of the installed standard library of Python, without tests (12 MB): int32, (pieces, length).

    A tenth of the files, in random order, is for testing. The last piece of a file is padded with -1.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    others = {"site-packages", "dist-packages", "test", "tests"}
    files = sorted(path for path in folder.rglob("*.py") if others.isdisjoint(path.relative_to(folder).parts))
    order = np.random.default_rng(0).permutation(len(files))
    number = max(len(files) // 10, 1)
    train, test = (pieces((files[i].read_bytes() for i in x), length) for x in (order[number:], order[:number]))
    return Split(train, test)


def pieces(texts: Iterable[bytes], length: int) -> np.ndarray:
    """The texts, cut into pieces of `length` bytes. The last piece of each text is padded with -1."""
    rows = [np.zeros((0, length), np.int32)]
    for text in texts:
        padded = np.full((-(-len(text) // length), length), -1, np.int32)
        padded.ravel()[: len(text)] = np.frombuffer(text, np.uint8)
        rows.append(padded)
    return np.concatenate(rows)


def diabetes() -> tuple[Split, Split]:
    """The 442 patients of scikit-learn: ten standardized features, and the standardized progression of diabetes."""
    from sklearn.datasets import load_diabetes

    def standardized(x: np.ndarray) -> Split:
        train = splits(x).train
        return splits(((x - train.mean(axis=0)) / train.std(axis=0)).astype(np.float32))

    features, target = map(np.asarray, load_diabetes(return_X_y=True))
    return standardized(features), standardized(target[:, None])


def picture(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's photograph of a flower, with `size` x `size` pixels: coordinates in [-1, 1], colours in [0, 1]."""
    from sklearn.datasets import load_sample_image

    photo = load_sample_image("flower.jpg")[:, 106:533] / 255  # The middle, square.
    places = (np.arange(size) + 0.5) / size
    rows, columns = np.meshgrid(places, places, indexing="ij")
    grid = [427 * rows - 0.5, 427 * columns - 0.5]
    smooth = ndimage.gaussian_filter(photo, (427 / size / 2, 427 / size / 2, 0))
    colours = np.stack([ndimage.map_coordinates(smooth[..., c], grid, order=1, mode="nearest") for c in range(3)], -1)
    coordinates = 2 * np.stack([rows, columns], axis=-1).reshape(-1, 2) - 1
    return coordinates.astype(np.float32), colours.reshape(-1, 3).astype(np.float32)
