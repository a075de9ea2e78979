"""Data sources: the loader contract, each source's images, and the mistakes that are reported."""

from __future__ import annotations

import fcntl
import hashlib
import io
import math
import multiprocessing
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from utils.config.schema import DataConfig
from utils.data.augment import crop_flip, warp
from utils.data.crop import centre_crop, resize, resize_to_centre
from utils.data.fake import FakeImages, photograph
from utils.data.folder_sets import IMAGENET_MEAN, IMAGENET_STD
from utils.data.image_folder import ImageNames
from utils.data.loader import Batch, Loader, epoch_order
from utils.data.loaders import Loaders
from utils.data.small_sets import digits
from utils.data.sources import check_data, open_data
from utils.errors import TrainingError, UserError

CLASSES = ("ant", "bee", "cat")


def write_folder(root: Path, train: int, val: int) -> None:
    """Write `train` and `val` JPEG files per class, of several sizes, in ImageNet's layout."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = rng.integers(24, 48, 2)
                # Coarse blocks: pure noise would lose its detail in the JPEG.
                pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((int(width), int(height))).save(folder / f"{i}.jpg")


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


DIGITS = DataConfig(dataset="digits", batch_size=200, val_batch_size=100)
FAKE = DataConfig(dataset="fake", fake_size=50, batch_size=12, val_batch_size=5, input_size=16, num_classes=4)


@pytest.fixture
def dali(imagenet: DataConfig) -> DataConfig:
    pytest.importorskip("nvidia.dali", reason="NVIDIA's DALI is not installed")
    return replace(imagenet, dataset="dali")


@pytest.fixture(params=["digits", "fake", "imagenet", "dali"])
def config(request: pytest.FixtureRequest, imagenet: DataConfig) -> DataConfig:
    if request.param == "dali":
        return request.getfixturevalue("dali")
    return {"digits": DIGITS, "fake": FAKE, "imagenet": imagenet}[request.param]


def read(loader: Loader, epoch: int = 0, position: int = 0) -> list[Batch]:
    loader.set_epoch(epoch)
    loader.set_position(position)
    return list(loader)


def validation(loaders: Loaders) -> Loader:
    assert loaders.val is not None
    return loaders.val


def same(left: list[Batch], right: list[Batch]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def pixels(images: Tensor, loaders: Loaders) -> np.ndarray:
    """Undo the normalisation: float64 [N, 3, S, S] in [0, 255]."""
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (loaders.mean, loaders.std))
    return (images.numpy().astype(np.float64) * std + mean) * 255


def resized(channel: np.ndarray, size: tuple[int, int], method: Image.Resampling) -> np.ndarray:
    """Let Pillow resize one channel in floating point."""
    return np.asarray(Image.fromarray(channel.astype(np.float32)).resize(size, method))


# ---- the contract


def test_every_batch_has_the_promised_form(config: DataConfig) -> None:
    loaders = open_data(config)
    for loader in (loaders.train, validation(loaders)):
        batches = read(loader)
        assert len(batches) == len(loader)
        for images, target in batches:
            assert images.shape == (len(target), 3, config.input_size, config.input_size)
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


# ---- augmentation


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_flip_pads_crops_and_flips(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 3, 32, 32))
    draws = rng.random((20, 4), dtype=np.float32)
    draws[0, :3] = 0
    draws[1, :3] = np.nextafter(np.float32(1), np.float32(0))
    padded = np.pad(images, ((0, 0), (0, 0), (4, 4), (4, 4)), mode="reflect")
    expected = []
    for image, (u, v, w, _) in zip(padded, draws, strict=True):
        row, column = math.floor(9 * u), math.floor(9 * v)
        crop = image[:, row : row + 32, column : column + 32]
        expected.append(crop[:, :, ::-1] if w < 0.5 else crop)
    actual = crop_flip(torch.from_numpy(images).to(dtype), torch.from_numpy(draws))
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual.numpy(), np.stack(expected))


@pytest.mark.parametrize(
    ("draws", "angle", "zoom", "shift"),
    [
        ((0.5, 0.5, 0.5, 0.5), 0, 1, (0, 0)),
        ((0.5, 0.5, 1.0, 0.0), 0, 1, (2, -2)),  # pixels, x and y
        ((1.0, 0.5, 0.5, 0.5), 10, 1, (0, 0)),
        ((0.5, 0.0, 0.5, 0.5), 0, 0.9, (0, 0)),
        ((0.1, 0.9, 0.3, 0.8), -8, 1.08, (-0.8, 1.2)),
    ],
)
def test_warp_turns_zooms_and_shifts(
    draws: tuple[float, ...], angle: float, zoom: float, shift: tuple[float, float]
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.float64)
    # Where each pixel of the result comes from, about the centre of the image.
    y, x = np.mgrid[:32, :32] - 15.5
    cos, sin = np.cos(np.radians(angle)) / zoom, np.sin(np.radians(angle)) / zoom
    source = [sin * x + cos * y + shift[1] + 15.5, cos * x - sin * y + shift[0] + 15.5]
    expected = map_coordinates(np.pad(image, 4), np.array(source) + 4, order=1)
    actual = warp(torch.from_numpy(image).to(torch.uint8)[None, None], torch.tensor([draws]))
    np.testing.assert_allclose(actual[0, 0].numpy(), expected, atol=0.02)


# ---- digits


def test_digits_split_is_stratified_constant_and_disjoint() -> None:
    (train, train_target), (val, val_target) = digits(8)
    assert (len(train), len(val)) == (1437, 360)
    everything, classes = load_digits(return_X_y=True)
    total, held_out = np.bincount(classes), np.bincount(val_target.numpy())
    assert np.abs(held_out - 0.2 * total).max() <= 1
    # At 8 pixels nothing is resized: the values of the set, 0 ... 16, come back.
    rows = [(x.flatten(1).double() * 16 / 255).round().long().tolist() for x in (train, val)]
    labelled = [
        {(*row, label) for row, label in zip(part, target.tolist(), strict=True)}
        for part, target in zip(rows, (train_target, val_target), strict=True)
    ]
    assert labelled[0].isdisjoint(labelled[1])
    assert labelled[0] | labelled[1] == {
        (*map(int, row), int(label)) for row, label in zip(everything, classes, strict=True)
    }
    # A change of the split would make accuracies incomparable.
    assert val_target[:10].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3]


def test_digits_are_resized_as_pillow_does() -> None:
    small, _ = digits(8)[1]
    large, _ = digits(32)[1]
    for before, after in zip(small[:20, 0], large[:20, 0], strict=True):
        expected = resized(before.numpy(), (32, 32), Image.Resampling.BICUBIC)
        # Half for rounding here, and half for rounding to 8 bits before enlarging in `small`.
        np.testing.assert_allclose(after.numpy(), np.clip(expected, 0, 255), atol=1.2)


def test_digits_validation_covers_every_sample_once_and_as_it_is() -> None:
    loaders = open_data(DIGITS)
    images, target = (torch.cat(parts) for parts in zip(*validation(loaders), strict=True))
    _, (expected, classes) = digits(32)
    assert torch.equal(target, classes)
    np.testing.assert_allclose(pixels(images, loaders), expected.expand(-1, 3, -1, -1).numpy(), atol=1e-3)


def test_digits_statistics_are_the_training_sets() -> None:
    (train, _), _ = digits(32)
    values = train.numpy().astype(np.float64) / 255
    loaders = open_data(DIGITS)
    assert loaders.mean == pytest.approx((values.mean(),) * 3, rel=1e-4)
    assert loaders.std == pytest.approx((values.std(),) * 3, rel=1e-3)


def test_digits_training_is_augmented_anew_each_epoch() -> None:
    config = replace(DIGITS, batch_size=1437)  # all in one batch, sorted back into the order of the set
    loader = open_data(config).train
    first, second = (
        read(loader, epoch)[0][0][epoch_order(1437, config.seed, epoch).argsort()] for epoch in (0, 1)
    )
    changed = (first != second).flatten(1).any(1)
    assert changed.all()
    assert (first - second).abs().mean() < first.abs().mean()  # still the same digits


# ---- fake


def test_fake_images_depend_on_split_and_index_only() -> None:
    train, val = FakeImages(0, 4, 16), FakeImages(1, 4, 16)
    images = train[torch.tensor([3, 7, 11])]
    assert images.dtype == torch.uint8
    assert images.shape == (3, 3, 16, 16)
    assert torch.equal(train[torch.tensor([7])], images[1:2])
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(val[torch.tensor([3])], images[:1])


def test_fake_classes_can_be_learned() -> None:
    loaders = open_data(replace(FAKE, fake_size=64))
    images, target = (torch.cat(parts) for parts in zip(*loaders.train, strict=True))
    centres = torch.stack([images[target == label].mean(0) for label in range(4)]).flatten(1)
    images, target = (torch.cat(parts) for parts in zip(*validation(loaders), strict=True))
    nearest = torch.cdist(images.flatten(1), centres).argmin(1)
    assert torch.equal(nearest, target)
    assert torch.equal(target, torch.arange(16) % 4)


def test_fake_images_are_normalised() -> None:
    loaders = open_data(replace(FAKE, fake_size=400, num_classes=100, batch_size=400))
    images, _ = next(iter(loaders.train))
    assert abs(images.mean().item()) < 0.05
    assert images.std().item() == pytest.approx(1, abs=0.1)


# ---- cifar10, cifar100


class OldPickler(pickle.Pickler):
    """Writes a byte array's type as the NumPy of 2009 did, which wrote the CIFAR files."""

    def reducer_override(self, obj: object) -> object:
        """Describe a type as (function, arguments, state); leave everything else alone."""
        if isinstance(obj, np.dtype):
            return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)
        return NotImplemented


