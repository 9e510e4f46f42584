"""From images to batches on the device: workers crop, resize and augment uint8, the device normalises and erases.

A uint8 batch takes a quarter of the memory traffic between workers, host and device that a normalised one would.
"""

from argparse import Namespace
from collections.abc import Iterator

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import Compose, InterpolationMode, RandomCrop, Resize

from utils import UserError

SMALL_INPUT = 32  # pixels; up to this size no random resized crop and no centre crop, as in DeiT


def build_transform(is_train: bool, args: Namespace) -> Compose:
    """PIL image -> (3, input_size, input_size) uint8 tensor: timm's transforms with DeiT's choices.

    Training: random resized crop, flips, --aa policy or 3-Augment (which replaces it), colour jitter (as in timm only
    without a policy or with 3-Augment). Evaluation: resize to input_size / eval_crop_ratio, centre crop. Up to 32
    pixels the whole image is resized, for training with a random crop after 4 pixels of padding.
    Raises: UserError for a policy that timm does not know.
    Source: DeiT (Touvron et al. 2021); 3-Augment and simple random crop (src) from DeiT III (Touvron et al. 2022).
    """
    size = args.input_size
    common = {"input_size": size, "use_prefetcher": True}  # uint8 at the end
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
            mean=tuple(args.mean),
        )  # the colour that rotated and shifted images are filled up with
    except (AssertionError, ValueError) as error:
        raise UserError(f"timm cannot build the training transform with the policy {policy!r} ({error})") from error
    if args.src or size <= SMALL_INPUT:  # in place of the random resized crop, timm's first step
        fixed = args.interpolation if args.train_interpolation == "random" else args.train_interpolation
        transform.transforms[:1] = [
            Resize(size if args.src else (size, size), InterpolationMode(fixed)),
            RandomCrop(size, padding=4, padding_mode="reflect" if args.src else "constant"),
        ]
    for step in transform.transforms:
        for op in [*getattr(step, "ops", ()), *(op for ops in getattr(step, "policy", ()) for op in ops)]:
            if isinstance(op, AugmentOp) and op.name.startswith("Posterize"):
                op.aug_fn = posterize
    return transform


def posterize(image: Image.Image, bits_to_keep: int, **kwargs) -> Image.Image:
    """timm's posterize; at 0 bits a black image, as before Pillow 13, which raises there."""
    return timm_posterize(image, bits_to_keep, **kwargs) if bits_to_keep > 0 else Image.new(image.mode, image.size)


class DeviceLoader(PrefetchLoader):
    """timm's PrefetchLoader: the next batch is copied and normalised on a side stream while this one is used.

    Two gaps of timm before 1.0.30 are closed: a loader without any batch yields none instead of raising, and the
    memory of a batch is not given to a later one before the work queued on it is done.
    """

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if len(self) == 0:
            return
        for batch in super().__iter__():
            if self.is_cuda:
                for tensor in batch:
                    tensor.record_stream(torch.cuda.current_stream(self.device))
            yield batch


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
) -> DeviceLoader:
    """Batches on `device`: images (B, 3, H, W) float32, normalised by args.mean and args.std, and targets (B,) int64.

    Training leaves out a last, smaller batch and, unless args.no_aug, erases random areas after the normalisation
    (Zhong et al. 2017), with the random generators of this process.
    """
    # default_collate, not timm's fast_collate: it stacks into shared memory at once instead of adding to zeros first
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        batch_sampler=batch_sampler,
        drop_last=is_train,
        num_workers=num_workers,
        pin_memory=args.pin_mem and device.type == "cuda",
    )
    return DeviceLoader(
        loader,
        tuple(args.mean),
        tuple(args.std),
        device=device,
        re_mode=args.remode,
        re_prob=args.reprob if is_train and not args.no_aug else 0.0,
        re_count=args.recount,
    )
