"""From images to batches on the device: workers crop, resize and augment uint8; the device normalises and erases.

A uint8 batch needs a quarter of the memory traffic of a normalised one between workers, host and device.
"""

from argparse import Namespace

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import Compose, InterpolationMode, RandomCrop, Resize

from models.timm_internals import replace_crop, replace_operation
from stopping import outlive_signals
from utils import UserError

SMALL_INPUT = 32  # pixels; up to this size there is no random resized crop and no centre crop, as in DeiT


def build_transform(is_train: bool, args: Namespace) -> Compose:
    """PIL image -> (3, input_size, input_size) uint8 tensor: timm's transforms with DeiT's choices.

    Training: random resized crop, flips, --aa policy or 3-Augment instead; colour jitter only without a policy or with
    3-Augment, as in timm. Evaluation: resize to input_size / eval_crop_ratio, centre crop. Up to 32 pixels the whole
    image is resized, and training crops it at random after 4 pixels of padding.
    Raises: UserError for a policy that timm does not know.
    Source: DeiT (Touvron et al. 2021); 3-Augment and simple random crop (src) from DeiT III (Touvron et al. 2022).
    """
    size = args.input_size
    common = {"input_size": size, "use_prefetcher": True}  # With the prefetcher the result is uint8.
    if not is_train or args.no_aug:
        if size <= SMALL_INPUT:
            return create_transform(**common, interpolation=args.interpolation, crop_pct=1.0, crop_mode="squash")
        return create_transform(
            **common,
            is_training=is_train,
            no_aug=is_train,
            crop_pct=args.eval_crop_ratio,
            interpolation=args.train_interpolation if is_train else args.interpolation,
        )

    policy = "3a" if args.three_augment else args.aa or "none"
    default_hflip = 0.0 if args.data_set == "DIGITS" else 0.5
    try:
        transform = create_transform(
            **common,
            is_training=True,
            scale=args.scale,
            ratio=args.ratio,
            vflip=args.vflip,
            hflip=default_hflip if args.hflip is None else args.hflip,
            interpolation=args.train_interpolation,
            color_jitter=args.color_jitter or None,
            auto_augment=None if policy.lower() == "none" else policy,
            mean=tuple(args.mean),  # fills the empty parts of rotated and shifted images
        )
    except (AssertionError, ValueError) as error:
        raise UserError(f"timm cannot build the training transform with the policy {policy!r} ({error})") from error
    if args.src or size <= SMALL_INPUT:
        fixed = args.interpolation if args.train_interpolation == "random" else args.train_interpolation
        resize = Resize(size if args.src else (size, size), InterpolationMode(fixed))
        crop = RandomCrop(size, padding=4, padding_mode="reflect" if args.src else "constant")
        replace_crop(transform, [resize, crop])
    replace_operation(transform, "Posterize", posterize)
    return transform


def posterize(image: Image.Image, bits_to_keep: int, **kwargs) -> Image.Image:
    """timm's posterize; with 0 bits a black image, as before Pillow 13, which raises ValueError."""
    return timm_posterize(image, bits_to_keep, **kwargs) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def build_loader(
    dataset: Dataset,
    args: Namespace,
    device: torch.device,
    num_workers: int,
    *,
    is_train: bool,
    sampler: Sampler | None = None,
    batch_size: int = 1,
    batch_sampler: Sampler | None = None,
) -> PrefetchLoader:
    """Batches on `device`: images (B, 3, H, W) float32, normalised by args.mean and args.std, and targets (B,) int64.

    timm's PrefetchLoader copies and normalises the next batch on a side stream while the current one is in use.
    Training drops a last, smaller batch and, unless args.no_aug, erases random areas after the normalisation (Zhong et
    al. 2017), with the random generators of this process.
    """
    # default_collate stacks into shared memory; timm's fast_collate would first fill it with zeros.
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        batch_sampler=batch_sampler,
        drop_last=is_train,
        num_workers=num_workers,
        pin_memory=args.pin_mem and device.type == "cuda",
        worker_init_fn=outlive_signals,
    )
    return PrefetchLoader(
        loader,
        tuple(args.mean),
        tuple(args.std),
        device=device,
        re_mode=args.remode,
        re_prob=args.reprob if is_train and not args.no_aug else 0.0,
        re_count=args.recount,
    )
