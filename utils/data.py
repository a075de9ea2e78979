"""The data sets by name: what each needs, and how its loaders are opened."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import importlib.util
import os
import pickle
import socket
import tarfile
import urllib.error
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from utils import workers
from utils.augment import Augment, crop_flip, mixing, warp
from utils.config import DataConfig
from utils.errors import UserError
from utils.fake import FakeImages
from utils.glyphs import CHARACTERS, font_files, glyphs
from utils.loader import Delivery, Loader
from utils.memory import Store, TensorLoader, resize

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Loaders:
    """What a source delivers.

    Attributes:
        train: batches of the training set.
        val: batches of the validation set; None without validation.
        num_classes: number of classes.
        mean: per channel, of images in [0, 1]; what images were normalised with.
        std: per channel, likewise.
    """

    train: Loader
    val: Loader | None
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Source:
    """A data set by name.

    Attributes:
        check: raises `UserError` for what would keep `build` from working, as far as a quick look can tell.
        build: the loaders, for batches on a device; runs after `check`.
    """

    check: Callable[[DataConfig], None]
    build: Callable[[DataConfig, torch.device], Loaders]


def _check_classes(config: DataConfig, classes: int, what: str) -> None:
    if config.num_classes != classes:
        raise UserError(
            f"{what} has {classes} classes, not {config.num_classes}: write --num_classes {classes} or name "
            "another data set"
        )


def _deliveries(
    config: DataConfig, device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Delivery, Delivery]:
    """How batches of training and of validation are delivered; `mean` and `std` are the set's own."""

    def delivery(batch_size: int, *, train: bool) -> Delivery:
        return Delivery(
            batch_size=batch_size,
            train=train,
            seed=config.seed,
            mean=config.mean or mean,
            std=config.std or std,
            device=device,
            rank=config.rank,
            world_size=config.world_size,
            colour=config.colour,
            mix=mixing(config.mixup_alpha, config.cutmix_alpha, config.num_classes),
        )

    return delivery(config.batch_size, train=True), delivery(config.val_batch_size, train=False)


def _loaders(
    config: DataConfig, deliveries: tuple[Delivery, Delivery], open_: Callable[[Delivery], Loader]
) -> Loaders:
    """Both loaders, of which `open_` makes one."""
    train, val = deliveries
    return Loaders(
        train=open_(train),
        val=open_(val) if config.val_batch_size else None,
        num_classes=config.num_classes,
        mean=train.mean,
        std=train.std,
    )


def _tensor_loaders(
    config: DataConfig,
    device: torch.device,
    train: tuple[Store, Tensor],
    val: tuple[Store, Tensor] | None,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: Augment | None,
) -> Loaders:
    """Loaders over (images, classes) in memory; `mean` and `std` are the set's own."""

    def open_(delivery: Delivery) -> TensorLoader:
        part = train if delivery.train else val
        assert part is not None  # with a validation batch there is a validation set
        return TensorLoader(
            *part, delivery, size=config.input_size, augment=augment, randaugment=config.rand_augment
        )

    return _loaders(config, _deliveries(config, device, mean, std), open_)


# ---- digits: 1,797 handwritten digits of 8x8 pixels that come with scikit-learn


def _check_digits(config: DataConfig) -> None:
    _check_classes(config, 10, "--dataset digits")