def dump(path: Path, entry: dict[str, object]) -> list[str]:
    """Write one file of a CIFAR set; return its name and checksum as torchvision lists them."""
    buffer = io.BytesIO()
    OldPickler(buffer, protocol=2).dump(entry)
    path.write_bytes(buffer.getvalue())
    return [path.name, hashlib.md5(buffer.getvalue()).hexdigest()]


def write_cifar(root: Path, kind: type[CIFAR10], monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Write a small set in CIFAR's own format and give torchvision its checksums.

    Returns:
        `train` and `test`, uint8 [n, 3, 32, 32], and their classes, `train_target` and `test_target`.
    """
    rng = np.random.default_rng(0)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    classes, key = (100, "fine_labels") if kind is CIFAR100 else (10, "labels")
    written: dict[str, np.ndarray] = {}
    for part, listed in (("train", "train_list"), ("test", "test_list")):
        names = [name for name, _ in (kind.train_list if part == "train" else kind.test_list)]
        data = rng.integers(0, 256, (len(names), 20, 3072), dtype=np.uint8)
        target = rng.integers(0, classes, (len(names), 20))
        entries = [
            dump(folder / name, {"data": rows, key: labels.tolist(), "batch_label": name})
            for name, rows, labels in zip(names, data, target, strict=True)
        ]
        monkeypatch.setattr(kind, listed, entries)
        written[part] = data.reshape(-1, 3, 32, 32)
        written[f"{part}_target"] = target.reshape(-1)
    meta = dump(folder / kind.meta["filename"], {kind.meta["key"]: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": meta[1]})
    return written


CIFAR_SETS = [
    pytest.param("cifar10", CIFAR10, 10, 100, id="cifar10"),
    pytest.param("cifar100", CIFAR100, 100, 20, id="cifar100"),
]


@pytest.mark.parametrize(("name", "kind", "classes", "samples"), CIFAR_SETS)
def test_cifar_is_read_from_its_own_files(
    name: str,
    kind: type[CIFAR10],
    classes: int,
    samples: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = write_cifar(tmp_path, kind, monkeypatch)
    config = DataConfig(
        dataset=name, root=tmp_path, num_classes=classes, batch_size=samples, val_batch_size=8
    )
    loaders = open_data(config)
    assert (loaders.train.samples, validation(loaders).samples) == (samples, 20)
    images, target = (torch.cat(parts) for parts in zip(*validation(loaders), strict=True))
    np.testing.assert_array_equal(target.numpy(), written["test_target"])
    np.testing.assert_allclose(pixels(images, loaders), written["test"], atol=1e-3)
    # Training: the same pixels as in the file, cropped and flipped.
    [(images, target)] = read(loaders.train, 5)
    order = epoch_order(samples, config.seed, 5).numpy()
    np.testing.assert_array_equal(target.numpy(), written["train_target"][order])
    actual = pixels(images, loaders)
    padded = np.pad(written["train"][order], ((0, 0), (0, 0), (4, 4), (4, 4)), mode="reflect")
    for image, wide in zip(actual, padded, strict=True):
        crops = np.lib.stride_tricks.sliding_window_view(wide, (3, 32, 32))[0].reshape(-1, 3, 32, 32)
        candidates = np.concatenate([crops, crops[..., ::-1]])
        assert np.abs(candidates - image).max(axis=(1, 2, 3)).min() < 1e-3


def test_cifar_is_resized_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_cifar(tmp_path, CIFAR10, monkeypatch)
    loaders = open_data(
        DataConfig(dataset="cifar10", root=tmp_path, input_size=48, batch_size=10, val_batch_size=20)
    )
    assert next(iter(loaders.train))[0].shape == (10, 3, 48, 48)
    [(images, _)] = validation(loaders)
    for before, after in zip(written["test"][0], pixels(images, loaders)[0], strict=True):
        expected = resized(before, (48, 48), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(after, expected, atol=1e-2)


def test_cifar_archive_that_was_put_into_the_root_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path / "elsewhere", CIFAR10, monkeypatch)
    root = tmp_path / "root"
    root.mkdir()
    archive = root / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "elsewhere" / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", (tmp_path / "no-such-server").as_uri())
    assert open_data(DataConfig(dataset="cifar10", root=root)).train.samples == 100


def test_cifar_that_cannot_be_downloaded_says_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CIFAR10, "url", (tmp_path / "no-such-server").as_uri())
    with pytest.raises(UserError) as caught:
        open_data(DataConfig(dataset="cifar10"))
    message = str(caught.value)
    for part in (
        "data/cifar-10-batches-py",
        "download failed",
        CIFAR10.url,
        "put it at data/cifar-10-python.tar.gz",
    ):
        assert part in message


PROCESS = """
import hashlib, sys
from pathlib import Path
from torchvision.datasets import CIFAR10
from utils.config.schema import DataConfig
from utils.data.sources import open_data

root = Path(sys.argv[1])
CIFAR10.train_list, CIFAR10.test_list, CIFAR10.meta = eval(sys.argv[2])
CIFAR10.tgz_md5 = hashlib.md5((root / CIFAR10.filename).read_bytes()).hexdigest()
print("ready", flush=True)
sys.stdin.readline()
print(open_data(DataConfig(dataset="cifar10", root=root)).train.samples)
"""


def test_cifar_is_unpacked_by_one_of_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for it, and do not unpack it again."""
    write_cifar(tmp_path / "elsewhere", CIFAR10, monkeypatch)
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / CIFAR10.filename, "w:gz") as file:
        file.add(tmp_path / "elsewhere" / CIFAR10.base_folder, CIFAR10.base_folder)
    lists = repr((CIFAR10.train_list, CIFAR10.test_list, CIFAR10.meta))
    others = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, root, lists], cwd=Path(__file__).parent.parent, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    for other in others:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
    folder = root / CIFAR10.base_folder
    lock = root / ".lock"
    handle = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as the one that unpacks
    for other in others:
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()
    deadline = time.monotonic() + 60
    while sum(f"{lock.stat().st_ino} " in line and "->" in line for line in locks()) < 2:
        assert all(other.poll() is None for other in others) and time.monotonic() < deadline
        time.sleep(0.02)
    assert not folder.exists()
    shutil.copytree(tmp_path / "elsewhere" / CIFAR10.base_folder, folder)
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (root / CIFAR10.filename).unlink()
    os.close(handle)
    for other in others:
        assert other.communicate(timeout=60) == ("100\n", "")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written


