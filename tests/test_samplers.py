"""Samplers: every evaluation image exactly once, training order a function of (seed, epoch) only."""

import pytest
from torch.utils.data import DataLoader

from samplers import ExactEvalBatchSampler, train_sampler


def epoch_order(n, world_size=1, rank=0, seed=0, repeats=1, epoch=0):
    sampler = train_sampler(range(n), world_size, rank, seed, repeats)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("num_samples", [0, 1, 7, 64, 297, 1000])
@pytest.mark.parametrize("batch_size", [1, 8, 50, 2000])
def test_evaluation_sees_every_image_once(num_samples, batch_size, world_size):
    ranks = [ExactEvalBatchSampler(num_samples, batch_size, world_size, rank) for rank in range(world_size)]
    batches = [list(sampler) for sampler in ranks]
    assert [len(sampler) for sampler in ranks] == [len(share) for share in batches]
    assert sorted(i for share in batches for batch in share for i in batch) == list(range(num_samples))


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_evaluation_batches_do_not_depend_on_the_number_of_processes(world_size):
    alone = list(ExactEvalBatchSampler(297, 32))
    ranks = [list(ExactEvalBatchSampler(297, 32, world_size, rank)) for rank in range(world_size)]
    assert [ranks[b % world_size][b // world_size] for b in range(len(alone))] == alone
    assert [len(batch) for batch in alone] == [32] * 9 + [9]


def test_evaluation_rank_without_a_batch_is_empty():
    sampler = ExactEvalBatchSampler(10, 8, world_size=3, rank=2)
    assert len(sampler) == 0 and list(sampler) == []


def test_evaluation_sampler_drives_a_loader_twice():
    loader = DataLoader(range(10), batch_sampler=ExactEvalBatchSampler(10, 4, world_size=2, rank=0))
    for _ in range(2):
        assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [8, 9]]
    assert len(loader) == 2


@pytest.mark.parametrize("arguments", [(10, 0, 1, 0), (-1, 4, 1, 0), (10, 4, 2, 2), (10, 4, 2, -1), (10, 4, 0, 0)])
def test_evaluation_sampler_rejects_bad_arguments(arguments):
    with pytest.raises(ValueError, match="must be"):
        ExactEvalBatchSampler(*arguments)


@pytest.mark.parametrize("repeats", [1, 3])
def test_train_order_is_a_function_of_seed_and_epoch(repeats):
    order = epoch_order(300, seed=5, repeats=repeats, epoch=2)
    assert order == epoch_order(300, seed=5, repeats=repeats, epoch=2)
    assert order != epoch_order(300, seed=5, repeats=repeats, epoch=3)
    assert order != epoch_order(300, seed=6, repeats=repeats, epoch=2)
    sampler = train_sampler(range(300), 1, 0, seed=5, repeats=repeats)
    for epoch in (0, 1):  # A resumed run skips these epochs.
        sampler.set_epoch(epoch)
        list(sampler)
    sampler.set_epoch(2)
    assert list(sampler) == order


@pytest.mark.parametrize("repeats", [1, 3])
def test_first_epoch_depends_on_the_seed_without_set_epoch(repeats):
    first, second = (list(train_sampler(range(300), 1, 0, seed, repeats)) for seed in (1, 2))
    assert first != second


def test_plain_training_epoch_is_a_permutation_split_over_ranks():
    assert sorted(epoch_order(100)) == list(range(100))
    ranks = [epoch_order(100, world_size=4, rank=rank) for rank in range(4)]
    assert sorted(i for share in ranks for i in share) == list(range(100))


def test_repeated_augmentation_takes_each_image_three_times():
    order = epoch_order(768, repeats=3)
    assert len(order) == 768
    assert all(order[i] == order[i + 1] == order[i + 2] for i in range(0, 768, 3))
    assert len(set(order)) == 256
    ranks = [epoch_order(768, world_size=3, rank=rank, repeats=3) for rank in range(3)]
    assert ranks[0] == ranks[1] == ranks[2]  # one copy of each image per process
    assert len(ranks[0]) == len(set(ranks[0])) == 256


@pytest.mark.parametrize("n", [1, 2, 100, 255, 256, 257])
@pytest.mark.parametrize("world_size", [1, 2])
def test_repeated_augmentation_is_never_empty(n, world_size):
    order = epoch_order(n, world_size=world_size, repeats=3)
    assert len(order) == len(train_sampler(range(n), world_size, 0, 0, repeats=3))
    assert len(order) >= max(1, min(n, 256) // world_size)
    assert set(order) <= set(range(n))


def test_repeats_below_one_raise():
    with pytest.raises(ValueError, match="at least 1"):
        train_sampler(range(10), 1, 0, seed=0, repeats=0)
