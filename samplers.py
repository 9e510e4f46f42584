"""Order of the images and their share for each process: shuffling, repeated augmentation, exact evaluation."""

from collections.abc import Iterator, Sized

from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler, Sampler


class SeededRepeatAugSampler(RepeatAugSampler):
    """timm's repeated augmentation, with an order that depends on (seed, epoch), not on the epoch alone as in timm.

    All processes together take about len(dataset) samples per epoch: with 3 repeats a third of the images, three times.
    """

    def __init__(self, dataset: Sized, seed: int, **kwargs):
        super().__init__(dataset, **kwargs)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(self.seed + epoch)  # the sum, as in DistributedSampler


def train_sampler(dataset: Sized, world_size: int, rank: int, seed: int, repeats: int = 1) -> Sampler[int]:
    """Sampler for training; call `set_epoch(epoch)` before each epoch. The order is a function of (seed, epoch) only.

    Args:
        dataset: anything with a length; at least one image.
        repeats: augmented copies of an image in one epoch, on different processes if there are several. 1 is plain
            shuffling; DeiT uses 3.
    Raises: ValueError if repeats < 1.
    Source: Hoffer et al. 2020 (repeated augmentation); timm's RepeatAugSampler, which comes from DeiT.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    if repeats == 1:
        return DistributedSampler(dataset, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
    return SeededRepeatAugSampler(dataset, seed, num_replicas=world_size, rank=rank, num_repeats=repeats)


class ExactEvalBatchSampler(Sampler[list[int]]):
    """Batches for evaluation: the whole batch b, from index b * batch_size on, goes to rank b % world_size.

    Every image occurs exactly once, and the batches are the same for any number of processes, so that sums over the
    batches are, too. Ranks may have different numbers of batches, or none: run the model without the collectives of
    DistributedDataParallel, and sum over ranks at the end.

    Raises: ValueError if batch_size < 1, num_samples < 0 or rank is not in [0, world_size).
    """

    def __init__(self, num_samples: int, batch_size: int, world_size: int = 1, rank: int = 0):
        if batch_size < 1 or num_samples < 0:
            raise ValueError(f"batch_size {batch_size} must be at least 1 and num_samples {num_samples} at least 0")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), not {rank}")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.starts = range(rank * batch_size, num_samples, world_size * batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.starts:
            yield list(range(start, min(start + self.batch_size, self.num_samples)))

    def __len__(self) -> int:
        return len(self.starts)
