"""What the pixels of a file become: kinds of images, ranges of numbers and orientations."""

import io
import os
from itertools import product

import numpy as np
import pytest
from PIL import Image, ImageOps

from images import DataError, load_image

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def written(folder, image, name, **options):
    path = folder / name
    image.save(path, **options)
    return np.asarray(load_image("", os.fsencode(path))).astype(int)


def same(found, image, tolerance=1):
    assert found.shape[2] == 3 and np.abs(found - np.asarray(image.convert("RGB")).astype(int)).max() <= tolerance


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "1"])
@pytest.mark.parametrize("kind", ["png", "tiff", "webp", "gif", "bmp"])
def test_kinds_that_pillow_converts(tmp_path, mode, kind):
    image = Image.fromarray(RGB).convert(mode)
    options = {"lossless": True} if kind == "webp" else {}
    if kind in ("webp", "gif", "bmp") and mode in ("LA", "1", "P", "RGBA"):
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    same(written(tmp_path, image, f"image.{kind}", **options), Image.open(buffer))


def test_cmyk(tmp_path):
    image = Image.fromarray(RGB).convert("CMYK")
    same(written(tmp_path, image, "image.tiff"), image)


def test_transparency_is_dropped(tmp_path):
    image = Image.fromarray(np.dstack([RGB, GREY]))
    same(written(tmp_path, image, "image.png"), Image.fromarray(RGB), 0)


@pytest.mark.parametrize(
    "pixels, name",
    [
        (GREY.astype(np.uint16) * 257, "image.png"),
        (GREY.astype(np.uint16) * 257, "image.tiff"),
        (GREY.astype(np.int32) * 257, "image.tiff"),
        (GREY.astype(np.float32) / 255, "image.tiff"),
    ],
    ids=["16-bit PNG", "16-bit TIFF", "32-bit TIFF", "float TIFF"],
)
def test_numbers_beyond_8_bits_are_scaled(tmp_path, pixels, name):
    same(written(tmp_path, Image.fromarray(pixels), name), Image.fromarray(GREY), 0)


@pytest.mark.parametrize("pixels", [[[0.5, 1.5]], [[-0.1, 0.5]], [[float("nan"), 0.5]]])
def test_floats_out_of_range_are_refused_by_name(tmp_path, pixels):
    with pytest.raises(DataError, match="image.tiff cannot be read as an image .*must be from 0 to 1"):
        written(tmp_path, Image.fromarray(np.array(pixels, dtype=np.float32)), "image.tiff")


def test_large_integers_are_refused_by_name(tmp_path):
    with pytest.raises(DataError, match="image.tiff cannot be read as an image .*must be from 0 to 65535"):
        written(tmp_path, Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "image.tiff")


@pytest.mark.parametrize("orientation, kind", list(product(range(1, 9), ["png", "jpeg"])))
def test_exif_orientation(tmp_path, orientation, kind):
    image = Image.fromarray(np.kron(RGB, np.ones((16, 16, 1), dtype=np.uint8)))  # blocks, which JPEG keeps well
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = written(tmp_path, image, f"image.{kind}", exif=exif, **({"quality": 100} if kind == "jpeg" else {}))
    with Image.open(tmp_path / f"image.{kind}") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB")).astype(int)
    assert found.shape == expected.shape and (orientation < 5) == (found.shape == image.size[::-1] + (3,))
    assert np.abs(found - expected).max() <= 1
    turned = {1: image, 3: image.rotate(180), 6: image.rotate(-90, expand=True), 8: image.rotate(90, expand=True)}
    if orientation in turned:
        assert np.abs(found - np.asarray(turned[orientation]).astype(int)).mean() < 8