def locks() -> list[str]:
    """The locks of all processes; those that are waited for have an arrow."""
    return Path("/proc/locks").read_text().splitlines()


def test_a_server_that_is_silent_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.data.cifar._PATIENCE", 0.1)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.getsockname()[1]}/{CIFAR10.filename}")
        end = threading.Timer(60, server.close)  # should it be waited for after all
        end.start()
        with pytest.raises(UserError, match=r"the download failed: .*timed out"):
            open_data(DataConfig(dataset="cifar10", root=tmp_path))
        end.cancel()
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("archived", [False, True])
def test_cifar_with_a_cut_archive_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archived: bool
) -> None:
    """Whether its checksum shows it or, not known, unpacking does."""
    write_cifar(tmp_path / "elsewhere", CIFAR10, monkeypatch)
    archive = tmp_path / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "elsewhere" / CIFAR10.base_folder, CIFAR10.base_folder)
    archive.write_bytes(archive.read_bytes()[:-5000])
    if archived:
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", (tmp_path / "no-such-server").as_uri())
    with pytest.raises(UserError, match=f"{archive} is damaged, and .* put it at {archive}"):
        open_data(DataConfig(dataset="cifar10", root=tmp_path))


@pytest.mark.parametrize("blocked", ["root", "folder"])
def test_a_place_that_cifar_cannot_use_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocked: str
) -> None:
    """Neither the archive nor a download is to blame. A file in the way stands for what may not be written."""
    write_cifar(tmp_path / "elsewhere", CIFAR10, monkeypatch)
    monkeypatch.chdir(tmp_path)
    place = Path("data")
    if blocked == "folder":
        place.mkdir()
        archive = place / CIFAR10.filename
        with tarfile.open(archive, "w:gz") as file:
            file.add(tmp_path / "elsewhere" / CIFAR10.base_folder, CIFAR10.base_folder)
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
        place /= CIFAR10.base_folder
    place.touch()
    with pytest.raises(UserError, match=f"^cannot use {place}.*: .*; check --root and its permissions$"):
        open_data(DataConfig(dataset="cifar10"))


