"""Processes that read images."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import ROOT
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


PRELOADED = """
import os, sys
PID = os.getpid()
def pids():
    return PID, os.getppid()
if __name__ == "__main__":
    from utils.data import workers
    import preloaded
    with workers.pool(1, preload="preloaded") as pool:
        imported, server = pool.submit(preloaded.pids).result(60)
    sys.exit(imported != server)
"""


def test_what_workers_need_is_imported_once_wherever_the_program_is_run(tmp_path: Path) -> None:
    """In the process that they are forked from."""
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "preloaded.py").write_text(PRELOADED)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program" / "preloaded.py")],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
