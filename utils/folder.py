"""Image files in a folder per class: their names, how one is read, and the loader of torchvision's decoders."""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.util import Finalize
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from utils.augment import CROP_DRAWS, centre_crop, random_crop
from utils.errors import UserError
from utils.interrupt import SIGNALS
from utils.loader import AUGMENT, Delivery, Loader, Raw, seed_of

# What Pillow raises for files that are missing, truncated, no image, broken inside or suspiciously large.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass
class Unreadable:
    """The images of a run that could not be read, up to the number that may be left out.

    Attributes:
        limit: how many images may be left out.
        paths: those left out so far; an image counts once, however often it is met.
    """

    limit: int
    paths: set[str] = field(default_factory=set)

    def add(self, path: str, reason: str) -> None:
        """Leave an image out and say so in the log. Raises `UserError` when it is one too many."""
        if path in self.paths:
            return
        if len(self.paths) >= self.limit:
            more = (
                f"{self.limit} others are left out already" if self.limit else "--skip_corrupt N leaves out N"
            )
            raise UserError(
                f"cannot read the image {path} ({reason}): replace or remove it ({more}; "
                "tools.py --keyword verify-data lists all such files)"
            )
        self.paths.add(path)
        logging.getLogger("train").warning(
            "left out an image that cannot be read, %d of %d: %s (%s)",
            len(self.paths), self.limit, path, reason,
        )  # fmt: skip


class ImageNames:
    """Paths and classes of the images in a folder per class.

    Attributes:
        target: classes, int64 [samples].
    """

    def __init__(self, folder: Path) -> None:
        files = ImageFolder(folder)
        # Arrays, not lists of objects: they reach the workers quickly and are stored once per worker.
        self._paths = np.array([os.fsencode(path) for path, _ in files.samples])
        self.target = np.array(files.targets)

    def __len__(self) -> int:
        return len(self.target)

    def path(self, index: int) -> str:
        """Return the path of an image."""
        return os.fsdecode(bytes(self._paths[index]))


def crop_and_flip(
    height: int, width: int, seed: int, epoch: int, index: int
) -> tuple[tuple[int, int, int, int], bool]:
    """Return the random crop (top, left, height, width) of an image in an epoch, and whether it is flipped."""
    words = np.random.default_rng(seed_of(AUGMENT, seed, epoch, index))
    *draws, flip = words.random(CROP_DRAWS + 1).tolist()
    return random_crop(height, width, draws), flip < 0.5


def decode(data: bytes) -> Image.Image:
    """Decode an image file to RGB. Raises DECODE_ERRORS."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def reason_of(error: BaseException) -> str:
    """Return what is wrong with a file, in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = "no image" if isinstance(error, Image.UnidentifiedImageError) else text
    return " ".join(text.split()) or type(error).__name__


# An image [S, S, 3], or the reason why there is none. A value, not an exception: a worker's exception would
# arrive with its traceback as its message.
_Sample = Tensor | str


class _ImageFiles(Dataset[tuple[int, _Sample]]):
    """Images, decoded, cropped and resized, uint8; a key is (epoch, index)."""

    def __init__(
        self, names: ImageNames, size: int, *, train: bool, randaugment: int | None, seed: int
    ) -> None:
        self._names = names
        self._size = size
        self._train = train
        self._augment = None if randaugment is None else v2.RandAugment(magnitude=randaugment)
        self._seed = seed

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, _Sample]:
        epoch, index = key
        try:
            with open(self._names.path(index), "rb") as file:
                image = decode(file.read())
        except DECODE_ERRORS as error:
            return index, reason_of(error)
        if not self._train:
            height, width, top, left = centre_crop(image.height, image.width, self._size)
            pixels = functional.resize(_pixels(image), [height, width], antialias=True)
            pixels = functional.crop(pixels, top, left, self._size, self._size)
        else:
            crop, flip = crop_and_flip(image.height, image.width, self._seed, epoch, index)
            top, left, height, width = crop
            pixels = _pixels(image.crop((left, top, left + width, top + height)))
            pixels = functional.resize(pixels, [self._size, self._size], antialias=True)
            pixels = pixels.flip(-1) if flip else pixels
            if self._augment is not None:
                pixels = rand_augment(self._augment, pixels, self._seed, epoch, index)
        return index, pixels.permute(1, 2, 0).contiguous()


def _pixels(image: Image.Image) -> Tensor:
    """The pixels, uint8 [3, H, W], which torchvision resizes faster than Pillow does an image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def rand_augment(augment: v2.Transform, image: Tensor, seed: int, epoch: int, index: int) -> Tensor:
    """Apply a transform that draws from torch's generator to an image, uint8 [C, H, W]."""
    # Only the CPU's generator is touched: `torch.manual_seed` would also change the accelerator's.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(AUGMENT, seed, epoch, index, 1))
        return augment(image)


_Collated = tuple[
    Tensor, list[int], list[tuple[int, str]]
]  # images [N, S, S, 3], their numbers; the unreadable