def test_cifar_with_a_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, CIFAR10, monkeypatch)
    with (tmp_path / CIFAR10.base_folder / "data_batch_3").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"checksums differ.*remove that folder if .* download http"):
        open_data(DataConfig(dataset="cifar10", root=tmp_path))
    archive = tmp_path / CIFAR10.filename
    archive.touch()
    with pytest.raises(
        UserError, match=f"checksums differ.*remove that folder; the next start unpacks {archive}"
    ):
        open_data(DataConfig(dataset="cifar10", root=tmp_path))


# ---- imagenet


def as_png(data: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).save(buffer, "PNG")
    return buffer.getvalue()


DAMAGE = {
    "halved": lambda data: data[: len(data) // 2],
    "cut": lambda data: data[:-20],
    "text": lambda data: b"not an image",
    "empty": lambda data: b"",
    # Whole to look at: what is missing shows in decoding only.
    "broken": lambda data: as_png(data)[: len(data) // 2],
}


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
    if dataset == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA's DALI is not installed")
    loader = open_data(replace(imagenet, dataset=dataset, workers=workers, batch_size=2)).train
    pairs = [(images, images.clone()) for _ in range(2) for images, _ in loader]
    assert len(pairs) == 18
    assert all(torch.equal(images, copy) for images, copy in pairs)


def test_a_lack_of_shared_memory_says_what_to_write(imagenet: DataConfig) -> None:
    loader = open_data(replace(imagenet, workers=1, input_size=10**7)).train
    with pytest.raises(UserError, match=r"1 workers need \d+ MiB of shared memory .* write fewer --workers"):
        next(iter(loader))


def test_images_below_a_link_that_leads_back_up_are_read_once(tmp_path: Path) -> None:
    write_folder(tmp_path, train=2, val=1)
    (tmp_path / "train" / "ant" / "up").symlink_to(tmp_path / "train" / "ant")
    deep = tmp_path / "train" / "bee" / "more" / "still more"
    deep.mkdir(parents=True)
    (tmp_path / "train" / "bee" / "0.jpg").rename(deep / "7.jpg")
    (tmp_path / "train" / "bee" / "folder.jpg").mkdir()
    names = ImageNames(tmp_path / "train")
    assert [names.path(i).removeprefix(f"{tmp_path}/train/") for i in range(len(names))] == [
        "ant/0.jpg", "ant/1.jpg", "bee/1.jpg", "bee/more/still more/7.jpg", "cat/0.jpg", "cat/1.jpg",
    ]  # fmt: skip
    assert names.target.tolist() == [0, 0, 1, 1, 2, 2]


def test_imagenet_validation_images_are_resized_and_cropped(imagenet: DataConfig, folder: Path) -> None:
    loaders = open_data(imagenet)
    assert (loaders.mean, loaders.std) == (IMAGENET_MEAN, IMAGENET_STD)
    images, target = (torch.cat(parts) for parts in zip(*validation(loaders), strict=True))
    assert target.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    paths = [folder / "val" / name / f"{i}.jpg" for name in CLASSES for i in range(3)]
    for path, actual in zip(paths, pixels(images, loaders), strict=True):
        image = Image.open(path)
        factor = 18 / min(image.size)  # 16 * 256 / 224, rounded
        size = (int(image.width * factor + 1e-6), int(image.height * factor + 1e-6))
        left, top = (round((side - 16) / 2) for side in size)
        expected = image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + 16, top + 16))
        # torchvision rounds the sums of its two passes elsewhere than Pillow.
        np.testing.assert_allclose(actual.transpose(1, 2, 0), np.asarray(expected), atol=1.01)


