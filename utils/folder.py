"""Image files in a folder per class: their names, how one is read, and the loader of torchvision's decoders."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import is_image_file
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from utils import workers
from utils.augment import CROP_DRAWS, centre_crop, random_crop
from utils.errors import TrainingError, UserError, printable
from utils.images import DECODE_ERRORS, decode, read, reason_of, walk
from utils.loader import AUGMENT, PART, Delivery, Loader, Raw, rand_augment, seed_of

SLENDER = 16  # times longer than wide
_PREFETCH = 2  # batches that each worker may be ahead


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
        shown = printable(path)
        if len(self.paths) >= self.limit:
            more = (
                f"{self.limit} others are left out already" if self.limit else "--skip_corrupt N leaves out N"
            )
            raise UserError(
                f"cannot read the image {shown} ({reason}): replace or remove it ({more}; "
                "tools.py --keyword verify-data lists all such files)"
            )
        self.paths.add(path)
        logging.getLogger("train").warning(
            "left out an image that cannot be read, %d of %d: %s (%s)",
            len(self.paths), self.limit, shown, reason, extra={"of_each_process": True},
        )  # fmt: skip


class ImageNames:
    """Paths and classes of the images in a folder per class, in the order of torchvision's `ImageFolder`.

    Attributes:
        target: classes, int64 [samples].

    Raises:
        UserError: a folder cannot be listed.
    """

    def __init__(self, folder: Path) -> None:
        classes = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
        # Not `ImageFolder` itself: it has the images below a link that leads back up some forty times.
        images = [_images(Path(path)) for path in classes]
        # Arrays, not lists of objects: they reach the workers quickly and are stored once per worker.
        self._paths = np.array([os.fsencode(path) for paths in images for path in paths])
        self.target = np.repeat(np.arange(len(classes)), [len(paths) for paths in images])

    def __len__(self) -> int:
        return len(self.target)

    def path(self, index: int) -> str:
        """Return the path of an image."""
        return os.fsdecode(bytes(self._paths[index]))


def _images(folder: Path) -> list[str]:
    """Paths of the image files below a folder, sorted by folder and name."""
    return [
        os.path.join(path, name)
        for path, names in sorted(walk(folder))
        for name in names
        if is_image_file(name)
    ]


def crop_and_flip(
    height: int, width: int, seed: int, epoch: int, index: int
) -> tuple[tuple[int, int, int, int], bool]:
    """Return the random crop (top, left, height, width) of an image in an epoch, and whether it is flipped."""
    words = np.random.default_rng(seed_of(AUGMENT, seed, epoch, index))
    *draws, flip = words.random(CROP_DRAWS + 1).tolist()
    return random_crop(height, width, draws), flip < 0.5


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize an image, uint8 [H, W, 3], bilinearly with antialiasing, to [3, height, width]."""
    # A batch in channels-last order: torchvision takes twice as long for any other order.
    return functional.resize(pixels[None].permute(0, 3, 1, 2), [height, width], antialias=True)[0]


