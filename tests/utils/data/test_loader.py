"""The contract that the loaders of every source keep, and the shares of several processes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.utils.data.helpers import DIGITS, FAKE, pixels, read, same, validation
from utils.config.schema import DataConfig
from utils.data.loader import epoch_order
from utils.data.loaders import Loaders
from utils.data.sources import open_data
from utils.errors import UserError

# ---- the contract


@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_every_batch_has_the_promised_form(config: DataConfig, size: tuple[int, int]) -> None:
    loaders = open_data(replace(config, input_size=size))
    for loader in (loaders.train, validation(loaders)):
        batches = read(loader)
        assert len(batches) == len(loader)
        for images, target in batches:
            assert images.shape == (len(target), 3, *size)
            assert images.dtype == torch.float32
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert target.dtype == torch.int64
            assert set(target.tolist()) <= set(range(config.num_classes))
    assert loaders.num_classes == config.num_classes


def test_two_builds_deliver_the_same(config: DataConfig) -> None:
    one, two = open_data(config), open_data(config)
    assert same(read(one.train, 1), read(two.train, 1))
    assert same(read(validation(one)), read(validation(two)))


def test_another_seed_changes_training_only(config: DataConfig) -> None:
    one, two = open_data(config), open_data(replace(config, seed=1))
    assert not same(read(one.train), read(two.train))
    assert same(read(validation(one)), read(validation(two)))


def test_every_epoch_has_its_own_order(config: DataConfig) -> None:
    loaders = open_data(config)
    first, second = read(loaders.train, 0), read(loaders.train, 1)
    assert not torch.equal(torch.cat([t for _, t in first]), torch.cat([t for _, t in second]))
    assert same(read(validation(loaders), 0), read(validation(loaders), 1))


@pytest.mark.parametrize("change", [{}, {"mixup_alpha": 0.4, "cutmix_alpha": 1.0, "colour": True}])
def test_resuming_continues_with_the_same_batches(config: DataConfig, change: dict[str, float]) -> None:
    config = replace(config, **change)
    loader = open_data(config).train
    for epoch in range(2):  # a history that the resumed loader does not have
        read(loader, epoch)
    whole = read(loader, 2)
    resumed = open_data(config).train
    assert same(read(resumed, 2, position=2), whole[2:])
    resumed.set_epoch(2)
    assert same(list(resumed), whole)  # the position held for one iteration only


def test_position_at_the_end_leaves_nothing_and_beyond_is_refused() -> None:
    loader = open_data(FAKE).train
    assert read(loader, 0, position=len(loader)) == []
    for position in (-1, len(loader) + 1):
        with pytest.raises(ValueError, match=f"position {position} .* {len(loader)} batches"):
            loader.set_position(position)


def test_epoch_and_position_are_taken_when_the_iteration_begins() -> None:
    loader = open_data(DIGITS).train
    expected = read(loader, 0, position=3)
    loader.set_epoch(0)
    loader.set_position(3)
    begun = iter(loader)
    loader.set_epoch(1)
    assert same(list(begun), expected)


def test_global_random_state_is_neither_used_nor_changed(config: DataConfig) -> None:
    torch.manual_seed(1)
    one = read(open_data(config).train)
    torch.manual_seed(2)
    before, before_numpy = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"]
    two = read(open_data(config).train)
    assert same(one, two)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], before_numpy)


def test_a_sample_is_augmented_alike_in_every_batch_size(config: DataConfig) -> None:
    one = read(open_data(config).train, 3)
    two = read(open_data(replace(config, batch_size=2)).train, 3)
    images, target = (torch.cat(parts) for parts in zip(*one, strict=True))
    other_images, other_target = (torch.cat(parts) for parts in zip(*two, strict=True))
    assert torch.equal(images, other_images[: len(images)])
    assert torch.equal(target, other_target[: len(target)])


@pytest.mark.parametrize(
    ("samples", "batch", "train_sizes", "val_samples", "val_sizes"),
    [
        (50, 12, [12] * 4, 12, [12]),  # the incomplete fifth batch is left out
        (48, 12, [12] * 4, 12, [12]),
        (7, 12, [7], 1, [1]),  # the only batch is used, incomplete as it is
        (12, 12, [12], 3, [3]),
        (13, 12, [12], 3, [3]),
        (56, 4, [4] * 14, 14, [4, 4, 4, 2]),
        (2, 1, [1, 1], 1, [1]),
    ],
)
def test_incomplete_batches(
    samples: int, batch: int, train_sizes: list[int], val_samples: int, val_sizes: list[int]
) -> None:
    loaders = open_data(replace(FAKE, fake_size=samples, batch_size=batch, val_batch_size=batch))
    for loader, count, sizes in (
        (loaders.train, samples, train_sizes),
        (validation(loaders), val_samples, val_sizes),
    ):
        assert loader.samples == count
        assert len(loader) == len(sizes)
        assert [len(target) for _, target in loader] == sizes


# ---- shards


def parts(config: DataConfig, world_size: int) -> list[Loaders]:
    """What each process of a distributed run gets."""
    return [open_data(replace(config, rank=rank, world_size=world_size)) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_training_batches_are_parts_of_the_batches_of_one_process(
    config: DataConfig, world_size: int
) -> None:
    config = replace(config, batch_size=2)
    whole = open_data(replace(config, batch_size=2 * world_size)).train
    shards = [loaders.train for loaders in parts(config, world_size)]
    assert {len(shard) for shard in shards} == {len(whole)}
    assert {shard.samples for shard in shards} == {whole.samples}
    for batch, *pieces in zip(read(whole, 1), *(read(shard, 1) for shard in shards), strict=True):
        images, target = (torch.cat(part) for part in zip(*pieces, strict=True))
        assert torch.equal(images, batch[0])
        assert torch.equal(target, batch[1])
        assert [len(piece[1]) for piece in pieces] == [2] * world_size


@pytest.mark.parametrize("samples", [1, 2, 5, 11, 12, 13, 17, 24, 25])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_validation_shards_hold_every_image_once(samples: int, world_size: int) -> None:
    config = replace(FAKE, fake_size=4 * samples, val_batch_size=4)
    whole = torch.cat([images for images, _ in validation(open_data(config))])
    read_parts = [read(validation(loaders)) for loaders in parts(config, world_size)]
    for part, loaders in zip(read_parts, parts(config, world_size), strict=True):
        assert len(part) == len(validation(loaders))
        assert all(0 < len(target) <= 4 for _, target in part)
    assert max(map(len, read_parts)) - min(map(len, read_parts)) <= 1
    pieces = [images for part in read_parts for images, _ in part]
    found = {image.numpy().tobytes() for piece in pieces for image in piece}
    assert len(found) == sum(map(len, pieces)) == samples
    assert found == {image.numpy().tobytes() for image in whole}


def test_an_only_batch_of_training_is_shared_by_all(config: DataConfig) -> None:
    config = replace(config, batch_size=2000)
    shards = [read(loaders.train) for loaders in parts(config, 3)]
    assert [len(shard) for shard in shards] == [1, 1, 1]
    sizes = [len(shard[0][1]) for shard in shards]
    assert sum(sizes) == open_data(config).train.samples
    assert max(sizes) - min(sizes) <= 1


def test_a_shard_resumes_where_it_was(config: DataConfig) -> None:
    config = replace(config, batch_size=2, rank=1, world_size=2)
    assert same(read(open_data(config).train, 2, position=1), read(open_data(config).train, 2)[1:])


def test_more_processes_than_images_are_refused() -> None:
    with pytest.raises(UserError, match="5 processes cannot share 4 training images: start fewer"):
        open_data(replace(FAKE, fake_size=4, rank=1, world_size=5))
    for rank, world_size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"no process {rank} of {world_size}"):
            open_data(replace(FAKE, rank=rank, world_size=world_size))


def test_no_validation_when_its_batch_is_zero(config: DataConfig) -> None:
    assert open_data(replace(config, val_batch_size=0)).val is None


def test_epoch_order_is_a_permutation_of_its_own() -> None:
    orders = {
        tuple(epoch_order(20, seed, epoch).tolist()) for seed in (-1, 0, 1, 2**40) for epoch in range(5)
    }
    assert len(orders) == 20
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert torch.equal(epoch_order(20, 3, 4), epoch_order(20, 3, 4))


@pytest.mark.parametrize(("mean", "std"), [((0.1, 0.2, 0.3), None), (None, (0.5, 1.0, 2.0))])
def test_own_mean_and_std_win(
    config: DataConfig, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> None:
    usual, own = open_data(config), open_data(replace(config, mean=mean, std=std))
    assert own.mean == (mean or usual.mean)
    assert own.std == (std or usual.std)
    expected, actual = (pixels(next(iter(validation(x)))[0], x) for x in (usual, own))
    np.testing.assert_allclose(actual, expected, atol=1e-3)


# ---- on the GPU


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_batches_of_the_gpu_are_those_of_the_cpu(config: DataConfig) -> None:
    config = replace(config, colour=True, mixup_alpha=0.4, workers=2)
    here, there = open_data(config), open_data(config, torch.device("cuda", 0))
    for left, right in ((here.train, there.train), (validation(here), validation(there))):
        for (images, target), (other, labels) in zip(read(left, 1), read(right, 1), strict=True):
            assert other.is_cuda and labels.is_cuda
            assert other.is_contiguous(memory_format=torch.channels_last)
            # DALI decodes on the GPU there, with rounding of its own.
            tolerance = (
                {"atol": 0.2, "rtol": 0.0} if config.dataset == "dali" else {"atol": 1e-3, "rtol": 1e-3}
            )
            torch.testing.assert_close(other.cpu(), images, **tolerance)
            torch.testing.assert_close(labels.cpu(), target)


@pytest.mark.gpu
@needs_gpu
def test_a_batch_stays_whole_while_the_next_ones_are_prepared() -> None:
    device = torch.device("cuda", 0)
    config = replace(FAKE, fake_size=400)
    expected = [images.sum().item() for images, _ in open_data(config).train]
    sums = []
    for images, _ in open_data(config, device).train:
        torch.cuda._sleep(10_000_000)  # the device is behind the host, as in training
        sums.append(images.sum())
    assert [value.item() for value in sums] == pytest.approx(expected, rel=1e-3, abs=1)
