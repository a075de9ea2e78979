"""A folder of images, and a configuration of every source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.utils.data.helpers import DIGITS, FAKE, write_folder
from utils.config.schema import DataConfig
from utils.data.shards.origin import open_origin
from utils.data.shards.write import write_set


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
def installed() -> None:
    """Skip the test where DALI is not installed."""
    pytest.importorskip("nvidia.dali", reason="NVIDIA's DALI is not installed")


@pytest.fixture(autouse=True)
def installed_where_named(request: pytest.FixtureRequest) -> None:
    """Of tests that several data sets go through, those of DALI need it."""
    call = getattr(request.node, "callspec", None)
    if call is not None and call.params.get("dataset") == "dali":
        request.getfixturevalue("installed")


@pytest.fixture
def dali(imagenet: DataConfig, installed: None) -> DataConfig:
    return replace(imagenet, dataset="dali")


@pytest.fixture(scope="module")
def shards(imagenet: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """The same images in tar files, as make-shards writes them."""
    root = tmp_path_factory.mktemp("shards")
    assert imagenet.root is not None
    write_set(open_origin(imagenet.root), root, per_shard=7, reduction=None, threads=2, force=False)
    return replace(imagenet, dataset="shards", root=root)


@pytest.fixture(params=["digits", "fake", "imagenet", "shards", "dali"])
def config(request: pytest.FixtureRequest, imagenet: DataConfig) -> DataConfig:
    if request.param in ("shards", "dali"):
        return request.getfixturevalue(request.param)
    return {"digits": DIGITS, "fake": FAKE, "imagenet": imagenet}[request.param]
