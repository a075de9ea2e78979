"""Processes that read images."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import pytest
import torch

from tests.utils.data.helpers import read, same, validation
from utils.config.schema import DataConfig
from utils.data.sources import open_data
from utils.errors import TrainingError, UserError


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_imagenet_workers_change_nothing(imagenet: DataConfig, workers: int) -> None:
    alone, helped = open_data(imagenet), open_data(replace(imagenet, workers=workers))
    for epoch in (0, 1):
        assert same(read(alone.train, epoch), read(helped.train, epoch))
    assert same(read(alone.train, 1, position=2), read(helped.train, 1, position=2))
    # An iteration that was given up leaves no trace, though its batches were on their way.
    helped.train.set_epoch(4)
    next(iter(helped.train))
    assert same(read(alone.train, 2), read(helped.train, 2))
    assert same(read(validation(alone)), read(validation(helped)))


def test_there_are_no_more_workers_than_batches(imagenet: DataConfig) -> None:
    """Nor does torch warn of many."""
    children = set(multiprocessing.active_children())
    loader = open_data(replace(imagenet, workers=30)).train
    assert same(read(loader), read(open_data(imagenet).train))
    assert len(set(multiprocessing.active_children()) - children) == len(loader) == 4


def test_a_worker_that_is_killed_ends_the_run_with_a_line(imagenet: DataConfig) -> None:
    """As by the system when memory runs out."""
    children = set(multiprocessing.active_children())
    batches = iter(open_data(replace(imagenet, workers=1, batch_size=2)).train)
    next(batches)
    [worker] = set(multiprocessing.active_children()) - children
    worker.kill()
    with pytest.raises(TrainingError, match=r"a process that reads images was ended, .* fewer --workers"):
        list(batches)


@pytest.mark.parametrize(("dataset", "workers"), [("imagenet", 0), ("imagenet", 1), ("dali", 1)])
def test_batches_keep_their_images(imagenet: DataConfig, dataset: str, workers: int) -> None:
    """Images are read into memory that is used again, which must not change the batches made of them."""
    loader = open_data(replace(imagenet, dataset=dataset, workers=workers, batch_size=2)).train
    pairs = [(images, images.clone()) for _ in range(2) for images, _ in loader]
    assert len(pairs) == 18
    assert all(torch.equal(images, copy) for images, copy in pairs)


def test_a_lack_of_shared_memory_says_what_to_write(imagenet: DataConfig) -> None:
    loader = open_data(replace(imagenet, workers=1, input_size=10**7)).train
    with pytest.raises(UserError, match=r"1 workers need \d+ MiB of shared memory .* write fewer --workers"):
        next(iter(loader))