def resize_to_centre(pixels: Tensor, size: int) -> Tensor:
    """Resize an image, uint8 [H, W, 3], as `centre_crop` says, and return its centre, [3, size, size].

    Of one that is more than `SLENDER` times as long as wide only the middle is resized, since the whole would be as
    much longer than the centre. That may move the picture by up to a pixel.
    """
    for side in (0, 1):
        beyond = pixels.shape[side] - SLENDER * pixels.shape[1 - side]
        if beyond > 0:
            pixels = pixels.narrow(side, beyond // 2, pixels.shape[side] - beyond)
    height, width, top, left = centre_crop(pixels.shape[0], pixels.shape[1], size)
    return functional.crop(resize(pixels, height, width), top, left, size, size)


def put(image: Tensor, to: Tensor, *, flip: bool) -> None:
    """Copy an image, uint8 [3, S, S], to `to`, uint8 [S, S, 3], if wanted flipped left to right."""
    rows = max(1, PART // (3 * image.shape[2]))
    for source, target in zip(image.split(rows, 1), to.split(rows), strict=True):
        target.copy_((source.flip(-1) if flip else source).permute(1, 2, 0))


class _Batch(NamedTuple):
    """What a worker is asked for: an epoch, images by their numbers, and the slot where they are put."""

    epoch: int
    numbers: list[int]
    slot: int


_Read = tuple[list[int], list[tuple[int, str]]]
"""The numbers of a batch's images in the order they are in, and those of unreadable ones with the reason. A
value, not an exception: a worker's exception would arrive with its traceback as its message."""


class _ImageFiles(Dataset[_Read]):
    """Batches of images, decoded, cropped and resized into `slots`, uint8 [slots, N, S, S, 3]."""

    def __init__(
        self, names: ImageNames, slots: Tensor, *, train: bool, randaugment: int | None, seed: int
    ) -> None:
        self._names = names
        self._slots = slots
        self._train = train
        self._augment = None if randaugment is None else v2.RandAugment(magnitude=randaugment)
        self._seed = seed

    def __getitem__(self, batch: _Batch) -> _Read:
        good: list[int] = []
        bad: list[tuple[int, str]] = []
        for index in batch.numbers:
            try:
                image = decode(read(self._names.path(index)))
                self._fit(image, batch.epoch, index, self._slots[batch.slot, len(good)])
            except DECODE_ERRORS as error:
                bad.append((index, reason_of(error)))
                continue
            good.append(index)
        return good, bad

    def _fit(self, image: Image.Image, epoch: int, index: int, to: Tensor) -> None:
        """Crop and resize an image into `to`, uint8 [S, S, 3]."""
        size = len(to)
        if not self._train:
            put(resize_to_centre(_pixels(image), size), to, flip=False)
            return
        (top, left, height, width), flip = crop_and_flip(image.height, image.width, self._seed, epoch, index)
        pixels = resize(_pixels(image.crop((left, top, left + width, top + height))), size, size)
        if self._augment is not None:
            pixels = pixels.flip(-1) if flip else pixels
            pixels, flip = rand_augment(self._augment, pixels, self._seed, epoch, index), False
        put(pixels, to, flip=flip)


def _pixels(image: Image.Image) -> Tensor:
    """The pixels, uint8 [H, W, 3], which torchvision resizes faster than Pillow does an image."""
    return torch.from_numpy(np.array(image))


def _shared(shape: tuple[int, ...], workers: int) -> Tensor:
    """Make a tensor of bytes, uint8, in memory that other processes can have too."""
    try:
        return torch.empty(shape, dtype=torch.uint8).share_memory_()
    except RuntimeError as error:  # what torch raises when the system has no more
        raise UserError(
            f"{workers} workers need {math.prod(shape) >> 20} MiB of shared memory for their batches, which is "
            "more than there is: write fewer --workers or a smaller --batch_size or --val_batch_size, or let "
            "the machine or container have more (/dev/shm)"
        ) from error


class _Batches(Sampler[_Batch]):
    """The batches of the coming iteration; the only way an epoch reaches a worker.

    Slots are used in turn. The `DataLoader` asks for a batch when it hands out one that it asked for `ahead`
    batches before, so that at most `ahead + 1` batches exist, and the loader has finished all earlier ones.
    """

    def __init__(self, ahead: int) -> None:
        self.slots = ahead + 1
        self.batches: Sequence[Tensor] = ()
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[_Batch]:
        for number, index in enumerate(self.batches):
            yield _Batch(self.epoch, index.tolist(), number % self.slots)


class FolderLoader(Loader):
    """Batches of image files in a folder per class, read and cropped by worker processes.

    Args:
        names: the images.
        delivery: how batches are cut and finished.
        size: height and width of the images of a batch, in pixels.
        workers: number of processes, which stay between epochs, no more than batches; 0: read in this process.
        unreadable: takes note of images that cannot be decoded; a batch that lacks them is smaller, and left out in
            validation when it lacks all.
        randaugment: magnitude of RandAugment in training; None: none.

    Raises:
        UserError: while iterating, when one image too many cannot be decoded; names its path.
        TrainingError: while iterating, when a worker was ended.
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
        self._size = size
        self._workers = min(workers, len(self))
        self._unreadable = unreadable
        self._randaugment = randaugment
        self._asked = _Batches(ahead=_PREFETCH * self._workers)
        self._slots = torch.empty(0)
        self._loader: DataLoader[_Read] | None = None  # opened by the first iteration

    def _open(self) -> DataLoader[_Read]:
        """Make the slots, in memory that is shared with the workers, and what starts these."""
        count = min(self._delivery.batch_size, self.samples)
        shape = (self._asked.slots, count, self._size, self._size, 3)
        context = begin = None
        # The same memory again and again: fresh pages cost more than what is written into them.
        if not self._workers:
            self._slots = torch.empty(shape, dtype=torch.uint8)
        else:
            self._slots = _shared(shape, self._workers)
            context, begin = workers.prepare(self, preload=__name__)
        # Of more workers than cores, which was asked for.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        return DataLoader(
            _ImageFiles(
                self._names, self._slots, train=self._delivery.train,
                randaugment=self._randaugment, seed=self._delivery.seed,
            ),
            sampler=self._asked,
            batch_size=None,  # what is asked for is a batch already
            num_workers=self._workers,
            prefetch_factor=_PREFETCH if self._workers else None,
            persistent_workers=self._workers > 0,
            multiprocessing_context=context,
            worker_init_fn=begin,
            generator=torch.Generator(),  # else each iteration draws from the global one
        )  # fmt: skip

    def _read(self, batches: Sequence[Tensor], epoch: int) -> Iterator[Raw]:
        self._loader = self._loader or self._open()
        asked = self._asked
        asked.batches, asked.epoch = batches, epoch
        for number, (good, bad) in enumerate(_answers(self._loader)):
            note(self._unreadable, self._names, bad, left=len(good), train=self._delivery.train)
            if not good:  # of validation
                continue
            images = self._slots[number % asked.slots, : len(good)]
            images = images.pin_memory() if self._on_cuda else images
            index = torch.tensor(good)
            yield Raw(images.permute(0, 3, 1, 2), self._target[index], index)


def _answers(loader: DataLoader[_Read]) -> Iterator[_Read]:
    """What the workers have read. Raises `TrainingError` when one of them is gone."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # but one that a worker has raised
            raise
        raise TrainingError(
            "a process that reads images was ended, perhaps because memory ran out; try fewer --workers"
        ) from error


def note(
    unreadable: Unreadable, names: ImageNames, bad: Sequence[tuple[int, str]], left: int, *, train: bool
) -> None:
    """Take note of a batch's unreadable images.

    Raises `UserError` also when too few are left of a training batch for batch statistics: one or none.
    """
    for index, reason in bad:
        unreadable.add(names.path(index), reason)
    if bad and train and left <= 1:
        few = f"{'a single' if left else 'no'} image of a training batch"
        raise UserError(
            f"{few} can be read, the last that cannot is {printable(names.path(bad[-1][0]))}: replace or remove them "
            "(tools.py --keyword verify-data lists all such files), or write a larger --batch_size"
        )


def check_folders(root: Path | None, dataset: str, *, val: bool) -> int:
    """Return the number of classes of `train/` in `root`, and of `val/` when that is wanted.

    Raises:
        UserError: a folder is missing, has no class folders, some without images or a link that leads nowhere; the
            classes differ.
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
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    lost = [entry.name for entry in entries if not os.path.exists(entry.path)]
    if lost:
        raise UserError(f"{folder} has links that lead nowhere: mend or remove {_some(lost)}")
    classes = [entry.name for entry in entries if entry.is_dir()]
    if not classes:
        raise UserError(f"{folder} has no class folders: put its images into one folder per class")
    empty = [name for name in classes if not _has_image(folder / name)]
    if empty:
        raise UserError(f"{folder} has class folders without images: fill or remove {_some(empty)}")
    return classes


def _has_image(folder: Path) -> bool:
    return any(is_image_file(name) for _, names in walk(folder) for name in names)


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(printable, names[:3])) + more
