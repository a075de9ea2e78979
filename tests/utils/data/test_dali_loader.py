"""DALI against torchvision on JPEG folders: the same batches within decoding, the same accuracy."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests import ROOT
from utils.config.image_size import InputSize
from utils.config.schema import DataConfig
from utils.data.fake import write_folder
from utils.data.loader import Batch, Loader
from utils.data.loaders import Loaders
from utils.data.sources import check_data, open_data
from utils.errors import UserError

try:
    import nvidia.dali  # noqa: F401
except ImportError:
    missing = True
else:
    missing = False
needs_dali = pytest.mark.skipif(missing, reason="NVIDIA's DALI is not installed")


def written(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def torchvision(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    root = tmp_path_factory.mktemp("photographs")
    assert len(list(write_folder(root, samples=64, classes=4, width=100, height=75))) == 64 + 16
    return DataConfig(
        dataset="imagenet",
        root=root,
        num_classes=4,
        input_size=32,
        batch_size=16,
        val_batch_size=6,
        workers=0,
    )


def both(config: DataConfig) -> tuple[Loaders, Loaders]:
    return open_data(config), open_data(replace(config, dataset="dali"))


def levels(loaders: Loaders, left: Batch, right: Batch) -> torch.Tensor:
    """Differences of the pixels of two batches in grey values, of 255."""
    std = torch.tensor(loaders.std).view(-1, 1, 1)
    return (255 * std * (left[0] - right[0])).abs()


def val(loaders: Loaders) -> Loader:
    assert loaders.val is not None
    return loaders.val


@needs_dali
@pytest.mark.parametrize("size", [32, (24, 40)])
def test_batches_are_those_of_torchvision(torchvision: DataConfig, size: InputSize) -> None:
    usual, fast = both(replace(torchvision, input_size=size))
    for left, right in ((usual.train, fast.train), (val(usual), val(fast))):
        for epoch in (0, 3):
            left.set_epoch(epoch)
            right.set_epoch(epoch)
            for one, two in zip(left, right, strict=True):
                assert torch.equal(one[1], two[1])
                difference = levels(usual, one, two)
                assert difference.max() < 8  # chroma at the borders of a crop that is decoded alone
                assert difference.mean() < 0.4
                assert (difference > 2).float().mean() < 0.01


@needs_dali
@pytest.mark.parametrize(
    ("mode", "ending"),
    [
        ("RGB", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "png"), ("RGB", "webp"), ("RGB", "bmp"),
        ("I;16", "png"), ("I;16", "tiff"),
    ],
)  # fmt: skip
def test_other_modes_and_formats_are_as_with_torchvision(tmp_path: Path, mode: str, ending: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((70, 50))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    if mode == "RGBA":  # half transparent: the colours count as they are
        image.putalpha(Image.fromarray(pixels[..., 0]).resize(image.size))
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        for number in range(3):
            image.save(tmp_path / split / "one" / f"{number}.{ending}")
    config = DataConfig(
        dataset="imagenet", root=tmp_path, num_classes=1, input_size=24, batch_size=3, workers=0
    )
    usual, fast = both(config)
    for left, right in ((usual.train, fast.train), (val(usual), val(fast))):
        [one], [two] = left, right
        assert levels(usual, one, two).max() < 4


def accuracy(network: nn.Module, loader: Loader) -> float:
    network.eval()
    with torch.no_grad():
        hits = [(network(images).argmax(1) == target) for images, target in loader]
    return torch.cat(hits).float().mean().item()


def trained(loader: Loader) -> nn.Module:
    """A linear classifier of coarse pixels."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 4))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for epoch in range(8):
        loader.set_epoch(epoch)
        for images, target in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), target).backward()
            optimizer.step()
    return network


@needs_dali
def test_a_trained_network_has_the_same_accuracy_on_both(torchvision: DataConfig) -> None:
    usual, fast = both(torchvision)
    with torch.random.fork_rng():
        networks = trained(usual.train), trained(fast.train)
    scores = [accuracy(network, val(loaders)) for network in networks for loaders in (usual, fast)]
    assert len(set(scores)) == 1
    assert scores[0] > 0.8  # of 0.25 by chance


@needs_dali
def test_threads_change_nothing(torchvision: DataConfig) -> None:
    config = replace(torchvision, dataset="dali")
    one, two = (list(open_data(replace(config, workers=workers)).train) for workers in (1, 3))
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, two, strict=True))


@needs_dali
def test_an_iteration_that_was_given_up_leaves_no_trace(torchvision: DataConfig) -> None:
    loader = open_data(replace(torchvision, dataset="dali")).train
    expected = list(loader)
    for taken in (0, 1, 3):
        begun = iter(loader)
        for _ in range(taken):
            next(begun)
        del begun
        assert all(torch.equal(a, c) for (a, _), (c, _) in zip(expected, loader, strict=True))


@needs_dali
def test_a_format_that_dali_lacks_is_named(torchvision: DataConfig, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / split / "one" / "0.jpg", "GIF")
    config = replace(torchvision, dataset="dali", root=tmp_path, num_classes=1)
    with pytest.raises(UserError, match=r"one/0.jpg \(DALI cannot decode GIF, --dataset imagenet can\)"):
        list(open_data(config).train)


@needs_dali
@pytest.mark.parametrize(
    "data",
    [
        b"P5 40 30 100\n" + bytes(range(100)) * 12,
        b"P3 40 30 255\n" + b"1 2 3 " * 1200,
        written(Image.linear_gradient("L").convert("LA"), "TIFF"),
        written(Image.new("LAB", (40, 30)), "TIFF"),
        written(Image.new("1", (40, 30)), "TIFF"),
        written(Image.new("RGB", (40, 30)), "JPEG2000"),
    ],
)
def test_what_dali_would_decode_otherwise_is_refused(
    torchvision: DataConfig, tmp_path: Path, data: bytes
) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        (tmp_path / split / "one" / "0.jpg").write_bytes(data)
    usual, fast = both(replace(torchvision, root=tmp_path, num_classes=1))
    list(val(usual))
    with pytest.raises(UserError, match=r"DALI cannot decode \w+.*, --dataset imagenet can"):
        list(val(fast))


def test_without_dali_an_error_says_how_to_install_it(
    torchvision: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # how Python itself marks what cannot be imported
    config = replace(torchvision, dataset="dali")
    for function in (check_data, open_data):
        with pytest.raises(UserError, match=r"needs NVIDIA's DALI: pip install nvidia-dali-cuda130"):
            function(config)


def test_a_broken_dali_is_an_error_with_its_reason(torchvision: DataConfig, tmp_path: Path) -> None:
    for name in ("nvidia", "nvidia/dali"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "nvidia" / "dali" / "__init__.py").write_text("raise OSError('libcuda.so: no such file')")
    arguments = f"main.py --dataset dali --root {torchvision.root} --num_classes 4 --input_size 32"
    done = subprocess.run(
        [sys.executable, *arguments.split()], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "cannot be imported (libcuda.so: no such file): pip install nvidia-dali-cuda130" in done.stderr


@needs_dali
def test_its_folders_are_checked(torchvision: DataConfig) -> None:
    with pytest.raises(UserError, match="has 4 classes, not 3: write --num_classes 4"):
        check_data(replace(torchvision, dataset="dali", num_classes=3))
    with pytest.raises(UserError, match="--dataset dali needs --root"):
        check_data(replace(torchvision, dataset="dali", root=None))