def digits(size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Load the digits, a fifth of each class held out for validation.

    The split is part of the data set: it has a constant of its own and is the same in every run.

    Args:
        size: height and width the images are resized to (bicubic), in pixels.

    Returns:
        Training and validation set, each as images, uint8 [n, 1, size, size], and classes, int64 [n].
    """
    # Imported here: a second or more that no other source needs to spend.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, classes = load_digits(return_X_y=True)  # [1797, 64] in 0 ... 16
    small = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
    images = resize(small, size, "bicubic").round_().clamp_(0, 255).to(torch.uint8)
    target = torch.from_numpy(classes).long()
    train, val = train_test_split(np.arange(len(classes)), test_size=0.2, stratify=classes, random_state=0)
    return (images[train], target[train]), (images[val], target[val])


def _grey_loaders(
    config: DataConfig,
    device: torch.device,
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    augment: Augment,
) -> Loaders:
    """Loaders over grey images, normalised by the statistics of the training set."""
    std, mean = torch.std_mean(train[0].float() / 255)
    return _tensor_loaders(
        config,
        device,
        train,
        val if config.val_batch_size else None,
        mean=(mean.item(),) * 3,
        std=(std.item(),) * 3,
        augment=augment,
    )


def _build_digits(config: DataConfig, device: torch.device) -> Loaders:
    return _grey_loaders(config, device, *digits(config.input_size), warp)


# ---- glyphs: characters drawn by `utils.glyphs`


def _check_glyphs(config: DataConfig) -> None:
    _check_classes(config, len(CHARACTERS), "--dataset glyphs")
    font_files()


def _build_glyphs(config: DataConfig, device: torch.device) -> Loaders:
    return _grey_loaders(config, device, *glyphs(), partial(warp, padding="border"))


# ---- fake: images that are computed


def _check_fake(config: DataConfig) -> None:
    if config.fake_size < 1:
        raise UserError(f"--fake_size {config.fake_size}: write the number of training images, 1 or more")


def _build_fake(config: DataConfig, device: torch.device) -> Loaders:
    def part(split: int, samples: int) -> tuple[Store, Tensor]:
        store = FakeImages(split, config.num_classes, config.input_size)
        return store, torch.arange(samples) % config.num_classes

    return _tensor_loaders(
        config,
        device,
        part(0, config.fake_size),
        part(1, max(1, config.fake_size // 4)) if config.val_batch_size else None,
        mean=FakeImages.MEAN,
        std=FakeImages.STD,
        augment=None,
    )


# ---- cifar10, cifar100: the python files of https://www.cs.toronto.edu/~kriz/cifar.html


_PATIENCE = 30.0  # seconds that a server may be silent
_CIFAR_ERRORS = (
    OSError,
    RuntimeError,
    http.client.HTTPException,
    EOFError,
    pickle.UnpicklingError,
    tarfile.TarError,
    zlib.error,
)
"""What a download, a damaged archive and damaged files raise."""


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process has this folder for itself, then have it: one unpacks, others find it done."""
    try:
        handle = os.open(
            folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666
        )  # what NFS locks must be open for writing
    except OSError:
        handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    """Wait for a silent server no longer than `_PATIENCE`; torchvision has no option for it."""
    former = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(former)


@dataclass(frozen=True)
class Cifar:
    """A CIFAR set as a `Source`'s functions: torchvision's class of it, by name, and its usual statistics."""

    name: str
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def files(self) -> type[CIFAR10]:
        """Torchvision's class, imported here: other data sets need not wait for it."""
        from torchvision import datasets

        return getattr(datasets, self.name)

    def check(self, config: DataConfig) -> None:
        """Raise `UserError` for a wrong number of classes or a root that is no folder."""
        _check_classes(config, self.num_classes, f"--dataset {config.dataset}")
        if config.root is not None and not config.root.is_dir():
            raise UserError(
                f"--root {config.root} is not a folder: name the one that holds {self.files.base_folder}, "
                f"or make it, and {self.files.filename} is downloaded into it"
            )

    def build(self, config: DataConfig, device: torch.device) -> Loaders:
        """Load both sets into memory; files that are missing are downloaded."""
        root = Path("data") if config.root is None else config.root
        return _tensor_loaders(
            config,
            device,
            self._load(root, train=True),
            self._load(root, train=False) if config.val_batch_size else None,
            mean=self.mean,
            std=self.std,
            augment=crop_flip,
        )

    def _load(self, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
        """Return images, uint8 [n, 3, 32, 32], and classes, int64 [n]; torchvision verifies checksums."""
        files = self.files
        folder, archive = root / files.base_folder, root / files.filename
        names = [name for name, _ in files.train_list + files.test_list] + [files.meta["filename"]]
        missing = archived = False
        try:
            archived = archive.is_file()
            root.mkdir(exist_ok=True)
            with _alone(root):
                missing = not all((folder / name).is_file() for name in names)
                if missing:
                    with _patient():
                        files(root, download=True)
            data = files(root, train=train)
        except _CIFAR_ERRORS as error:
            if isinstance(error, OSError) and error.filename and not isinstance(error, urllib.error.URLError):
                raise UserError(
                    f"cannot use {error.filename}: {error.strerror}; check --root and its permissions"
                ) from error
            reason = f"the download failed: {error}" if missing else "checksums differ"
            if missing and archived:
                reason = f"{archive} is damaged, and {reason}"
            elif archived:
                raise UserError(
                    f"no usable files in {folder} ({reason}): remove that folder; the next start unpacks {archive}"
                ) from error
            raise UserError(
                f"no usable files in {folder} ({reason}): remove that folder if there is one, download "
                f"{files.url} and put it at {archive}, which the next start unpacks"
            ) from error
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor(data.targets)


_CIFAR10 = Cifar("CIFAR10", 10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
_CIFAR100 = Cifar("CIFAR100", 100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))


# ---- imagenet, dali: a folder of image files


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _check_imagenet(config: DataConfig) -> None:
    from utils.folder import check_folders  # here and below: runs on other data need not wait for torchvision

    classes = check_folders(config.root, config.dataset, val=bool(config.val_batch_size))
    _check_classes(config, classes, f"{config.root}")


def _build_imagenet(config: DataConfig, device: torch.device) -> Loaders:
    from utils.folder import FolderLoader

    return _folder_loaders(config, device, partial(FolderLoader, randaugment=config.rand_augment))


def _folder_loaders(config: DataConfig, device: torch.device, loader: Callable[..., Loader]) -> Loaders:
    """Loaders over the folders of `--root`, made by `FolderLoader` or one that takes the same arguments."""
    from utils.folder import ImageNames, Unreadable

    assert config.root is not None  # checked
    root, unreadable = config.root, Unreadable(config.skip_corrupt)

    def open_(delivery: Delivery) -> Loader:
        return loader(
            ImageNames(root / ("train" if delivery.train else "val")),
            delivery,
            size=config.input_size,
            workers=config.workers,
            unreadable=unreadable,
        )

    return _loaders(config, _deliveries(config, device, IMAGENET_MEAN, IMAGENET_STD), open_)


def _check_dali(config: DataConfig) -> None:
    install = (
        "pip install nvidia-dali-cuda130 (or the one of your CUDA version); --dataset imagenet reads the same "
        "folders without it"
    )
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        raise UserError(f"--dataset dali needs NVIDIA's DALI: {install}")
    try:
        from utils import dali  # noqa: F401
    except (ImportError, OSError) as error:  # one of another platform, or a library that it needs
        raise UserError(
            f"--dataset dali: NVIDIA's DALI is installed but cannot be imported ({error}): {install}"
        ) from error
    _check_imagenet(config)


def _build_dali(config: DataConfig, device: torch.device) -> Loaders:
    from utils.dali import DaliLoader  # imports an optional library

    return _folder_loaders(config, device, DaliLoader)


SOURCES: dict[str, Source] = {
    "digits": Source(_check_digits, _build_digits),
    "fake": Source(_check_fake, _build_fake),
    "glyphs": Source(_check_glyphs, _build_glyphs),
    "cifar10": Source(_CIFAR10.check, _CIFAR10.build),
    "cifar100": Source(_CIFAR100.check, _CIFAR100.build),
    "imagenet": Source(_check_imagenet, _build_imagenet),
    "dali": Source(_check_dali, _build_dali),
}
"""Every data set by its name."""


_FARTHEST = (
    1e6  # of a mean or deviation from 1, where images are in [0, 1]; float32 has room for their quotient
)


def check(config: DataConfig) -> None:
    """Look for mistakes that are cheap to find, before anything heavy is built.

    Nothing is downloaded or read beyond the names of folders and files.

    Raises:
        UserError: an unknown data set; a number of classes that is not the set's; a root, its `train/` or
            `val/`, class folders or images that are missing; classes that differ between training and
            validation; a mean or std that is not of three channels or too large or
            small for float32; RandAugment where it is not;
            too many workers; DALI that is not installed or cannot be imported.
    """
    if config.dataset not in SOURCES:
        raise UserError(f"--dataset {config.dataset} is unknown: choose one of {', '.join(SOURCES)}")
    if config.rand_augment is not None and config.dataset in ("dali", "digits", "glyphs"):
        raise UserError(
            f"--rand_augment is not for --dataset {config.dataset}: use imagenet, cifar10, cifar100 or fake"
        )
    for name, values in (("mean", config.mean), ("std", config.std)):
        if values is not None and len(values) != 3:
            raise UserError(f"--{name} has {len(values)} values: write three, for red, green and blue")
        if values is not None and max(map(abs, values)) > _FARTHEST:
            raise UserError(
                f"--{name} has the value {max(values, key=abs):g}: write {_FARTHEST:g} at the most"
            )
    if config.std is not None and min(config.std) < 1 / _FARTHEST:
        raise UserError(
            f"--std has the value {min(config.std):g}: write numbers above 0, {1 / _FARTHEST:g} at the least"
        )
    workers.check(config.workers)
    try:
        SOURCES[config.dataset].check(config)
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: {error.strerror}; check --root and its permissions"
        ) from error


def build(config: DataConfig, device: torch.device = CPU) -> Loaders:
    """Check the configuration and open the data set it names.

    Args:
        config: the data set, its batches and their augmentation.
        device: where the batches are wanted.

    Returns:
        The loaders of both sets; `val` is None when `val_batch_size` is 0.

    Raises:
        UserError: as `check`; or the CIFAR files are missing and cannot be downloaded, or are damaged.
    """
    check(config)
    return SOURCES[config.dataset].build(config, device)
