"""Transforms give uint8 images; the loader normalises and erases them."""

import pickle
import random
from collections import Counter

import numpy as np
import PIL
import pytest
import torch
from data_helpers import CPU, MEAN, POLICIES, STD, make_args, noise, normalised
from PIL import Image
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms as T

import transforms
from models.timm_internals import replace_crop
from samplers import ExactEvalBatchSampler
from transforms import build_loader, build_transform
from utils import UserError


@pytest.fixture(autouse=True)
def seeded_erasing():
    random.seed(0)


def pixels_of(image):
    """PIL image -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Images(torch.utils.data.Dataset):
    """Images of one colour or of noise, (n, 3, size, size) uint8; the target is the index."""

    def __init__(self, n, size=32, value=None):
        self.pixels = torch.stack([pixels_of(noise(size, size, seed)) for seed in range(n)])
        if value is not None:
            self.pixels.fill_(value)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.pixels[index], index


@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aa": POLICIES[0]},
        {"three_augment": True, "color_jitter": 0.3},
        {"src": True},
        {"no_aug": True},
        {"train_interpolation": "bilinear", "interpolation": "bilinear"},
        {"aa": "augmix-m3-w3"},
        {"aa": "v0", "vflip": 0.5},
        {"scale": None, "ratio": None, "color_jitter": 0.0},
    ],
)
def test_output_shape_and_dtype(size, is_train, options):
    transform = pickle.loads(pickle.dumps(build_transform(is_train, make_args(input_size=size, **options))))
    for image in (noise(), noise(8, 8), noise(30, 90)):
        out = transform(image)
        assert out.shape == (3, size, size) and out.dtype == torch.uint8


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("is_train", [True, False])
def test_white_stays_white_and_black_black(size, is_train):
    transform = build_transform(is_train, make_args(input_size=size, no_aug=True))
    assert (transform(Image.new("RGB", (50, 40), "white")) == 255).all()
    assert (transform(Image.new("RGB", (50, 40))) == 0).all()


@pytest.mark.parametrize("size, crop, resized", [(224, 0.875, 256), (224, 0.9, 248), (64, 1.0, 64)])
def test_evaluation_resizes_then_crops(size, crop, resized):
    steps = build_transform(False, make_args(input_size=size, eval_crop_ratio=crop)).transforms
    assert isinstance(steps[0], T.Resize) and steps[0].size == resized
    assert steps[0].interpolation == T.InterpolationMode.BICUBIC
    assert isinstance(steps[1], T.CenterCrop) and tuple(steps[1].size) == (size, size)


def test_small_evaluation_keeps_the_whole_image():
    image = noise(32, 32)
    for args in (make_args(), make_args(eval_crop_ratio=0.5)):
        assert torch.equal(build_transform(False, args)(image), pixels_of(image))
    wide = Image.fromarray(np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None], 32, axis=0)).convert("RGB")  # 64x32
    row = build_transform(False, make_args())(wide)[0, 0]
    assert row[0] < 8 and row[-1] > 242  # black on the left to white on the right


def test_small_training_crop_shifts_the_image_over_black():
    transform = build_transform(True, make_args(hflip=0.0))
    padded = T.functional.pad(pixels_of(noise(32, 32)), 4)
    windows = {(i, j): padded[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)}
    torch.manual_seed(0)
    seen = set()
    for _ in range(50):
        out = transform(noise(32, 32))
        matches = [shift for shift, window in windows.items() if torch.equal(out, window)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 10


def test_large_training_crop_and_its_options():
    steps = build_transform(True, make_args(input_size=64, scale=(0.5, 0.7), ratio=[1.0, 1.0], vflip=0.25)).transforms
    assert isinstance(steps[0], RandomResizedCropAndInterpolation)
    assert (steps[0].scale, steps[0].ratio) == ((0.5, 0.7), (1.0, 1.0)) and len(steps[0].interpolation) == 2
    assert next(s.p for s in steps if isinstance(s, T.RandomVerticalFlip)) == 0.25


@pytest.mark.parametrize(
    "data_set, hflip, expected",
    [("IMNET", None, [0.5]), ("DIGITS", None, []), ("DIGITS", 0.3, [0.3]), ("SVHN", 0.0, [])],
)
def test_horizontal_flip_default(data_set, hflip, expected):
    steps = build_transform(True, make_args(data_set=data_set, hflip=hflip)).transforms
    assert [s.p for s in steps if isinstance(s, T.RandomHorizontalFlip)] == expected


@pytest.mark.parametrize("size", [32, 64])
def test_simple_random_crop_reflects(size):
    transform = build_transform(True, make_args(input_size=size, src=True))
    assert [type(step) for step in transform.transforms[:2]] == [T.Resize, T.RandomCrop]
    assert transform.transforms[0].size == size
    for _ in range(5):  # no black border
        assert (transform(Image.new("RGB", (90, 70), "white")) == 255).all()


def test_three_augment_replaces_the_policy():
    steps = build_transform(True, make_args(three_augment=True, color_jitter=0.3, aa=POLICIES[0])).transforms
    policies = [step for step in steps if isinstance(step, AutoAugment)]
    assert len(policies) == 1 and not any(isinstance(step, RandAugment) for step in steps)
    names = {op.name for ops in policies[0].policy for op in ops}
    assert {name[:6] for name in names} == {"Solari", "Desatu", "Gaussi"}
    jitter = next(step for step in steps if isinstance(step, T.ColorJitter))
    assert jitter.brightness == pytest.approx((0.7, 1.3))


@pytest.mark.parametrize(
    "aa, jitter, policies, jitters",
    [(POLICIES[0], 0.4, 1, 0), (None, 0.4, 0, 1), ("", 0.4, 0, 1), ("none", None, 0, 0), ("None", 0.0, 0, 0)],
)
def test_policy_and_colour_jitter(aa, jitter, policies, jitters):
    steps = build_transform(True, make_args(aa=aa, color_jitter=jitter)).transforms
    assert sum(isinstance(step, RandAugment) for step in steps) == policies
    assert sum(isinstance(step, T.ColorJitter) for step in steps) == jitters


def test_policies_fill_up_with_the_mean():
    steps = build_transform(True, make_args(aa=POLICIES[0])).transforms
    rotate = next(op for s in steps for op in getattr(s, "ops", ()) if op.name == "Rotate")
    assert rotate.kwargs["fillcolor"] == (102, 128, 153)


@pytest.mark.parametrize("policy", ["foo", "rand-q5", "v0-mstdx1.y"])
def test_unknown_policy_is_named(policy):
    with pytest.raises(UserError, match=policy):
        build_transform(True, make_args(aa=policy))


@pytest.mark.parametrize("policy", POLICIES)
def test_20000_draws_of_each_published_policy(policy):
    rand_augment = next(s for s in build_transform(True, make_args(aa=policy)).transforms if isinstance(s, RandAugment))
    op = next(op for op in rand_augment.ops if op.name.startswith("Posterize"))
    fixed, bits = op.aug_fn, Counter()

    def counting(image, bits_to_keep, **kwargs):
        bits[bits_to_keep] += 1
        return fixed(image, bits_to_keep, **kwargs)

    op.aug_fn = counting
    random.seed(0)
    np.random.seed(0)
    image = noise(32, 32)
    assert {rand_augment(image).size for _ in range(20_000)} == {(32, 32)}
    assert bits.total() > 500
    assert (bits[0] > 0) == policy.endswith("inc1")  # draws for which Pillow 13 raises


@pytest.mark.parametrize("policy", [POLICIES[0], "original", "augmix-m3-w3", "rand-m9-mmax30-inc1"])
def test_every_posterize_op_is_replaced(policy):
    steps = build_transform(True, make_args(aa=policy)).transforms
    ops = [op for s in steps for op in [*getattr(s, "ops", ()), *sum(getattr(s, "policy", []), [])]]
    posterize = [op for op in ops if op.name.startswith("Posterize")]
    assert posterize and all(op.aug_fn is transforms.posterize for op in posterize)
    assert AugmentOp("Posterize").aug_fn is not transforms.posterize  # timm itself does not change


def test_posterize_at_magnitude_10_is_black():
    steps = build_transform(True, make_args(aa="rand-m10-p1-inc1")).transforms
    op = next(op for s in steps for op in getattr(s, "ops", ()) if op.name == "PosterizeIncreasing")
    assert np.asarray(op(noise())).max() == 0 and op(noise()).size == noise().size
    np.testing.assert_array_equal(transforms.posterize(noise(), 3), np.asarray(noise()) & 0b11100000)
    assert np.asarray(transforms.posterize(noise(), -2)).max() == 0  # magnitudes above 10
    unfixed = AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)
    if int(PIL.__version__.split(".")[0]) >= 13:
        with pytest.raises(ValueError, match="bits"):
            unfixed(noise())
    else:  # the behaviour that posterize keeps
        assert np.asarray(unfixed(noise())).max() == 0


def test_a_transform_of_another_timm_is_refused():
    with pytest.raises(RuntimeError, match="use timm 1.0.31"):
        replace_crop(build_transform(False, make_args(input_size=64)), [])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("is_train", [True, False])
def test_loader_normalises(num_workers, is_train):
    images = Images(7)
    loader = build_loader(images, make_args(), CPU, num_workers, is_train=is_train, batch_size=3)
    batches = list(loader)
    assert len(loader) == len(batches) == (2 if is_train else 3)
    assert [targets.tolist() for _, targets in batches] == [[0, 1, 2], [3, 4, 5], [6]][: len(loader)]
    for x, targets in batches:
        assert x.dtype == torch.float32 and targets.dtype == torch.int64
        torch.testing.assert_close(x, torch.stack([normalised(images.pixels[i] / 255) for i in targets]))


def test_loader_normalises_white_and_black():
    for value in (0, 255):
        [(x, _)] = build_loader(Images(2, value=value), make_args(), CPU, 0, is_train=False, batch_size=2)
        torch.testing.assert_close(x, normalised(value / 255).expand(2, 3, 32, 32))


def test_transforms_and_loader_together_are_to_tensor_and_normalize():
    """The model gets the image that torchvision alone would give it."""
    image = noise(90, 70)
    transform = build_transform(False, make_args(input_size=64))
    crop = T.CenterCrop(64)(T.Resize(73, T.InterpolationMode.BICUBIC)(image))
    [(x, _)] = build_loader([(transform(image), 0)], make_args(), CPU, 0, is_train=False)
    torch.testing.assert_close(x[0], T.functional.normalize(T.functional.to_tensor(crop), MEAN, STD))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_process_without_a_batch_gets_none(num_workers):
    batches = ExactEvalBatchSampler(10, 8, world_size=3, rank=2)
    loader = build_loader(Images(10), make_args(), CPU, num_workers, is_train=False, batch_sampler=batches)
    assert len(loader) == 0 and list(loader) == list(loader) == []


def test_loader_follows_its_sampler_each_epoch():
    batches = ExactEvalBatchSampler(10, 4, world_size=2, rank=0)
    loader = build_loader(Images(10), make_args(), CPU, 0, is_train=False, batch_sampler=batches)
    for _ in range(2):
        assert [targets.tolist() for _, targets in loader] == [[0, 1, 2, 3], [8, 9]]
    order = torch.utils.data.SequentialSampler(range(5, 9))
    loader = build_loader(Images(10), make_args(), CPU, 0, is_train=True, sampler=order, batch_size=2)
    assert [targets.tolist() for _, targets in loader] == [[0, 1], [2, 3]]


def erased_of(args, is_train=True, n=300, num_workers=0):
    """The images of one batch, and the mask of pixels that are not normalised white."""
    [(x, _)] = build_loader(Images(n, value=255), args, CPU, num_workers, is_train=is_train, batch_size=n)
    return x, ((x - normalised(1.0)).abs() > 1e-5).any(1)


def test_random_erasing_only_in_training():
    options = {"reprob": 1.0, "remode": "const"}
    x, erased = erased_of(make_args(**options))
    assert (x.permute(0, 2, 3, 1)[erased] == 0).all()  # the mean, because erasing follows the normalisation
    share = erased.float().mean((1, 2))
    assert (
        0.01 < share.min() < 0.05 and 0.3 < share.max() < 0.36 and 0.12 < share.mean() < 0.22
    )  # uniform in [0.02, 1/3]
    for args, is_train in (
        (make_args(**options), False),
        (make_args(**options, no_aug=True), True),
        (make_args(), True),
    ):
        assert not erased_of(args, is_train, n=20)[1].any()


def test_random_erasing_options():
    _, erased = erased_of(make_args(reprob=0.25))
    assert 0.15 < erased.any(2).any(1).float().mean() < 0.35
    x, erased = erased_of(make_args(reprob=1.0, remode="pixel"))
    assert abs(x.permute(0, 2, 3, 1)[erased].mean()) < 0.02 and abs(x.permute(0, 2, 3, 1)[erased].std() - 1) < 0.02
    x, erased = erased_of(make_args(reprob=1.0, remode="rand"), n=20)
    assert all(len(one[:, where].unique(dim=1).T) == 1 for one, where in zip(x, erased))  # one colour an image

    def is_rectangle(area):
        return area.sum() == area.any(0).sum() * area.any(1).sum()

    assert all(is_rectangle(area) for area in erased)
    assert not all(is_rectangle(area) for area in erased_of(make_args(reprob=1.0, recount=2))[1])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_random_erasing_repeats_with_the_seed(num_workers):
    def run(seed):
        random.seed(seed)
        torch.manual_seed(seed)
        return erased_of(make_args(reprob=0.5), n=20, num_workers=num_workers)[0]

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


@pytest.mark.gpu
@pytest.mark.parametrize("pin_mem", [True, False])
def test_batches_on_the_gpu_outlive_their_variables(pin_mem):
    """A later batch does not overwrite a batch that queued work still reads."""
    device = torch.device("cuda:0")
    images = Images(1)
    images.pixels = torch.arange(12, dtype=torch.uint8).repeat_interleave(64)[:, None, None, None].expand(-1, 3, 64, 64)
    loader = build_loader(images, make_args(pin_mem=pin_mem), device, 0, is_train=True, batch_size=64)
    for _ in range(2):
        seen = []
        for x, _ in loader:
            torch.cuda._sleep(50_000_000)
            seen.append(x.mean((0, 2, 3)))  # queued behind the sleep
        assert x.device == device
        torch.testing.assert_close(torch.stack(seen).cpu(), normalised(torch.arange(12)[None, :, None] / 255)[..., 0].T)