def test_imagenet_training_is_augmented_anew_each_epoch(imagenet: DataConfig) -> None:
    config = replace(imagenet, batch_size=18)
    loader = open_data(config).train
    first, second = (read(loader, e)[0][0][epoch_order(18, config.seed, e).argsort()] for e in (0, 1))
    assert (first != second).flatten(1).any(1).all()


@pytest.mark.parametrize(("dataset", "workers"), [("imagenet", 0), ("imagenet", 2), ("dali", 2)])
@pytest.mark.parametrize("damage", DAMAGE)
def test_an_unreadable_image_is_named(tmp_path: Path, dataset: str, workers: int, damage: str) -> None:
    if dataset == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA's DALI is not installed")
    write_folder(tmp_path, train=2, val=1)
    path = tmp_path / "train" / "bee" / "1.jpg"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    loader = open_data(
        DataConfig(
            dataset=dataset, root=tmp_path, num_classes=3, input_size=16, batch_size=3, workers=workers
        )
    ).train
    message = ""
    try:  # not `pytest.raises`: what it keeps would hold the workers until some later test
        read(loader)
    except UserError as error:
        message = str(error)
    assert message.startswith(f"cannot read the image {path} (")
    assert "\n" not in message
    assert "Traceback" not in message


@pytest.mark.parametrize("dataset", ["imagenet", "dali"])
def test_what_is_no_file_is_named(tmp_path: Path, dataset: str) -> None:
    if dataset == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA's DALI is not installed")
    write_folder(tmp_path, train=2, val=1)
    path = tmp_path / "train" / "bee" / "1.jpg"
    path.unlink()
    path.symlink_to("/dev/null")
    config = DataConfig(dataset=dataset, root=tmp_path, num_classes=3, input_size=16, batch_size=3, workers=0)
    with pytest.raises(UserError, match=r"bee/1.jpg \(not a regular file\)"):
        read(open_data(config).train)


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (2, 90_000)])
@pytest.mark.parametrize("dataset", ["imagenet", "dali"])
def test_slender_images_need_little_memory(tmp_path: Path, dataset: str, shape: tuple[int, int]) -> None:
    """Resized as a whole such an image would have some 200 GB."""
    if dataset == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA's DALI is not installed")
    write_folder(tmp_path, train=2, val=1)
    Image.new("RGB", shape, (10, 100, 200)).save(tmp_path / "val" / "bee" / "0.png")
    Image.new("RGB", shape, (10, 100, 200)).save(tmp_path / "train" / "bee" / "0.png")
    config = DataConfig(
        dataset=dataset,
        root=tmp_path,
        num_classes=3,
        input_size=1024,
        batch_size=7,
        val_batch_size=6,
        workers=0,
    )
    loaders = open_data(config)
    [(images, _)] = validation(loaders)
    np.testing.assert_allclose(pixels(images, loaders)[2, :, 500, 500], (10, 100, 200), atol=1e-3)
    read(loaders.train)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (40, 40), (30, 480), (480, 30), (7, 9), (500, 375)])
