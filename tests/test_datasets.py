"""Data sets, and the sentences about bad data."""

import json
import multiprocessing
import pickle
import socket
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision.datasets as tv
from data_helpers import CPU, MEAN, POLICIES, STD, make_args, noise, photographs
from PIL import Image
from scipy.io import savemat
from torchvision import transforms as T

import datasets
from datasets import DATASETS, DataError, build_datasets, register_dataset, stratified_indices
from transforms import build_loader

TREE = [f"{folder}/{name}/{i}.jpg" for folder in ("train", "val") for name in ("cat", "dog") for i in range(3)]


def make_tree(root, paths=TREE):
    """Make images, text files (.txt) and folders (names that end with /)."""
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
    names = {"CIFAR", "CIFAR10", "CIFAR100", "DIGITS", "Flowers102", "IMNET", "INAT", "INAT19", "STL10", "SVHN"}
    assert names <= set(DATASETS)
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
    assert val.targets[:8].tolist() == [7, 3, 1, 3, 0, 3, 4, 7]  # the split must not change between versions
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
    np.random.seed(123)  # Global generators have no effect.
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
    train = pickle.loads(pickle.dumps(train))  # as for a spawned worker
    images, targets = zip(*train)
    assert {image.shape for image in images} == {(3, 32, 32)} and targets == (0, 0, 0, 0, 1, 1, 1)


@pytest.mark.parametrize(
    "paths, words",
    [
        ([], ["no folder named train"]),
        (["train/"], ["no validation folder", "val, valid, validation, test"]),
        (["train/", "val/"], ["train has no class folders"]),
        ([*TREE, "train/empty/"], ["train/empty", "without any image", ".jpg"]),
        ([*TREE, "train/fox/0.jpg", "val/fox/a.txt"], ["val/fox", "without any image"]),
        (
            [*TREE, "train/emu/0.jpg", "val/fox/0.jpg", "val/gnu/0.jpg"],
            ["only in train: emu;", "only in val: fox, gnu"],
        ),
        ([*TREE, *(f"train/x{i}/0.jpg" for i in range(9))], ["only in train: x0, x1, x2, x3, x4 and 4 more"]),
    ],
)
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


@pytest.mark.parametrize("folder", ["val/", "test/", ""])
def test_eval_needs_only_validation_images(tmp_path, folder):
    args = make_tree(tmp_path, [path.replace("val/", folder) for path in TREE if path.startswith("val/")])
    args.eval, args.train_subset, args.val_subset = True, 1000, 4
    train, val, classes = build_datasets(args)
    assert (train, len(val), classes) == (None, 4, ["cat", "dog"])
    images, targets = zip(*val)
    assert {image.shape for image in images} == {(3, 32, 32)} and targets == (0, 0, 1, 1)
    Path(tmp_path, folder, "dog/0.jpg").write_text("no image")
    args.val_subset = None
    assert f"{Path(tmp_path, folder)}/dog/0.jpg cannot be read" in error_of(args)


def test_eval_reads_no_training_folder(tmp_path):
    args = make_tree(tmp_path, [*TREE, "train/fox/0.jpg", "train/empty/"])
    break_image(tmp_path / "train/cat/0.jpg", "text")
    args.eval = True
    train, val, classes = build_datasets(args)
    assert (train, len(val), classes) == (None, 6, ["cat", "dog"])


@pytest.mark.parametrize(
    "paths, words",
    [
        (["train/cat/0.jpg"], ["no validation folder"]),  # train is not a class
        ([], ["no validation folder", "has no class folders"]),
        (["cat/0.jpg", "dog/"], ["no validation folder", "dog", "without any image"]),
    ],
)
def test_bad_tree_for_eval_gets_one_sentence(tmp_path, paths, words):
    args = make_tree(tmp_path, paths)
    args.eval = True
    message = error_of(args)
    assert all(word in message for word in [*words, str(tmp_path)]), message


def test_eval_of_a_data_set_with_a_fixed_split():
    val = build_datasets(make_args())[1]
    nothing, same, classes = build_datasets(make_args(eval=True, train_subset=10**6))
    assert nothing is None and classes == list("0123456789")
    np.testing.assert_array_equal(same.images, val.images)


