"""CIFAR-10 and CIFAR-100: the python files of https://www.cs.toronto.edu/~kriz/cifar.html, read into memory."""

from __future__ import annotations

import http.client
import pickle
import tarfile
import urllib.error
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from utils.config.schema import DataConfig
from utils.data.augment import crop_flip
from utils.data.download import patient
from utils.data.loaders import Loaders, check_classes, tensor_loaders
from utils.data.lock import exclusive
from utils.errors import UserError

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

_CIFAR_ERRORS = (
    OSError,
    RuntimeError,
    http.client.HTTPException,
    EOFError,
    pickle.UnpicklingError,
    tarfile.TarError,
    zlib.error,
)
"""Exceptions of a failed download, a damaged archive and damaged files."""


@dataclass(frozen=True)
class Cifar:
    """A CIFAR set, with the functions of a `Source`: the name of torchvision's class, and the usual statistics."""

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
        check_classes(config, self.num_classes, f"--dataset {config.dataset}")
        if config.root is not None and not config.root.is_dir():
            raise UserError(
                f"--root {config.root} is not a folder: name the one that holds {self.files.base_folder}, "
                f"or make it, and {self.files.filename} is downloaded into it"
            )

    def build(self, config: DataConfig, device: torch.device, _: None) -> Loaders:
        """Load both sets into memory; files that are missing are downloaded."""
        root = Path("data") if config.root is None else config.root
        return tensor_loaders(
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
            with exclusive(root):
                missing = not all((folder / name).is_file() for name in names)
                if missing:
                    with patient():
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


CIFAR10_SET = Cifar("CIFAR10", 10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
CIFAR100_SET = Cifar("CIFAR100", 100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
