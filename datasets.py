"""Registry of data sets. Bad data raises DataError, with one sentence, before any training.

To add a data set, decorate a function (args, download) -> (train, validation), two ImageDatasets, with
@register_dataset. With args.eval it may return the validation set alone.
"""

import hashlib
import json
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from itertools import chain
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch.distributed as dist
import torchvision.datasets as tv
from PIL import Image
from torch.utils.data import Dataset

from images import DataError, load_image
from transforms import build_transform

CHECK_LIMIT = 100_000  # images; larger sets are only checked while they are read
VAL_FOLDERS = ("val", "valid", "validation", "test")
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


class ImageDataset(Dataset):
    """Labelled images in arrays: unlike lists of paths, forked workers share them and pickle copies them quickly.

    images: (n, H, W, 3) uint8, or (n,) file names as bytes, relative to root. targets: (n,) int64.
    classes: one name per class. transform: PIL RGB image -> uint8 tensor, which `build_datasets` sets.
    """

    def __init__(self, images: np.ndarray, targets: Sequence[int], classes: Sequence[str], root: str = ""):
        self.images = images
        self.targets = np.asarray(targets, dtype=np.int64)
        self.classes = list(classes)
        self.root = root
        self.transform = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        item = self.images[index]
        image = load_image(self.root, item) if isinstance(item, bytes) else Image.fromarray(item)
        return image if self.transform is None else self.transform(image), int(self.targets[index])

    def subset(self, size: int | None, seed: int) -> "ImageDataset":
        if size is None:
            return self
        if not 1 <= size <= len(self):
            raise DataError(f"a subset of {size} images was requested from a set of {len(self)}")
        chosen = stratified_indices(self.targets, size, seed)
        return ImageDataset(self.images[chosen], self.targets[chosen], self.classes, self.root)