INSECT = "train_val2018/Insecta/"
# category 2 comes first in training, then 0; 0 and 1 share the genus; no training image of 3
INAT = {
    "categories.json": [{"name": n, "genus": g} for n, g in (("ant", "A"), ("asp", "A"), ("bee", "B"), ("cow", "C"))],
    "train2018.json": {
        "annotations": [{"category_id": c} for c in (2, 0, 2, 1)],
        "images": [{"file_name": f"{INSECT}{c}/t{i}.jpg"} for i, c in enumerate((0, 2, 1, 2))],
    },
    "val2018.json": {"annotations": [], "images": [{"file_name": f"{INSECT}{c}/v.jpg"} for c in (1, 2)]},
}


def make_inat(root, folder=INSECT, data=INAT, **overrides):
    make_tree(
        root,
        [
            image["file_name"].replace(INSECT, folder)
            for name in ("train2018.json", "val2018.json")
            for image in INAT[name]["images"]
        ],
    )
    for name, content in data.items():
        (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return make_args(**{"data_set": "INAT", "data_path": str(root), **overrides})


@pytest.mark.parametrize("folder", [INSECT, "train_val2018/"])  # as published, as DeiT reads it
@pytest.mark.parametrize(
    "category, classes, targets",
    [("name", ["bee", "ant", "asp"], ([1, 0, 2, 0], [2, 0])), ("genus", ["B", "A"], ([1, 0, 1, 0], [1, 0]))],
)
def test_inaturalist(tmp_path, folder, category, classes, targets):
    args = make_inat(tmp_path, folder, inat_category=category)
    train, val, found = build_datasets(args)
    assert found == train.classes == classes and (train.targets.tolist(), val.targets.tolist()) == targets
    assert [name.decode() for name in val.images] == [f"{folder}1/v.jpg", f"{folder}2/v.jpg"]
    assert train[0][0].shape == (3, 32, 32)
    (tmp_path / f"{folder}0/t0.jpg").unlink()
    assert f"{folder}0/t0.jpg cannot be read" in error_of(args)
    args.eval = True
    train, val, found = build_datasets(args)
    assert train is None and found == classes and val.targets.tolist() == targets[1]


def test_inaturalist_2019_has_files_of_its_own(tmp_path):
    data = {name.replace("2018", "2019"): content for name, content in INAT.items()}
    assert build_datasets(make_inat(tmp_path, data=data, data_set="INAT19"))[2] == ["bee", "ant", "asp"]
    assert "train2018.json" in error_of(make_args(data_set="INAT", data_path=str(tmp_path)))


@pytest.mark.parametrize("is_eval", [False, True])
@pytest.mark.parametrize("name", INAT)
@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "{",
        "7",
        "[7]",
        '{"images": [], "annotations": []}',
        '{"annotations": [{"category_id": -1}], "images": [{"file_name": "a/b/-1/c.jpg"}]}',
        '{"annotations": [{"category_id": 0}], "images": [{"file_name": "0.jpg"}]}',
    ],
)
def test_bad_inaturalist_json_is_named(tmp_path, name, content, is_eval):
    args = make_inat(tmp_path, eval=is_eval)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    message = error_of(args)
    assert name in message and str(tmp_path) in message, message


def test_inaturalist_category_without_training_annotation(tmp_path):
    data = {**INAT, "val2018.json": {"images": [{"file_name": "train_val2018/Mammalia/3/v.jpg"}]}}
    message = error_of(make_inat(tmp_path, data=data, inat_category="genus"))
    assert all(word in message for word in [str(tmp_path), "genus", "train2018.json", ": C"]), message
    assert "categories.json" in error_of(make_inat(tmp_path, inat_category="family"))  # which has no family


def break_image(path, how):
    content = path.read_bytes()
    path.unlink()
    if how == "broken link":
        path.symlink_to("nowhere.jpg")
    else:
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"not an image"}[how])


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


@pytest.mark.parametrize(
    "mode, limit, checked", [("auto", 12, True), ("auto", 11, False), ("all", 11, True), ("off", 12, False)]
)
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
    break_image(tmp_path / "train/cat/1.jpg", "text")  # index 1 of 12
    build_datasets(args, rank=0, world_size=2)
    assert "train/cat/1.jpg" in error_of(args, rank=1, world_size=2)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_is_named_while_reading(tmp_path, num_workers):
    args = make_tree(tmp_path)
    args.check_images = "off"
    break_image(tmp_path / "train/dog/2.jpg", "truncated")
    train, _, _ = build_datasets(args)
    with pytest.raises(DataError) as caught:
        list(build_loader(train, args, CPU, num_workers, is_train=True, batch_size=2))
    error = caught.value.with_traceback(None)
    del caught  # Frees the loader here; collected later, its worker takes 5 s to stop.
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
    args.check_images = "all"  # always
    build_datasets(args)
    assert len(decoded) == 24
    args.check_images = "auto"
    break_image(tmp_path / "val/cat/0.jpg", "truncated")
    for _ in range(2):  # A failed check leaves no mark.
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
    """An unreadable image in the share of rank 1, a failing download, a good tree, a slow download: no rank hangs."""
    bad, good = make_tree(tmp_path / "bad"), make_tree(tmp_path / "good")
    break_image(tmp_path / "bad/train/cat/1.jpg", "truncated")
    cases = [bad, make_args(data_set="CIFAR10", data_path=str(tmp_path / "cifar")), good, make_args(data_set="SLOW")]
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


