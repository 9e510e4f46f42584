"""Data sets, transforms and the sentences that bad data gets."""

import multiprocessing
import pickle
import random
import socket
import tarfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
import torch.distributed as dist
import torchvision.datasets as tv
from PIL import Image
from scipy.io import savemat
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import DataLoader
from torchvision import transforms as T

import datasets
from datasets import DATASETS, DataError, build_datasets, build_transform, register_dataset, stratified_indices

ARCHIVE = Path(__file__).parents[1] / "../shared/data/cifar10-jpg.tar.xz"
POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5", "rand-m15-n2-mstd1.0-inc1"]    # DeiT, KAT, KArAt
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def make_args(**overrides):
    defaults = dict(
        data_set="DIGITS", data_path="", input_size=32, mean=MEAN, std=STD, train_interpolation="random",
        interpolation="bicubic", color_jitter=None, aa=None, reprob=0.0, remode="pixel", recount=1,
        eval_crop_ratio=0.875, three_augment=False, src=False, hflip=None, vflip=0.0, scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3), no_aug=False, train_subset=None, val_subset=None, check_images="auto", seed=0,
        num_workers=0)
    return SimpleNamespace(**{**defaults, **overrides})


def noise(width=48, height=40, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def normalised(value):
    """Pixel value in [0, 1], equal in all channels, after normalisation: (3, 1, 1)."""
    return ((value - torch.tensor(MEAN)) / torch.tensor(STD))[:, None, None]


TREE = [f"{folder}/{name}/{i}.jpg" for folder in ("train", "val") for name in ("cat", "dog") for i in range(3)]


def make_tree(root, paths=TREE):
    """Images, texts (.txt) and folders (/)."""
    for name in paths:
        path = Path(root, name)
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if name.endswith(".txt"):
            path.write_text("no image")
        elif not name.endswith("/"):
            noise().save(path)
    return make_args(data_set="IMNET", data_path=str(root))


def error_of(args, **kwargs):
    with pytest.raises(DataError) as caught:
        build_datasets(args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def closed_port(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/"


def test_registry_names_and_errors():
    assert {"CIFAR", "CIFAR10", "CIFAR100", "DIGITS", "Flowers102", "IMNET", "STL10", "SVHN"} <= set(DATASETS)
    with pytest.raises(ValueError, match="CIFAR10.*twice"):
        register_dataset("CIFAR10")(lambda args, download: None)
    message = error_of(make_args(data_set="MNIST"))
    assert "MNIST" in message and all(name in message for name in DATASETS)


def test_registered_data_set_is_built(monkeypatch):
    monkeypatch.delitem(DATASETS, "NOISE", raising=False)
    pixels = np.zeros((4, 9, 9, 3), dtype=np.uint8)
    register_dataset("NOISE")(lambda args, download: [datasets.ImageDataset(pixels, [0, 1, 0, 1], ["a", "b"])] * 2)
    train, val, classes = build_datasets(make_args(data_set="NOISE", train_subset=2))
    assert (len(train), len(val), classes) == (2, 4, ["a", "b"])
    monkeypatch.delitem(DATASETS, "NOISE")


@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("options", [
    {}, {"aa": POLICIES[0], "reprob": 0.5}, {"three_augment": True, "color_jitter": 0.3}, {"src": True},
    {"no_aug": True}, {"train_interpolation": "bilinear", "interpolation": "bilinear"}, {"aa": "augmix-m3-w3"},
    {"aa": "v0", "vflip": 0.5}, {"scale": None, "ratio": None, "color_jitter": 0.0}, {"reprob": 1.0, "remode": "rand"}])
def test_output_shape_and_dtype(size, is_train, options):
    transform = pickle.loads(pickle.dumps(build_transform(is_train, make_args(input_size=size, **options))))
    for image in (noise(), noise(8, 8), noise(30, 90)):
        out = transform(image)
        assert out.shape == (3, size, size) and out.dtype == torch.float32 and out.isfinite().all()


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("is_train", [True, False])
def test_normalisation(size, is_train):
    transform = build_transform(is_train, make_args(input_size=size, no_aug=True))
    torch.testing.assert_close(transform(Image.new("RGB", (50, 40), "white")), normalised(1.0).expand(3, size, size))
    torch.testing.assert_close(transform(Image.new("RGB", (50, 40))), normalised(0.0).expand(3, size, size))


@pytest.mark.parametrize("size, crop, resized", [(224, 0.875, 256), (224, 0.9, 248), (64, 1.0, 64)])
def test_evaluation_resizes_then_crops(size, crop, resized):
    steps = build_transform(False, make_args(input_size=size, eval_crop_ratio=crop)).transforms
    assert isinstance(steps[0], T.Resize) and steps[0].size == resized
    assert steps[0].interpolation == T.InterpolationMode.BICUBIC
    assert isinstance(steps[1], T.CenterCrop) and tuple(steps[1].size) == (size, size)


def test_small_evaluation_keeps_the_whole_image():
    image = noise(32, 32)
    expected = T.functional.normalize(T.functional.to_tensor(image), MEAN, STD)
    for args in (make_args(), make_args(eval_crop_ratio=0.5)):
        torch.testing.assert_close(build_transform(False, args)(image), expected)
    wide = Image.fromarray(np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None], 32, axis=0)).convert("RGB")    # 64x32
    row = build_transform(False, make_args(mean=(0, 0, 0), std=(1, 1, 1)))(wide)[0, 0]
    assert row[0] < 0.03 and row[-1] > 0.95    # black on the left to white on the right


def test_small_training_crop_shifts_the_image_over_black():
    transform = build_transform(True, make_args(hflip=0.0))
    padded = T.functional.pad(T.functional.normalize(T.functional.to_tensor(noise(32, 32)), MEAN, STD), 4)
    padded[:, [*range(4), *range(36, 40)], :] = normalised(0.0)
    padded[:, :, [*range(4), *range(36, 40)]] = normalised(0.0)
    windows = {(i, j): padded[:, i:i + 32, j:j + 32] for i in range(9) for j in range(9)}
    torch.manual_seed(0)
    seen = set()
    for _ in range(50):
        out = transform(noise(32, 32))
        matches = [shift for shift, window in windows.items() if torch.allclose(out, window)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 10


def test_large_training_crop_and_its_options():
    steps = build_transform(True, make_args(input_size=64, scale=(0.5, 0.7), ratio=[1.0, 1.0], vflip=0.25)).transforms
    assert isinstance(steps[0], RandomResizedCropAndInterpolation)
    assert (steps[0].scale, steps[0].ratio) == ((0.5, 0.7), (1.0, 1.0)) and len(steps[0].interpolation) == 2
    assert next(s.p for s in steps if isinstance(s, T.RandomVerticalFlip)) == 0.25


@pytest.mark.parametrize("data_set, hflip, expected", [
    ("IMNET", None, [0.5]), ("DIGITS", None, []), ("DIGITS", 0.3, [0.3]), ("SVHN", 0.0, [])])
def test_horizontal_flip_default(data_set, hflip, expected):
    steps = build_transform(True, make_args(data_set=data_set, hflip=hflip)).transforms
    assert [s.p for s in steps if isinstance(s, T.RandomHorizontalFlip)] == expected


@pytest.mark.parametrize("size", [32, 64])
def test_simple_random_crop_reflects(size):
    transform = build_transform(True, make_args(input_size=size, src=True))
    assert [type(step) for step in transform.transforms[:2]] == [T.Resize, T.RandomCrop]
    assert transform.transforms[0].size == size
    white = normalised(1.0).expand(3, size, size)
    for _ in range(5):    # no black border
        torch.testing.assert_close(transform(Image.new("RGB", (90, 70), "white")), white)


def test_three_augment_replaces_the_policy():
    steps = build_transform(True, make_args(three_augment=True, color_jitter=0.3, aa=POLICIES[0])).transforms
    policies = [step for step in steps if isinstance(step, AutoAugment)]
    assert len(policies) == 1 and not any(isinstance(step, RandAugment) for step in steps)
    names = {op.name for ops in policies[0].policy for op in ops}
    assert {name[:6] for name in names} == {"Solari", "Desatu", "Gaussi"}
    jitter = next(step for step in steps if isinstance(step, T.ColorJitter))
    assert jitter.brightness == pytest.approx((0.7, 1.3))


@pytest.mark.parametrize("aa, jitter, policies, jitters", [
    (POLICIES[0], 0.4, 1, 0), (None, 0.4, 0, 1), ("", 0.4, 0, 1), ("none", None, 0, 0), ("None", 0.0, 0, 0)])
def test_policy_and_colour_jitter(aa, jitter, policies, jitters):
    steps = build_transform(True, make_args(aa=aa, color_jitter=jitter)).transforms
    assert sum(isinstance(step, RandAugment) for step in steps) == policies
    assert sum(isinstance(step, T.ColorJitter) for step in steps) == jitters


def test_random_erasing_comes_last_and_only_in_training():
    args = make_args(input_size=64, reprob=1.0, remode="const", recount=2)
    erasing = build_transform(True, args).transforms[-1]
    assert isinstance(erasing, RandomErasing) and erasing.max_count == 2
    out = build_transform(True, args)(Image.new("RGB", (64, 64), "white"))
    erased = (out == 0).all(dim=0)
    assert 0 < erased.sum() < erased.numel()
    torch.testing.assert_close(out[:, ~erased], normalised(1.0)[:, 0].expand(3, int((~erased).sum())))
    for other in (build_transform(False, args), build_transform(True, make_args(input_size=64))):
        assert not any(isinstance(step, RandomErasing) for step in other.transforms)


@pytest.mark.parametrize("policy", ["foo", "rand-q5", "v0-mstdx1.y"])
def test_unknown_policy_is_named(policy):
    with pytest.raises(DataError, match=policy):
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
    assert (bits[0] > 0) == policy.endswith("inc1")    # the draws that Pillow 13 raises on did happen


@pytest.mark.parametrize("policy", [POLICIES[0], "original", "augmix-m3-w3", "rand-m9-mmax30-inc1"])
def test_every_posterize_op_is_replaced(policy):
    steps = build_transform(True, make_args(aa=policy)).transforms
    ops = [op for s in steps for op in [*getattr(s, "ops", ()), *sum(getattr(s, "policy", []), [])]]
    posterize = [op for op in ops if op.name.startswith("Posterize")]
    assert posterize and all(op.aug_fn is datasets.posterize for op in posterize)
    assert AugmentOp("Posterize").aug_fn is not datasets.posterize    # timm itself is left alone


def test_posterize_at_magnitude_10_is_black():
    steps = build_transform(True, make_args(aa="rand-m10-p1-inc1")).transforms
    op = next(op for s in steps for op in getattr(s, "ops", ()) if op.name == "PosterizeIncreasing")
    assert np.asarray(op(noise())).max() == 0 and op(noise()).size == noise().size
    np.testing.assert_array_equal(datasets.posterize(noise(), 3), np.asarray(noise()) & 0b11100000)
    assert np.asarray(datasets.posterize(noise(), -2)).max() == 0    # magnitudes above 10
    unfixed = AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)
    if int(PIL.__version__.split(".")[0]) >= 13:
        with pytest.raises(ValueError, match="bits"):
            unfixed(noise())
    else:    # the meaning that is kept
        assert np.asarray(unfixed(noise())).max() == 0


def test_digits_split_is_fixed_stratified_and_disjoint():
    train, val, classes = build_datasets(make_args())
    assert (len(train), len(val), classes) == (1500, 297, list("0123456789"))
    again = build_datasets(make_args(seed=1))
    np.testing.assert_array_equal(train.images, again[0].images)
    np.testing.assert_array_equal(val.targets, again[1].targets)
    share = (np.bincount(train.targets) + np.bincount(val.targets)) * 297 / 1797
    assert np.abs(np.bincount(val.targets) - share).max() <= 1
    scans = [Counter((image.tobytes(), int(t)) for image, t in zip(part.images, part.targets)) for part in (train, val)]
    assert sum((scans[0] + scans[1]).values()) == 1797 and not scans[0] & scans[1]
    assert val.targets[:8].tolist() == [7, 3, 1, 3, 0, 3, 4, 7]    # the split must not change between versions
    train.transform = None
    image, target = train[0]
    assert isinstance(target, int) and image.mode == "RGB" and image.size == (8, 8)
    assert train.images.min() == 0 and train.images.max() == 255


@pytest.mark.parametrize("size", [1, 9, 10, 95, 100])
def test_subset_is_stratified(size):
    targets = np.random.default_rng(0).choice(4, 100, p=[0.6, 0.25, 0.1, 0.05])
    chosen = stratified_indices(targets, size, seed=3)
    assert len(set(chosen.tolist())) == size and (np.diff(chosen) > 0).all()
    share = np.bincount(targets, minlength=4) * size / 100
    assert np.abs(np.bincount(targets[chosen], minlength=4) - share).max() <= 1
    np.testing.assert_array_equal(chosen, stratified_indices(targets, size, seed=3))
    assert set(chosen) <= set(stratified_indices(targets, 100, seed=3))
    if size in (9, 10):
        assert chosen.tolist() != stratified_indices(targets, size, seed=4).tolist()


def test_subset_arguments():
    args = make_args(train_subset=100, val_subset=20, seed=7)
    train, val, classes = build_datasets(args)
    assert set(np.bincount(train.targets)) <= {9, 10, 11} and set(np.bincount(val.targets)) <= {1, 2, 3}
    assert len(classes) == 10
    np.random.seed(123)    # global generators have no say
    np.testing.assert_array_equal(build_datasets(args)[0].images, train.images)
    assert not np.array_equal(build_datasets(make_args(train_subset=100, seed=8))[0].images, train.images)
    for overrides in ({"train_subset": 0}, {"val_subset": 298}):
        assert str(*overrides.values()) in error_of(make_args(**overrides))


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_image_folder_tree(tmp_path, val):
    args = make_tree(tmp_path, [path.replace("val/", f"{val}/") for path in TREE] + ["train/cat/notes.txt"])
    Image.new("L", (9, 99)).save(tmp_path / "train/cat/grey.png")
    train, held_out, classes = build_datasets(args)
    assert (len(train), len(held_out), classes) == (7, 6, ["cat", "dog"])
    random_crops = [any(isinstance(s, T.RandomCrop) for s in part.transform.transforms) for part in (train, held_out)]
    assert random_crops == [True, False]
    train = pickle.loads(pickle.dumps(train))    # what a spawned worker gets
    for images, targets in DataLoader(train, batch_size=7):
        assert images.shape == (7, 3, 32, 32) and targets.tolist() == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("paths, words", [
    ([], ["no folder named train"]),
    (["train/"], ["no validation folder", "val, valid, validation, test"]),
    (["train/", "val/"], ["train has no class folders"]),
    ([*TREE, "train/empty/"], ["train/empty", "without any image", ".jpg"]),
    ([*TREE, "train/fox/0.jpg", "val/fox/a.txt"], ["val/fox", "without any image"]),
    ([*TREE, "train/emu/0.jpg", "val/fox/0.jpg", "val/gnu/0.jpg"], ["only in train: emu;", "only in val: fox, gnu"]),
    ([*TREE, *(f"train/x{i}/0.jpg" for i in range(9))], ["only in train: x0, x1, x2, x3, x4 and 4 more"])])
def test_bad_tree_gets_one_sentence(tmp_path, paths, words):
    message = error_of(make_tree(tmp_path, paths))
    assert all(word in message for word in [*words, str(tmp_path)]), message


def test_bad_data_path_gets_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for data_set in ("IMNET", "CIFAR10"):
        message = error_of(make_args(data_set=data_set, data_path=str(tmp_path / "file")))
        assert str(tmp_path / "file") in message and "is a file" in message
    message = error_of(make_args(data_set="IMNET", data_path=str(tmp_path / "absent")))
    assert str(tmp_path / "absent") in message and "does not exist" in message


def break_image(path, how):
    content = path.read_bytes()
    path.unlink()
    if how == "broken link":
        path.symlink_to("nowhere.jpg")
    else:
        path.write_bytes({"truncated": content[:len(content) // 2], "empty": b"", "text": b"not an image"}[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "text", "broken link"])
@pytest.mark.parametrize("mode", ["auto", "all"])
def test_unreadable_image_is_named_before_training(tmp_path, how, mode):
    args = make_tree(tmp_path)
    args.check_images = mode
    break_image(tmp_path / "val/dog/1.jpg", how)
    assert f"{tmp_path}/val/dog/1.jpg cannot be read" in error_of(args)
    break_image(tmp_path / "train/cat/0.jpg", how)
    message = error_of(args)
    assert f"{tmp_path}/val/dog/1.jpg" in message and f"{tmp_path}/train/cat/0.jpg" in message


@pytest.mark.parametrize("mode, limit, checked", [
    ("auto", 12, True), ("auto", 11, False), ("all", 11, True), ("off", 12, False)])
def test_check_mode(tmp_path, monkeypatch, mode, limit, checked):
    monkeypatch.setattr(datasets, "CHECK_LIMIT", limit)
    args = make_tree(tmp_path)
    args.check_images = mode
    break_image(tmp_path / "train/cat/0.jpg", "truncated")
    if checked:
        error_of(args)
    else:
        assert len(build_datasets(args)[0]) == 6


def test_only_this_ranks_share_is_checked(tmp_path):
    args = make_tree(tmp_path)
    break_image(tmp_path / "train/cat/1.jpg", "text")    # index 1 of 12
    build_datasets(args, rank=0, world_size=2)
    assert "train/cat/1.jpg" in error_of(args, rank=1, world_size=2)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_is_named_while_reading(tmp_path, num_workers):
    args = make_tree(tmp_path)
    args.check_images = "off"
    break_image(tmp_path / "train/dog/2.jpg", "truncated")
    train, _, _ = build_datasets(args)
    with pytest.raises(DataError) as caught:
        list(DataLoader(train, batch_size=2, num_workers=num_workers))
    error = caught.value.with_traceback(None)
    del caught    # frees the loader here: collected later, its worker takes 5 s to stop
    assert str(error).startswith(f"{tmp_path}/train/dog/2.jpg cannot be read as an image (OSError: ")
    assert "\n" not in str(error) and str(pickle.loads(pickle.dumps(error))) == str(error)


def test_good_images_are_decoded_once(tmp_path, monkeypatch):
    args, decoded = make_tree(tmp_path), []
    load_image = datasets.load_image
    monkeypatch.setattr(datasets, "load_image", lambda root, name: decoded.append(name) or load_image(root, name))
    build_datasets(args)
    assert len(decoded) == len(set(decoded)) == 12
    build_datasets(args)
    assert len(decoded) == 12
    args.check_images = "all"    # always
    build_datasets(args)
    assert len(decoded) == 24
    args.check_images = "auto"
    break_image(tmp_path / "val/cat/0.jpg", "truncated")
    for _ in range(2):    # a failure is not remembered
        assert "val/cat/0.jpg" in error_of(args)
    assert len(decoded) == 48


def test_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    args = make_tree(tmp_path / "tree")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(build_datasets(args)[0]) == 6


def run_rank(rank, folder, args, url, queue):
    tv.CIFAR10.url = url

    @register_dataset("SLOW")
    def slow(args, download):
        if download:
            time.sleep(0.3)
            (folder / "downloaded").write_text("")
        elif not (folder / "downloaded").exists():
            raise DataError("read before it was downloaded")
        return DATASETS["DIGITS"](args, download)

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for case in args:
        try:
            queue.put((rank, len(build_datasets(case, rank, 2)[0])))
        except DataError as error:
            queue.put((rank, str(error)))
    dist.destroy_process_group()


def test_every_rank_ends_with_the_same_sentence(tmp_path, closed_port):
    """An unreadable image in the share of rank 1, a failing download, a good tree, a slow download: nobody hangs."""
    bad, good = make_tree(tmp_path / "bad"), make_tree(tmp_path / "good")
    break_image(tmp_path / "bad/train/cat/1.jpg", "truncated")
    cases = [bad, make_args(data_set="CIFAR10", data_path=str(tmp_path / "cifar")), good,
             make_args(data_set="SLOW")]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=run_rank, args=(rank, tmp_path, cases, closed_port, queue)) for rank in range(2)]
    try:
        for process in ranks:
            process.start()
        results = [queue.get(timeout=60) for _ in range(8)]
    finally:
        for process in ranks:
            process.join(timeout=10)
            process.kill()
    outcomes = [[outcome for r, outcome in results if r == rank] for rank in range(2)]
    assert outcomes[0] == outcomes[1]
    assert "train/cat/1.jpg" in outcomes[0][0] and "cifar-10-python.tar.gz" in outcomes[0][1]
    assert outcomes[0][2:] == [6, 1500]


@pytest.mark.parametrize("data_set, files", [
    ("CIFAR10", ["cifar-10-python.tar.gz"]), ("CIFAR100", ["cifar-100-python.tar.gz"]),
    ("CIFAR", ["cifar-100-python.tar.gz"]), ("STL10", ["stl10_binary.tar.gz"]),
    ("SVHN", ["train_32x32.mat", "test_32x32.mat"]),
    ("Flowers102", ["102flowers.tgz", "imagelabels.mat", "setid.mat", "flowers-102"])])
def test_no_network_says_which_files_to_put_where(tmp_path, monkeypatch, closed_port, data_set, files):
    for source in (tv.CIFAR10, tv.CIFAR100, tv.STL10):
        monkeypatch.setattr(source, "url", closed_port + source.filename)
    monkeypatch.setattr(tv.Flowers102, "_download_url_prefix", closed_port)
    monkeypatch.setattr(tv.SVHN, "split_list", {split: [closed_port + name, name, md5]
                                                for split, (_, name, md5) in tv.SVHN.split_list.items()})
    message = error_of(make_args(data_set=data_set, data_path=str(tmp_path)))
    assert "could not be downloaded" in message
    assert all(word in message for word in [*files, str(tmp_path), data_set]), message


def write_published_files(root, rng):
    """Small files in the formats that torchvision reads: 20 images for training, 10 for testing."""
    def pixels(*shape):
        return rng.integers(0, 256, shape, dtype=np.uint8)

    batches = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for folder, key, names in (("cifar-10-batches-py", "label", batches),
                               ("cifar-100-python", "fine_label", ["train", "test"])):
        (root / folder).mkdir()
        for name in names:
            count = 4 if "data" in name else 20 if name == "train" else 10
            entry = {"data": pixels(count, 3072), f"{key}s": [i % 3 for i in range(count)]}
            (root / folder / name).write_bytes(pickle.dumps(entry))
        meta = "meta" if folder == "cifar-100-python" else "batches.meta"
        (root / folder / meta).write_bytes(pickle.dumps({f"{key}_names": ["a", "b", "c"]}))
    (root / "stl10_binary").mkdir()
    (root / "stl10_binary/class_names.txt").write_text("a\nb\nc\n")
    (root / "flowers-102/jpg").mkdir(parents=True)
    for split, count in (("train", 20), ("test", 10)):
        savemat(root / f"{split}_32x32.mat", {"X": pixels(32, 32, 3, count), "y": np.arange(count)[:, None] % 10 + 1})
        pixels(count, 3, 96, 96).tofile(root / f"stl10_binary/{split}_X.bin")
        (np.arange(count, dtype=np.uint8) % 3 + 1).tofile(root / f"stl10_binary/{split}_y.bin")
    for i in range(1, 31):
        noise(60, 50, seed=i).save(root / f"flowers-102/jpg/image_{i:05d}.jpg")
    savemat(root / "flowers-102/imagelabels.mat", {"labels": np.arange(30) % 3 + 1})
    savemat(root / "flowers-102/setid.mat",
            {"trnid": np.arange(1, 11), "valid": np.arange(11, 21), "tstid": np.arange(21, 31)})


@pytest.mark.parametrize("data_set, source, train, val, num_classes", [
    ("CIFAR10", tv.CIFAR10, [{"train": True}], {"train": False}, 3),
    ("CIFAR", tv.CIFAR100, [{"train": True}], {"train": False}, 3),
    ("SVHN", tv.SVHN, [{"split": "train"}], {"split": "test"}, 10),
    ("STL10", tv.STL10, [{"split": "train"}], {"split": "test"}, 3),
    ("Flowers102", tv.Flowers102, [{"split": "train"}, {"split": "val"}], {"split": "test"}, 102)])
def test_images_and_labels_are_those_of_torchvision(tmp_path, monkeypatch, data_set, source, train, val, num_classes):
    write_published_files(tmp_path, np.random.default_rng(0))
    for module in (tv.cifar, tv.svhn, tv.stl10, tv.flowers102, tv.utils):
        monkeypatch.setattr(module, "check_integrity", lambda *path_and_md5: True)
    parts = build_datasets(make_args(data_set=data_set, data_path=str(tmp_path)))
    assert [len(part) for part in parts] == [20, 10, num_classes]
    for part, splits in zip(parts, (train, [val])):
        part.transform = None
        expected = [pair for split in splits for pair in source(str(tmp_path), **split)]
        assert [target for _, target in part] == [target for _, target in expected]
        for (image, _), (wanted, _) in zip(part, expected):
            np.testing.assert_array_equal(image, wanted)


@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"{ARCHIVE.name} is not there")
def test_real_jpegs(tmp_path):
    with tarfile.open(ARCHIVE, "r|xz") as archive:
        for member in archive:
            if member.name.endswith(("0000.jpg", "0001.jpg")):
                archive.extract(member, tmp_path, filter="data")
    args = make_args(data_set="IMNET", data_path=str(tmp_path), aa=POLICIES[2], reprob=0.25)
    train, val, classes = build_datasets(args)
    assert len(classes) == 10 and len(train) == len(val) == 20 and "airplane" in classes
    images, targets = next(iter(DataLoader(train, batch_size=20)))
    assert images.shape == (20, 3, 32, 32) and targets.bincount().tolist() == [2] * 10
    images, _ = next(iter(DataLoader(val, batch_size=20)))
    pixels = images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert -1e-5 < pixels.min() and pixels.max() < 1 + 1e-5 and 0.3 < pixels.mean() < 0.7
