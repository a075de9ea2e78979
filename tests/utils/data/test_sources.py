"""Data sources by name, and the mistakes that are reported before anything is built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from utils.config.schema import DataConfig
from utils.data.sources import check_data, open_data
from utils.errors import UserError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "imagent"}, "--dataset imagent is unknown: choose one of digits, fake, .*imagenet"),
        ({"dataset": "digits", "num_classes": 100}, "digits has 10 classes, not 100: write --num_classes 10"),
        ({"dataset": "cifar10", "num_classes": 100}, "cifar10 has 10 classes, not 100"),
        ({"dataset": "cifar100"}, "cifar100 has 100 classes, not 10: write --num_classes 100"),
        (
            {"dataset": "cifar10", "root": Path("nowhere")},
            "--root nowhere is not a folder: .*cifar-10-batches-py",
        ),
        ({"dataset": "fake", "fake_size": 0}, "--fake_size 0"),
        ({"dataset": "imagenet"}, r"^a folder of images \(--dataset folder or imagenet\) needs --root"),
        (
            {"dataset": "imagenet", "root": Path("nowhere")},
            "--root nowhere is not a folder: .*train/ and val/",
        ),
        (
            {"dataset": "imagenet", "root": Path("x" * 300)},
            "is not a folder|cannot read x+: File name too long",
        ),
        ({"mean": (0.5,)}, "--mean has 1 values: write three"),
        ({"std": (0.5, 0.5, 0.5, 0.5)}, "--std has 4 values: write three"),
        ({"std": (0.5, 0.0, 0.5)}, "--std has the value 0: write numbers above 0"),
        ({"std": (0.5, 1e-46, 0.5)}, "--std has the value 1e-46: write numbers above 0, 1e-06 at the least"),
        ({"std": (0.5, 1e39, 0.5)}, r"--std has the value 1e\+39: write 1e\+06 at the most"),
        ({"mean": (0.5, -1e39, 0.5)}, r"--mean has the value -1e\+39: write 1e\+06 at the most"),
        ({"workers": 100_000}, r"--workers 100000: at most \d+ on a machine of \d+ cores"),
    ],
)
def test_mistakes_are_found_before_anything_is_built(
    change: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = replace(DataConfig(), **change)  # pyright: ignore[reportArgumentType]
    for function in (check_data, open_data):
        with pytest.raises(UserError, match=message):
            function(config)
    assert not any(tmp_path.iterdir())


def test_check_accepts_every_good_source(config: DataConfig) -> None:
    check_data(config)
    check_data(DataConfig(dataset="cifar10"))  # files that are missing will be downloaded