@pytest.mark.parametrize(
    "data_set, files",
    [
        ("CIFAR10", ["cifar-10-python.tar.gz"]),
        ("CIFAR100", ["cifar-100-python.tar.gz"]),
        ("CIFAR", ["cifar-100-python.tar.gz"]),
        ("STL10", ["stl10_binary.tar.gz"]),
        ("SVHN", ["train_32x32.mat", "test_32x32.mat"]),
        ("Flowers102", ["102flowers.tgz", "imagelabels.mat", "setid.mat", "flowers-102"]),
    ],
)
def test_no_network_says_which_files_to_put_where(tmp_path, monkeypatch, closed_port, data_set, files):
    for source in (tv.CIFAR10, tv.CIFAR100, tv.STL10):
        monkeypatch.setattr(source, "url", closed_port + source.filename)
    monkeypatch.setattr(tv.Flowers102, "_download_url_prefix", closed_port)
    monkeypatch.setattr(
        tv.SVHN,
        "split_list",
        {split: [closed_port + name, name, md5] for split, (_, name, md5) in tv.SVHN.split_list.items()},
    )
    message = error_of(make_args(data_set=data_set, data_path=str(tmp_path)))
    assert "could not be downloaded" in message
    assert all(word in message for word in [*files, str(tmp_path), data_set]), message


def write_published_files(root, rng):
    """Small files in the formats that torchvision reads: 20 images for training, 10 for testing."""

    def pixels(*shape):
        return rng.integers(0, 256, shape, dtype=np.uint8)

    batches = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for folder, key, names in (
        ("cifar-10-batches-py", "label", batches),
        ("cifar-100-python", "fine_label", ["train", "test"]),
    ):
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
    savemat(
        root / "flowers-102/setid.mat",
        {"trnid": np.arange(1, 11), "valid": np.arange(11, 21), "tstid": np.arange(21, 31)},
    )


@pytest.mark.parametrize(
    "data_set, source, train, val, num_classes",
    [
        ("CIFAR10", tv.CIFAR10, [{"train": True}], {"train": False}, 3),
        ("CIFAR", tv.CIFAR100, [{"train": True}], {"train": False}, 3),
        ("SVHN", tv.SVHN, [{"split": "train"}], {"split": "test"}, 10),
        ("STL10", tv.STL10, [{"split": "train"}], {"split": "test"}, 3),
        ("Flowers102", tv.Flowers102, [{"split": "train"}, {"split": "val"}], {"split": "test"}, 102),
    ],
)
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
    (tmp_path / "train_32x32.mat").unlink()
    nothing, val, classes = build_datasets(make_args(data_set=data_set, data_path=str(tmp_path), eval=True))
    assert nothing is None and classes == parts[2]
    np.testing.assert_array_equal(val.images, parts[1].images)
    np.testing.assert_array_equal(val.targets, parts[1].targets)


def test_real_jpegs(tmp_path):
    photographs(tmp_path, train=2, validation=2)
    args = make_args(data_set="IMNET", data_path=str(tmp_path), aa=POLICIES[2], reprob=0.25)
    train, val, classes = build_datasets(args)
    assert classes == [f"{photograph}_{column}" for photograph in ("china", "flower") for column in range(5)]
    assert len(train) == len(val) == 20
    images, targets = next(iter(build_loader(train, args, CPU, 1, is_train=True, batch_size=20)))
    assert images.shape == (20, 3, 32, 32) and targets.bincount().tolist() == [2] * 10
    images, _ = next(iter(build_loader(val, args, CPU, 1, is_train=False, batch_size=20)))
    pixels = images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert -1e-5 < pixels.min() and pixels.max() < 1 + 1e-5 and 0.3 < pixels.mean() < 0.7
