"""Image files as 8-bit RGB."""

import os

import numpy as np
from PIL import Image, ImageOps

from utils import UserError


class DataError(UserError):
    """A fault in the data; the message is one sentence that names the file or folder."""

    def __str__(self) -> str:
        # A DataLoader worker puts its traceback in front of the sentence.
        return super().__str__().rsplit("DataError: ", 1)[-1].strip()


def load_image(root: str, name: bytes) -> Image.Image:
    """The image in 8-bit RGB, turned as its EXIF orientation says.

    Pillow converts grey, palette and CMYK images, and drops transparency. Grey images of 16 bits are scaled from
    0..65535, those of floats from 0..1.
    Raises: DataError for a file that cannot be read, and for floats or integers of 32 bits beyond that range.
    """
    path = os.path.join(root, os.fsdecode(name))
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode[0] in "IF":  # I, I;16, I;16B or F, which Pillow's conversion would clip at 255
                image = _grey(np.asarray(image))
            return image.convert("RGB")
    except Exception as error:  # A corrupt file can raise almost any exception in Pillow's decoders.
        raise DataError(f"{path} cannot be read as an image ({type(error).__name__}: {error})") from error


def _grey(pixels: np.ndarray) -> Image.Image:
    largest = 65535 if pixels.dtype.kind in "iu" else 1
    if not (pixels >= 0).all() or not (pixels <= largest).all():  # also false for NaN
        raise ValueError(f"pixels of type {pixels.dtype} must be from 0 to {largest}")
    return Image.fromarray(np.rint(pixels * (255 / largest)).astype(np.uint8))
