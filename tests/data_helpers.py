"""Arguments and images that several tests share."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import models  # noqa: F401

CPU = torch.device("cpu")
POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5", "rand-m15-n2-mstd1.0-inc1"]  # DeiT, KAT, KArAt
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def photographs(folder, train: int, validation: int) -> None:
    """JPEG files of 32 x 32 pixels in ten class folders, `train` and `validation` images for each class.

    The classes are five columns, 128 pixels wide, of scikit-learn's two sample photographs each; the images are random
    crops of 64 x 64 pixels from a column, scaled down. Training and validation crops may overlap.
    """
    rng = np.random.default_rng(0)
    sample = load_sample_images()
    for file, pixels in zip(sample.filenames, sample.images):
        photograph = Image.fromarray(pixels)
        for column in range(5):
            for split, count in (("train", train), ("val", validation)):
                path = Path(folder, split, f"{Path(file).stem}_{column}")
                path.mkdir(parents=True)
                for i in range(count):
                    x, y = 128 * column + rng.integers(65), rng.integers(pixels.shape[0] - 63)
                    photograph.resize((32, 32), box=(x, y, x + 64, y + 64)).save(path / f"{i}.jpg", quality=90)


def make_args(**overrides):
    defaults = dict(
        data_set="DIGITS",
        data_path="",
        input_size=32,
        mean=MEAN,
        std=STD,
        train_interpolation="random",
        interpolation="bicubic",
        color_jitter=None,
        aa=None,
        reprob=0.0,
        remode="pixel",
        recount=1,
        eval_crop_ratio=0.875,
        three_augment=False,
        src=False,
        hflip=None,
        vflip=0.0,
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        no_aug=False,
        train_subset=None,
        val_subset=None,
        check_images="auto",
        seed=0,
        pin_mem=True,
        eval=False,
        inat_category="name",
    )
    return SimpleNamespace(**{**defaults, **overrides})


def noise(width=48, height=40, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def normalised(value):
    """Pixel values in [0, 1], (3, H, W) or one number, after normalisation: (3, H, W) or (3, 1, 1)."""
    return (value - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def random_weights(name: str, **kwargs) -> dict[str, torch.Tensor]:
    """The state dict of a timm model, filled at random so that every tensor matters."""
    torch.manual_seed(1)
    model = timm.create_model(name, **kwargs)
    return {key: value + 0.05 * torch.randn_like(value) for key, value in model.state_dict().items()}
