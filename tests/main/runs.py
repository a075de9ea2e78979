"""Small runs of the program, and what they have left."""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import main
from utils.checkpoint.archive import read as read_checkpoint

TINY = "--dataset fake --width_alpha 0.125 --input_size 16 -b 8 --fake_size 32 --lr 0.05 --lr_policy sgdr"
FP = f"{TINY} --keyword cifar10,cbas,origin"
LSQ = f"{TINY} --keyword cifar10,cbas,origin,dorefa,lsq --fm_enable --wt_enable --fm_bit 2 --wt_bit 2"
TIMES = {"seconds", "images_per_second", "data_wait"}  # columns that no two runs share


def call(line: str) -> int:
    """Run the program in this process and folder; returns its exit status."""
    return main.main(line.split())


def done_in(folder: Path, *lines: str) -> Path:
    """Run the program in a folder, for each line; returns the folder."""
    with contextlib.chdir(folder):
        for line in lines:
            assert call(line) == 0
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoint(folder: Path, case: str, kind: str = "checkpoint") -> dict[str, Any]:
    """A checkpoint of a case, by default the latest."""
    return read_checkpoint(folder / "weights" / "resnet20" / f"{case}-{kind}.pth.tar")


def metrics(folder: Path, case: str) -> list[dict[str, str]]:
    """The rows of a run's metrics file, as they are written."""
    with (folder / "exp" / case / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def summary(folder: Path, case: str) -> dict[str, Any]:
    """What a run says of itself."""
    return json.loads((folder / "exp" / case / "summary.json").read_text(encoding="utf-8"))


def log_of(folder: Path, case: str) -> str:
    """The log of a case."""
    return (folder / "exp" / case / "log.txt").read_text(encoding="utf-8")


def assert_same(one: Any, two: Any, where: str = "") -> None:
    """Nested containers are equal, tensors bit by bit."""
    if isinstance(one, Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for name in one:
            assert_same(one[name], two[name], f"{where}.{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert one == two, where


def assert_same_run(one: tuple[Path, str], two: tuple[Path, str]) -> None:
    """Two runs ended with the same bits and wrote the same metrics but for the times."""
    first, second = checkpoint(*one), checkpoint(*two)
    for name in (
        "state_dict",
        "optimizer",
        "epoch",
        "best_acc",
        "learning_rate",
        "scheduler",
        "random",
        "sums",
    ):
        assert_same(first[name], second[name], name)
    rows, others = metrics(*one), metrics(*two)
    assert [{k: v for k, v in row.items() if k not in TIMES} for row in rows] == [
        {k: v for k, v in row.items() if k not in TIMES} for row in others
    ]
