"""A folder of images, and a configuration of every source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.utils.data.helpers import DIGITS, FAKE, write_folder
from utils.config.schema import DataConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imagenet")
    write_folder(root, train=6, val=3)
    return root


@pytest.fixture(scope="module")
def imagenet(folder: Path) -> DataConfig:
    return DataConfig(
        dataset="imagenet",
        root=folder,
        num_classes=3,
        input_size=16,
        batch_size=4,
        val_batch_size=4,
        workers=0,
    )


@pytest.fixture
def dali(imagenet: DataConfig) -> DataConfig:
    pytest.importorskip("nvidia.dali", reason="NVIDIA's DALI is not installed")
    return replace(imagenet, dataset="dali")


@pytest.fixture(params=["digits", "fake", "imagenet", "dali"])
def config(request: pytest.FixtureRequest, imagenet: DataConfig) -> DataConfig:
    if request.param == "dali":
        return request.getfixturevalue("dali")
    return {"digits": DIGITS, "fake": FAKE, "imagenet": imagenet}[request.param]
