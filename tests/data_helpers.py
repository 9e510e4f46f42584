"""Arguments and images that several tests share."""

import math
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ARCHIVE = Path(__file__).parents[1] / "../shared/data/cifar10-jpg.tar.xz"
CPU = torch.device("cpu")
POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5", "rand-m15-n2-mstd1.0-inc1"]  # DeiT, KAT, KArAt
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def photographs(folder, train=math.inf, validation=math.inf):
    """So many training and validation images of each class of CIFAR-10, as JPEG files in class folders; the test is skipped where they are not there."""
    if not ARCHIVE.exists():
        pytest.skip(f"{ARCHIVE.name} is not there")
    with tarfile.open(ARCHIVE, "r|xz") as archive:
        for member in archive:
            if member.isfile() and int(Path(member.name).stem) < (
                train if member.name.startswith("train") else validation
            ):
                archive.extract(member, folder, filter="data")


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
