"""Runs on folders of images: how often these are listed, and what they may lack."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.main.runs import call
from tests.utils.data.helpers import CLASSES, write_folder

NETWORK = "--model resnet20 --width_alpha 0.125 --keyword imagenet,cbas,origin --input_size 32"
FOLDER = f"{NETWORK} --dataset imagenet --root images --num_classes 3 -b 4 -j 0"


def test_class_folders_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "images", train=2, val=1)
    listed: Counter[str] = Counter()
    scandir = os.scandir

    def counted(path: Any = ".") -> Any:
        listed[os.fspath(path)] += 1
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    assert call(f"{FOLDER} --dry_run") == 0
    found = {
        f"{part}/{name}": listed[f"images/{part}/{name}"] for part in ("train", "val") for name in CLASSES
    }
    assert found == dict.fromkeys(found, 1)