def stratified_indices(targets: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Sorted indices of `size` samples, a function of (targets, size, seed); class shares are exact to within one.

    The j-th of the n_c shuffled samples of class c has the quota (j + 1/2) / n_c, and the lowest quotas are chosen
    (Sainte-Lague's method). For one seed, a smaller subset is part of a larger one.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(targets))
    order = order[np.argsort(targets[order], kind="stable")]  # one class after another, each of them shuffled
    counts = np.bincount(targets)
    position = np.arange(len(targets)) - np.repeat(np.cumsum(counts) - counts, counts)
    quota = (position + 0.5) / np.repeat(counts, counts)
    return np.sort(order[np.lexsort((rng.random(len(targets)), quota))[:size]])


DATASETS: dict[str, Callable[[Namespace, bool], Sequence[ImageDataset]]] = {}


def register_dataset(*names: str) -> Callable:
    def register(build: Callable) -> Callable:
        for name in names:
            if name in DATASETS:
                raise ValueError(f"data set {name!r} is registered twice")
            DATASETS[name] = build
        return build

    return register


@register_dataset("CIFAR10", "CIFAR100", "CIFAR")  # CIFAR is DeiT's name for CIFAR100.
def cifar(args: Namespace, download: bool):
    source = tv.CIFAR10 if args.data_set == "CIFAR10" else tv.CIFAR100
    parts = _torchvision(source, args, download, f"{source.filename} from {source.url}", True, False)
    return [ImageDataset(part.data, part.targets, part.classes) for part in parts]


@register_dataset("SVHN", "STL10")
def svhn_and_stl10(args: Namespace, download: bool):
    source, files = tv.STL10, f"{tv.STL10.filename} from {tv.STL10.url}"
    if args.data_set == "SVHN":
        source = tv.SVHN
        files = " and ".join(source.split_list[split][0] for split in ("train", "test"))
    parts = _torchvision(source, args, download, files, "train", "test")
    classes = getattr(parts[0], "classes", list("0123456789"))
    return [ImageDataset(part.data.transpose(0, 2, 3, 1), part.labels, classes) for part in parts]


@register_dataset("Flowers102")
def flowers102(args: Namespace, download: bool):
    """Training on the train and val splits together (2,040 images), as usual in fine-tuning; 6,149 test images."""
    files = (
        "a folder flowers-102 with 102flowers.tgz, imagelabels.mat and setid.mat from "
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
    )
    splits = _torchvision(tv.Flowers102, args, download, files, "train", "val", "test")
    classes = getattr(tv.Flowers102, "classes", [str(c) for c in range(102)])  # Older torchvision has no names.

    def join(*parts) -> ImageDataset:  # torchvision has no public attributes for files and labels.
        names = [os.fsencode(os.path.relpath(file, args.data_path)) for part in parts for file in part._image_files]
        return ImageDataset(np.array(names), [c for part in parts for c in part._labels], classes, str(args.data_path))

    return [join(*part) for part in (splits[:-1], splits[-1:]) if part]


def _torchvision(source: type, args: Namespace, download: bool, files: str, *splits) -> list:
    """The splits of a data set of torchvision; with args.eval only the last one, for validation."""
    try:
        return [source(args.data_path, split, download=download) for split in splits[-1 if args.eval else 0 :]]
    except (OSError, RuntimeError, HTTPException) as error:
        raise DataError(
            f"{args.data_set} is not complete in {args.data_path} and could not be downloaded ({error}): "
            f"put {files} into {args.data_path}"
        ) from error


@register_dataset("DIGITS")
def digits(args: Namespace, download: bool):
    """scikit-learn's 1,797 scanned 8x8 digits, without download: 1,500 for training, 297 for validation."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    grey = np.round(source.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), from 0..16
    images = np.repeat(grey[..., None], 3, axis=-1)
    parts = train_test_split(images, source.target, train_size=1500, stratify=source.target, random_state=0)
    return [ImageDataset(part, targets, list("0123456789")) for part, targets in zip(parts[:2], parts[2:])]


@register_dataset("IMNET")
def image_folders(args: Namespace, download: bool):
    """Any tree train/<class>/*.jpg and val/<class>/*.jpg, such as ImageNet; its folders are the classes.

    With args.eval train is not read, and a tree <class>/*.jpg is enough.
    """
    root = str(args.data_path)
    if not os.path.isdir(root):
        raise DataError(f"the data folder {root} does not exist")
    has_train = os.path.isdir(os.path.join(root, "train"))
    if not has_train and not args.eval:
        raise DataError(f"{root} has no folder named train")
    val_folder = next((name for name in VAL_FOLDERS if os.path.isdir(os.path.join(root, name))), None)
    if val_folder is None:
        missing = f"{root} has no validation folder: looked for {', '.join(VAL_FOLDERS)}"
        if has_train:
            raise DataError(missing)
        try:
            return [_image_folder(root, "")]
        except DataError as error:
            raise DataError(f"{missing}; {error}") from error
    if args.eval:
        return [_image_folder(root, val_folder)]
    train, val = _image_folder(root, "train"), _image_folder(root, val_folder)
    extra = {"train": {*train.classes} - {*val.classes}, val_folder: {*val.classes} - {*train.classes}}
    if any(extra.values()):
        differences = "; ".join(f"only in {folder}: {_some(sorted(names))}" for folder, names in extra.items() if names)
        raise DataError(f"{root}: train and {val_folder} have different classes, {differences}")
    return train, val


def _image_folder(root: str, folder: str) -> ImageDataset:
    path = str(Path(root, folder))
    try:
        tree = tv.ImageFolder(path, allow_empty=True)
    except OSError as error:
        raise DataError(f"{path} has no class folders that can be read ({error})") from error
    filled = set(tree.targets)
    empty = [os.path.join(path, name) for name, label in tree.class_to_idx.items() if label not in filled]
    if empty:
        raise DataError(f"class folders without any image ({', '.join(tree.extensions)}): {_some(empty)}")
    names = np.array([os.fsencode(os.path.relpath(file, root)) for file, _ in tree.samples])
    return ImageDataset(names, tree.targets, tree.classes, root)


@register_dataset("INAT", "INAT19")
def inaturalist(args: Namespace, download: bool):
    """iNaturalist 2018 and 2019; args.inat_category says what the classes are, such as genera.

    Classes are numbered in the order in which the training annotations first name them, as in DeiT.
    """
    root, year = str(args.data_path), 2018 if args.data_set == "INAT" else 2019

    def part(images: list[dict]) -> ImageDataset:
        paths = [image["file_name"].split("/") for image in images]  # train_val2018, Aves, 2820, <file>
        found = [values[int(category)] for _, _, category, _ in paths]
        unseen = sorted(set(found) - set(labels))
        if unseen:
            raise DataError(
                f"{root} has images of a {args.inat_category} that train{year}.json has no annotation of: "
                f"{_some(unseen)}"
            )
        if not os.path.isdir(os.path.join(root, *paths[0][:2])):  # DeiT's layout leaves out the second folder.
            paths = [[folder, category, file] for folder, _, category, file in paths]
        names = np.array([os.fsencode(os.path.join(*path)) for path in paths])
        return ImageDataset(names, [labels[value] for value in found], list(labels), root)

    with _inat_json(root, "categories.json") as categories:
        values = dict(enumerate(str(category[args.inat_category]) for category in categories))
    with _inat_json(root, f"train{year}.json") as train:
        named = dict.fromkeys(values[int(annotation["category_id"])] for annotation in train["annotations"])
        labels = {value: label for label, value in enumerate(named)}
        parts = [] if args.eval else [part(train["images"])]
    with _inat_json(root, f"val{year}.json") as val:
        return [*parts, part(val["images"])]


@contextmanager
def _inat_json(root: str, name: str) -> Iterator:
    """The content of a JSON file; an error from reading it or from its structure becomes a DataError with its name."""
    path = os.path.join(root, name)
    try:
        with open(path, encoding="utf-8") as file:
            yield json.load(file)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read as an iNaturalist file ({type(error).__name__}: {error})") from error


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def build_datasets(
    args: Namespace, rank: int = 0, world_size: int = 1
) -> tuple[ImageDataset | None, ImageDataset, list[str]]:
    """Training set, validation set and class names of `args.data_set`, with transforms, subsets and checks applied.

    With args.eval the training set is None and its data may be missing.
    In distributed runs every rank calls this function: rank 0 goes first and downloads; if one rank fails, all raise.
    Raises: DataError; UserError for an augmentation policy that timm does not know.
    """
    if args.data_set not in DATASETS:
        raise DataError(f"unknown data set {args.data_set!r}: there are {', '.join(sorted(DATASETS))}")
    for my_turn in (rank == 0, rank != 0):
        faults = []
        if my_turn:
            try:
                if os.path.isfile(args.data_path or ""):
                    raise DataError(f"the data path {args.data_path} is a file, not a folder")
                *train, val = DATASETS[args.data_set](args, rank == 0)
                train = None if args.eval else train[0].subset(args.train_subset, args.seed)
                val = val.subset(args.val_subset, args.seed)
            except DataError as error:
                faults = [error]
        raise_on_all_ranks(faults)
    parts = [val] if train is None else [train, val]
    for part in parts:
        part.transform = build_transform(part is train, args)
    check_images(parts, args.check_images, rank, world_size)
    return train, val, parts[0].classes


def raise_on_all_ranks(errors: list[DataError]) -> None:
    """Raise the same DataError on every rank if any rank has an error, so that no rank waits for one that stopped."""
    gathered = [[str(error) for error in errors]]
    if dist.is_initialized():
        gathered *= dist.get_world_size()
        dist.all_gather_object(gathered, gathered[0])
    if any(gathered):
        raise DataError(_some(list(dict.fromkeys(chain(*gathered))))) from (errors[0] if errors else None)


def check_images(parts: Sequence[ImageDataset], mode: str, rank: int, world_size: int) -> None:
    """Decode every image file, split over ranks and threads, and raise one DataError that names the unreadable files.

    mode: auto (at most CHECK_LIMIT images, and again only when a file changes), all, off.
    """
    parts = [part for part in parts if part.images.dtype.kind == "S"]  # file names, not pixels
    count = sum(len(part) for part in parts)
    if count == 0 or mode == "off" or (mode == "auto" and count > CHECK_LIMIT):
        return
    files = [(part.root, name) for part in parts for name in part.images]
    stamp = _check_stamp(files)
    bad = []
    if mode == "all" or stamp is None or not stamp.exists():
        with ThreadPool(8) as pool:  # Decoding releases the GIL.
            faults = pool.imap(_fault, files[rank::world_size], chunksize=64)
            bad = sorted(filter(None, faults), key=str)
    raise_on_all_ranks(bad)
    if stamp is not None and (world_size == 1 or dist.is_initialized()):  # else other ranks may have errors
        with suppress(OSError):  # Without a cache, the next start checks again.
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()


def _fault(file: tuple[str, bytes]) -> DataError | None:
    try:
        load_image(*file)
    except DataError as error:
        return error
    return None


def _check_stamp(files: list[tuple[str, bytes]]) -> Path | None:
    """Empty file that marks these files as checked; its name is a hash of all names, sizes and modification times."""
    digest = hashlib.sha256()
    try:
        for root, name in files:
            status = os.stat(os.path.join(os.fsencode(root), name))
            digest.update(b"%s\0%d\0%d\n" % (name, status.st_size, status.st_mtime_ns))
    except OSError:  # a broken link
        return None
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "kan-vit", "checked-images", digest.hexdigest())