def test_the_centre_of_ordinary_images_is_that_of_the_whole(shape: tuple[int, int]) -> None:
    """To the bit."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    height, width, top, left = centre_crop(*shape, 24)
    whole = resize(image, height, width)
    assert torch.equal(resize_to_centre(image, 24), whole[:, top : top + 24, left : left + 24])


@pytest.mark.parametrize("shape", [(20, 700), (701, 20), (5, 801), (40, 1900)])
def test_the_centre_of_slender_images_is_that_of_the_whole_within_a_pixel(shape: tuple[int, int]) -> None:
    """A slope along the longer side shows how far the picture has moved."""
    longer = max(shape)
    slope = torch.linspace(0, 255, longer).view((-1, 1) if shape[0] == longer else (1, -1))
    image = slope.expand(shape).round().to(torch.uint8)[..., None].expand(-1, -1, 3).contiguous()
    height, width, top, left = centre_crop(*shape, 24)
    whole = resize(image, height, width)[:, top : top + 24, left : left + 24]
    difference = (resize_to_centre(image, 24).int() - whole.int()).abs().max()
    assert difference <= math.ceil(255 / max(height, width)) + 1


@pytest.mark.parametrize("dataset", ["imagenet", "dali"])
@pytest.mark.parametrize("error", [RuntimeError("you tried to allocate too much"), MemoryError()])
def test_an_image_that_cannot_be_fitted_is_named(
    tmp_path: Path, dataset: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory does not suffice for one."""
    if dataset == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA's DALI is not installed")
    write_folder(tmp_path, train=2, val=2)
    Image.new("RGB", (70, 70)).save(tmp_path / "val" / "bee" / "1.jpg")

    def fit(image: Tensor, size: int) -> Tensor:
        if image.shape[0] == 70:
            raise error
        return resize_to_centre(image, size)

    monkeypatch.setattr(f"utils.data.{'dali' if dataset == 'dali' else 'folder'}_loader.resize_to_centre", fit)
    config = DataConfig(
        dataset=dataset, root=tmp_path, num_classes=3, input_size=16, val_batch_size=3, workers=0
    )
    with pytest.raises(UserError, match=f"cannot read .*bee/1.jpg \\({str(error) or 'MemoryError'}\\)"):
        read(validation(open_data(config)))
    targets = [target for _, target in read(validation(open_data(replace(config, skip_corrupt=1))))]
    assert torch.cat(targets).tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(("dataset", "workers"), [("imagenet", 0), ("imagenet", 2), ("dali", 1)])