def _collate(samples: list[tuple[int, _Sample]]) -> _Collated:
    good = [(index, image) for index, image in samples if isinstance(image, Tensor)]
    bad = [(index, reason) for index, reason in samples if isinstance(reason, str)]
    images = torch.stack([image for _, image in good]) if good else torch.empty(0)
    return images, [index for index, _ in good], bad


def _start_worker(training: Connection, _: int) -> None:
    """Let signals be the training's business, which ends its workers when it has saved; end with it at the latest."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def end_with_training() -> None:
        with contextlib.suppress(EOFError):
            training.recv()  # nothing ever comes, the other end is closed
        os._exit(0)

    threading.Thread(target=end_with_training, daemon=True).start()


def _start_server(context: ForkServerContext) -> None:
    """Start the process that workers are forked from, as deaf to the signals as they are."""
    context.set_forkserver_preload([__name__])  # what it has imported need not be imported by each worker
    former = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited; what comes meanwhile is not lost
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


class _Keys(Sampler[list[tuple[int, int]]]):
    """The batches of keys (epoch, index) of the coming iteration; the only way an epoch reaches a worker."""

    def __init__(self) -> None:
        self.batches: Sequence[Tensor] = ()
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for index in self.batches:
            yield [(self.epoch, i) for i in index.tolist()]


class FolderLoader(Loader):
    """Batches of image files in a folder per class, read and cropped by worker processes.

    Args:
        names: the images.
        delivery: how batches are cut and finished.
        size: height and width of the images of a batch, in pixels.
        workers: number of processes, which stay between epochs; 0: read in this process.
        unreadable: takes note of images that cannot be decoded; a batch that lacks them is smaller.
        randaugment: magnitude of RandAugment in training; None: none.

    Raises:
        UserError: while iterating, when one image too many cannot be decoded; names its path.
    """

    def __init__(
        self,
        names: ImageNames,
        delivery: Delivery,
        *,
        size: int,
        workers: int,
        unreadable: Unreadable,
        randaugment: int | None = None,
    ) -> None:
        super().__init__(len(names), delivery)
        self._names = names
        self._target = torch.from_numpy(names.target)
        self._unreadable = unreadable
        context = start_worker = None
        if workers:
            # Forking this process, which has threads, may deadlock. The server has one.
            context = multiprocessing.get_context("forkserver")
            _start_server(context)
            theirs, mine = context.Pipe(duplex=False)
            Finalize(self, mine.close, exitpriority=0)  # at exit too, before workers are waited for
            start_worker = partial(_start_worker, theirs)
        self._keys = _Keys()
        self._loader = DataLoader(
            _ImageFiles(names, size, train=delivery.train, randaugment=randaugment, seed=delivery.seed),
            batch_sampler=self._keys,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=self._on_cuda,
            persistent_workers=workers > 0,
            multiprocessing_context=context,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # else each iteration draws from the global one
        )

    def _read(self, batches: Sequence[Tensor], epoch: int) -> Iterator[Raw]:
        self._keys.batches, self._keys.epoch = batches, epoch
        for images, numbers, bad in self._loader:
            note(self._unreadable, self._names, bad, left=len(numbers))
            index = torch.tensor(numbers)
            yield Raw(images.permute(0, 3, 1, 2), self._target[index], index)


def note(unreadable: Unreadable, names: ImageNames, bad: Sequence[tuple[int, str]], left: int) -> None:
    """Take note of a batch's unreadable images. Raises `UserError` also when nothing is left of the batch."""
    for index, reason in bad:
        unreadable.add(names.path(index), reason)
    if not left:
        raise UserError(
            f"no image of a batch can be read, the last is {names.path(bad[-1][0])}: replace or remove them "
            "(tools.py --keyword verify-data lists all such files)"
        )


def check_folders(root: Path | None, dataset: str, *, val: bool) -> int:
    """Return the number of classes of `train/` in `root`, and of `val/` when that is wanted.

    Raises:
        UserError: a folder is missing, has no class folders, or some without images; the classes differ.
    """
    if root is None:
        raise UserError(f"--dataset {dataset} needs --root: the folder that holds train/ and val/")
    if not root.is_dir():
        raise UserError(f"--root {root} is not a folder: name the one that holds train/ and val/")
    classes = _class_folders(root / "train")
    if val:
        other = set(classes) ^ set(_class_folders(root / "val"))
        if other:
            raise UserError(
                f"train/ and val/ in {root} have different classes: {_some(sorted(other))} must be in both"
            )
    return len(classes)


def _class_folders(folder: Path) -> list[str]:
    """Names of the class folders, sorted; raises `UserError` unless there are some and each has an image."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} is missing: --root names the folder that holds train/ and val/, each with a folder "
            "per class"
        )
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise UserError(f"{folder} has no class folders: put its images into one folder per class")
    empty = [name for name in classes if not _has_image(folder / name)]
    if empty:
        raise UserError(f"{folder} has class folders without images: fill or remove {_some(empty)}")
    return classes


def _has_image(folder: Path) -> bool:
    walk = os.walk(folder, followlinks=True)  # as torchvision does
    return any(is_image_file(name) for _, _, names in walk for name in names)


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
