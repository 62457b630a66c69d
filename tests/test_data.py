"""The faces that the examples make of the Olivetti faces."""

import numpy as np
import pytest

pytest.importorskip("scipy", reason="the faces are turned by SciPy")
from common import data

PEOPLE = np.repeat(np.arange(40), 10)


def faces(tmp_path, originals, **options):
    np.savez(tmp_path / "olivetti_faces.npz", faces=originals.astype(np.uint8), person_ids=PEOPLE)
    return data.faces(tmp_path, **options)


def test_people_are_disjoint_and_pixels_standardized(tmp_path):
    # Pictures of one grey for each person, so that a face tells whose it is.
    images = faces(tmp_path, np.broadcast_to(6 * PEOPLE[:, None, None], (400, 64, 64)), copies=(3, 4))
    assert images.train.shape == (900, 625)
    assert images.test.shape == (400, 625)
    assert images.train.dtype == images.test.dtype == np.float32
    assert images.train.max() < images.test.min()
    pixels = np.concatenate(images).astype(float)
    # A sum of 1,300 float32 numbers of size 1.
    np.testing.assert_allclose(pixels.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(pixels.var(axis=0).mean(), 1, rtol=1e-5)


@pytest.mark.slow
def test_angles_scales_and_seed(tmp_path):
    # One picture is a ramp, whose copies are ramps again: their slopes tell the angles and the scales. The others are
    # black, and so show what was subtracted.
    originals = np.zeros((400, 64, 64))
    originals[0] = np.arange(64)[:, None]
    images = faces(tmp_path, originals, copies=(500, 1))
    ramps = (images.train[:500] - images.test[0]).reshape(500, 25, 25)
    down, right = ramps[:, 1, 0] - ramps[:, 0, 0], ramps[:, 0, 1] - ramps[:, 0, 0]
    np.testing.assert_allclose(ramps[:, -1, -1] - ramps[:, 0, 0], 24 * (down + right), rtol=1e-2, atol=1e-3)
    angles, lengths = np.degrees(np.arctan2(right, down)), np.hypot(down, right)
    # 500 uniform samples come this close to the ends of their ranges, but for a chance of 1e-4.
    assert -90 <= angles.min() < -86
    assert 86 < angles.max() <= 90
    np.testing.assert_allclose(lengths.max() / lengths.min(), 1.8 / 1.4, rtol=0.02)
    first, again, other = (faces(tmp_path, originals, copies=(3, 1), seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.train, again.train)
    assert not np.array_equal(first.train, other.train)


def test_the_middle_of_the_picture_stays_in_the_middle(tmp_path):
    # A round spot stays one however it is turned and enlarged about its middle.
    y, x = np.mgrid[:64, :64] - 31.5
    images = faces(tmp_path, np.broadcast_to(200 * np.exp(-(x**2 + y**2) / 50), (400, 64, 64)), copies=(1, 1))
    turned = images.train.reshape(-1, 25, 25)[:, ::-1, ::-1].reshape(-1, 625)
    np.testing.assert_allclose(images.train, turned, atol=1e-4)  # float32 pixels of size 1


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="olivetti_faces"):
        data.faces(tmp_path)