def test_unreadable_images_are_left_out_counted_and_reported(
    tmp_path: Path, dataset: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    if dataset == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA's DALI is not installed")
    write_folder(tmp_path, train=4, val=2)
    damaged = ["train/ant/0.jpg", "train/bee/1.jpg", "val/cat/1.jpg"]
    for name, damage in zip(damaged, ("broken", "text", "halved"), strict=True):
        (tmp_path / name).write_bytes(DAMAGE[damage]((tmp_path / name).read_bytes()))
    config = DataConfig(
        dataset=dataset, root=tmp_path, num_classes=3, input_size=16, batch_size=4, val_batch_size=4,
        workers=workers, skip_corrupt=3,
    )  # fmt: skip
    loaders = open_data(config)
    for epoch in (0, 1):
        assert sum(len(target) for _, target in read(loaders.train, epoch)) == 10
    order = epoch_order(12, config.seed, 1).tolist()
    good = [index // 4 for index in order if index not in (0, 5)]
    assert torch.cat([target for _, target in read(loaders.train, 1)]).tolist() == good
    assert torch.cat([target for _, target in read(validation(loaders))]).tolist() == [0, 0, 1, 1, 2]
    # Each is named once, however often it is met.
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    for number, (line, name) in enumerate(zip(sorted(lines), damaged, strict=True), 1):
        assert line.startswith(f"left out an image that cannot be read, {number} of 3: ")
        assert any(str(tmp_path / name) in line for line in lines)


def unnoticed(data: bytes) -> bytes:
    """Half of the picture is missing, and the end is there."""
    return data[: len(data) // 2] + b"\xff\xd9"


def with_an_odd_marker(data: bytes) -> bytes:
    """In the middle of the picture's data is what no JPEG has."""
    middle = len(data) // 2
    return data[:middle] + b"\xff\x02" + data[middle + 2 :]


@pytest.mark.parametrize(
    ("dataset", "damage", "seen"),
    [
        ("imagenet", unnoticed, False),
        ("imagenet", with_an_odd_marker, True),
        ("dali", unnoticed, False),
        ("dali", with_an_odd_marker, False),
    ],
)
def test_which_damage_of_a_photograph_training_sees(
    tmp_path: Path, dataset: str, damage: Callable[[bytes], bytes], seen: bool
) -> None:
    """What docs/data.md says of it; `verify-data` sees all of this, see test_tools.py."""
    if dataset == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA's DALI is not installed")
    path = tmp_path / "val" / "one" / "0.jpg"
    for folder in (tmp_path / "train" / "one", path.parent):
        folder.mkdir(parents=True)
        photograph(0, 0, 1, 500, 375).save(folder / "0.jpg", quality=95)
    path.write_bytes(damage(path.read_bytes()))
    config = DataConfig(
        dataset=dataset, root=tmp_path, num_classes=1, input_size=32, val_batch_size=1, workers=0
    )
    with pytest.raises(UserError, match="cannot read the image") if seen else nullcontext():
        read(validation(open_data(config)))


def test_odd_names_are_one_line_in_messages(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path, train=2, val=1)
    name = tmp_path / "train" / "bee" / os.fsdecode(b"a\n\x1b\xff.jpg")
    name.write_text("no image")
    config = DataConfig(
        dataset="imagenet",
        root=tmp_path,
        num_classes=3,
        input_size=16,
        batch_size=7,
        workers=0,
        skip_corrupt=1,
    )
    read(open_data(config).train)
    [line] = [record.getMessage() for record in caplog.records]
    assert line.endswith(r"bee/a\n\x1b\udcff.jpg (no image)")
    with pytest.raises(UserError, match=r"bee/a\\n\\x1b\\udcff.jpg \(no image\)"):
        read(open_data(replace(config, skip_corrupt=0)).train)


@pytest.mark.parametrize("dataset", ["imagenet", "dali"])
@pytest.mark.parametrize("damage", ["text", "halved"])
def test_a_single_image_that_is_left_of_a_training_batch_stops_the_run(
    tmp_path: Path, dataset: str, damage: str
) -> None:
    """It would have no batch statistics; validation needs none."""
    if dataset == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA's DALI is not installed")
    write_folder(tmp_path, train=2, val=2)
    for path in (tmp_path / "train" / "bee" / "1.jpg", tmp_path / "val" / "bee" / "1.jpg"):
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    config = DataConfig(
        dataset=dataset, root=tmp_path, num_classes=3, input_size=16, batch_size=2, val_batch_size=2, workers=0,
        skip_corrupt=9,
    )  # fmt: skip
    loaders = open_data(config)
    assert [len(target) for _, target in read(validation(loaders))] == [2, 1, 2]
    with pytest.raises(UserError, match=r"a single image of a training batch can be read.*bee/1.jpg"):
        read(loaders.train)


@pytest.mark.parametrize(("dataset", "workers"), [("imagenet", 0), ("imagenet", 2), ("dali", 1)])
@pytest.mark.parametrize("damage", ["text", "broken"])
def test_a_batch_of_validation_may_be_lost_whole(
    tmp_path: Path, dataset: str, workers: int, damage: str
) -> None:
    """At the beginning, in the middle, two in a row and at the end; what is left are the images that can be read."""
    if dataset == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA's DALI is not installed")
    write_folder(tmp_path, train=2, val=3)
    paths = [tmp_path / "val" / name / f"{i}.jpg" for name in CLASSES for i in range(3)]
    for number in (0, 3, 4, 5, 8):
        paths[number].write_bytes(DAMAGE[damage](paths[number].read_bytes()))
    config = DataConfig(
        dataset=dataset, root=tmp_path, num_classes=3, input_size=16, val_batch_size=1, workers=workers,
        skip_corrupt=5,
    )  # fmt: skip
    loader = validation(open_data(config))
    for _ in range(2):
        assert [target.tolist() for _, target in read(loader)] == [[0], [0], [2], [2]]
    with pytest.raises(UserError, match=f"cannot read .*{paths[8].name}.*4 others are left out already"):
        read(validation(open_data(replace(config, skip_corrupt=4, workers=0))))
    for path in paths:
        path.write_text("no image")
    with pytest.raises(UserError, match="no image of the validation set can be read"):
        read(validation(open_data(replace(config, skip_corrupt=9, workers=0))))


@pytest.mark.parametrize("dataset", ["imagenet", "dali"])
def test_one_unreadable_image_too_many_stops_the_run(tmp_path: Path, dataset: str) -> None:
    if dataset == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA's DALI is not installed")
    write_folder(tmp_path, train=4, val=2)
    for name in ("ant/0.jpg", "bee/1.jpg"):
        (tmp_path / "train" / name).write_text("not an image")
    config = DataConfig(
        dataset=dataset, root=tmp_path, num_classes=3, input_size=16, batch_size=12, workers=0, skip_corrupt=1
    )
    with pytest.raises(UserError, match=r"cannot read .*\.jpg \(no image\): .*1 others are left out already"):
        read(open_data(config).train)
    # Of a batch something must be left.
    with pytest.raises(UserError, match="no image of a training batch can be read"):
        read(open_data(replace(config, batch_size=1, skip_corrupt=9)).train)


# ---- mistakes


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
        ({"dataset": "imagenet"}, "imagenet needs --root"),
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


@pytest.mark.parametrize(
    ("folders", "files", "message"),
    [
        ([], [], "/train is missing: --root names"),
        ([], ["train/a/1.jpg"], "/val is missing: --root names"),
        (["train"], [], "/train has no class folders"),
        ([], ["train/a/1.jpg", "val/1.jpg"], "/val has no class folders: .* one folder per class"),
        (["train/b"], ["train/a/1.jpg"], "/train has class folders without images: fill or remove b$"),
        (["val/b"], ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/b/1.txt"], "/val has .* b$"),
        ([f"train/{i}" for i in range(6)], [], "fill or remove 0, 1, 2 and 3 more$"),
        ([], ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg"], "different classes: b must be in both"),
        ([], ["train/a/1.jpg", "val/a/1.jpg", "val/b/1.jpg"], "different classes: b must be in both"),
        ([], ["train/a/1.jpg", "val/a/1.jpg"], "has 1 classes, not 2: write --num_classes 1"),
    ],
)
def test_image_folders_are_checked(
    folders: list[str], files: list[str], message: str, tmp_path: Path
) -> None:
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    config = DataConfig(dataset="imagenet", root=tmp_path, num_classes=2)
    for function in (check_data, open_data):
        with pytest.raises(UserError, match=message):
            function(config)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_folder_that_is_a_lost_link_is_no_silent_loss(tmp_path: Path, split: str) -> None:
    write_folder(tmp_path, train=1, val=1)
    (tmp_path / split / "dog").symlink_to(tmp_path / "gone")
    config = DataConfig(dataset="imagenet", root=tmp_path, num_classes=3)
    with pytest.raises(UserError, match=f"{split} has links that lead nowhere: mend or remove dog$"):
        check_data(config)


def test_check_needs_no_validation_folder_without_validation(tmp_path: Path) -> None:
    write_folder(tmp_path, train=1, val=0)
    for name in CLASSES:
        (tmp_path / "val" / name).rmdir()
    config = DataConfig(dataset="imagenet", root=tmp_path, num_classes=3, val_batch_size=0, workers=0)
    check_data(config)
    assert open_data(config).val is None


def test_check_accepts_every_good_source(config: DataConfig) -> None:
    check_data(config)
    check_data(DataConfig(dataset="cifar10"))  # files that are missing will be downloaded


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
