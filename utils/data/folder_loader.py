"""The loader of image files in a folder per class, decoded by Pillow in worker processes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from utils.config.image_size import InputSize, sides
from utils.data import workers
from utils.data.crop import crop_and_flip, put, resize, resize_to_centre
from utils.data.image_file import DECODE_ERRORS, PLAIN, Decoding, decode, reason_of
from utils.data.image_folder import Unreadable, note
from utils.data.images import Images
from utils.data.loader import Delivery, Loader, Raw, rand_augment
from utils.errors import TrainingError, UserError

_PREFETCH = 2  # batches that each worker may be ahead


class _Batch(NamedTuple):
    """A request to a worker: the epoch, the images' numbers in it and in the set, and the slot to put them into."""

    epoch: int
    numbers: list[int]
    images: list[int]
    slot: int


_Read = tuple[list[int], list[tuple[int, str]]]
"""A worker's answer: the numbers in the epoch of a batch's images in their order, and the numbers in the set of
unreadable ones with the reason.
The reason is no exception, because a worker's exception would arrive with its traceback as its message."""


class _ImageFiles(Dataset[_Read]):
    """Batches of images, decoded, cropped and resized into `slots`, uint8 [slots, N, H, W, 3]."""

    def __init__(
        self,
        images: Images,
        slots: Tensor,
        *,
        decoding: Decoding,
        train: bool,
        randaugment: int | None,
        seed: int,
    ) -> None:
        self._images = images
        self._decoding = decoding
        self._slots = slots
        self._train = train
        self._augment = None if randaugment is None else v2.RandAugment(magnitude=randaugment)
        self._seed = seed

    def __getitem__(self, batch: _Batch) -> _Read:
        good: list[int] = []
        bad: list[tuple[int, str]] = []
        for number, index in zip(batch.numbers, batch.images, strict=True):
            try:
                image = decode(self._images.read(index), self._decoding)
                self._fit(image, batch.epoch, number, self._slots[batch.slot, len(good)])
            except DECODE_ERRORS as error:
                bad.append((index, reason_of(error)))
                continue
            good.append(number)
        return good, bad

    def _fit(self, image: Image.Image, epoch: int, index: int, to: Tensor) -> None:
        """Crop and resize an image into `to`, uint8 [H, W, 3]."""
        size = (to.shape[0], to.shape[1])
        if not self._train:
            put(resize_to_centre(_pixels(image), size), to, flip=False)
            return
        (top, left, height, width), flip = crop_and_flip(
            image.height, image.width, size, self._seed, epoch, index
        )
        pixels = resize(_pixels(image.crop((left, top, left + width, top + height))), *size)
        if self._augment is not None:
            pixels = pixels.flip(-1) if flip else pixels
            pixels, flip = rand_augment(self._augment, pixels, self._seed, epoch, index), False
        put(pixels, to, flip=flip)


def _pixels(image: Image.Image) -> Tensor:
    """The pixels, uint8 [H, W, 3]; torchvision resizes them faster than Pillow resizes an image."""
    return torch.from_numpy(np.array(image))


def _shared(shape: tuple[int, ...], workers: int) -> Tensor:
    """Make a tensor of bytes, uint8, in memory shared with other processes."""
    try:
        return torch.empty(shape, dtype=torch.uint8).share_memory_()
    except RuntimeError as error:  # torch raises it when shared memory is used up
        raise UserError(
            f"{workers} workers need {math.prod(shape) >> 20} MiB of shared memory for their batches, which is "
            "more than there is: write fewer --workers or a smaller --batch_size or --val_batch_size, or let "
            "the machine or container have more (/dev/shm)"
        ) from error


class _Batches(Sampler[_Batch]):
    """The batches of the coming iteration; workers learn the epoch from them alone.

    Slots are used in turn. The `DataLoader` asks for a batch when it hands out the one `ahead` batches before it,
    so that at most `ahead + 1` batches exist. The loader has finished all earlier ones.
    """

    def __init__(self, ahead: int) -> None:
        self.slots = ahead + 1
        self.batches: Sequence[Tensor] = ()
        self.images: Sequence[Tensor] = ()
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[_Batch]:
        for number, (index, images) in enumerate(zip(self.batches, self.images, strict=True)):
            yield _Batch(self.epoch, index.tolist(), images.tolist(), number % self.slots)


class FolderLoader(Loader):
    """Batches of image files in a folder per class, read and cropped by worker processes.

    Args:
        images: where they lie.
        delivery: how batches are cut and finished.
        size: of the images of a batch.
        workers: number of processes, at most the number of batches; they stay between epochs. 0: read in this process.
        unreadable: records images that cannot be decoded. Their batch is smaller; a validation batch without any other
            images is left out.
        decoding: what decoding does with the pixels.
        randaugment: magnitude of RandAugment in training; None: none.

    Raises:
        UserError: while iterating, when more images than allowed cannot be decoded; names the path.
        TrainingError: while iterating, when a worker has died.
    """

    def __init__(
        self,
        images: Images,
        delivery: Delivery,
        *,
        size: InputSize,
        workers: int,
        unreadable: Unreadable,
        decoding: Decoding = PLAIN,
        randaugment: int | None = None,
    ) -> None:
        super().__init__(torch.from_numpy(images.target), delivery)
        self._images = images
        self._size = sides(size)
        self._workers = min(workers, len(self))
        self._unreadable = unreadable
        self._decoding = decoding
        self._randaugment = randaugment
        self._asked = _Batches(ahead=_PREFETCH * self._workers)
        self._slots = torch.empty(0)
        self._loader: DataLoader[_Read] | None = None  # opened by the first iteration

    def _open(self) -> DataLoader[_Read]:
        """Make the slots, in memory shared with the workers, and the `DataLoader` that starts the workers."""
        count = min(self._delivery.batch_size, self.samples)
        shape = (self._asked.slots, count, *self._size, 3)
        context = begin = None
        # Slots are reused: fresh pages of memory cost more time than writing into them.
        if not self._workers:
            self._slots = torch.empty(shape, dtype=torch.uint8)
        else:
            self._slots = _shared(shape, self._workers)
            context, begin = workers.prepare(self, preload=__name__)
        # The warning is about more workers than cores, which the user asked for.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        return DataLoader(
            _ImageFiles(
                self._images, self._slots, decoding=self._decoding, train=self._delivery.train,
                randaugment=self._randaugment, seed=self._delivery.seed,
            ),
            sampler=self._asked,
            batch_size=None,  # each request is a whole batch already
            num_workers=self._workers,
            prefetch_factor=_PREFETCH if self._workers else None,
            persistent_workers=self._workers > 0,
            multiprocessing_context=context,
            worker_init_fn=begin,
            generator=torch.Generator(),  # else each iteration draws from the global one
        )  # fmt: skip

    def identity(self) -> dict[str, str]:
        """As in `Loader`; with the classes and the names of the files."""
        return super().identity() | self._images.identity()

    def name(self, number: int) -> str:
        """Where an image lies."""
        return self._images.name(number)

    def _read(self, batches: Sequence[Tensor], epoch: int) -> Iterator[Raw]:
        self._loader = self._loader or self._open()
        asked = self._asked
        asked.batches, asked.epoch = batches, epoch
        asked.images = [self.drawn(batch, epoch) for batch in batches]
        for number, (good, bad) in enumerate(_answers(self._loader)):
            note(self._unreadable, self._images, bad, left=len(good), train=self._delivery.train)
            if not good:  # in validation only
                continue
            images = self._slots[number % asked.slots, : len(good)]
            images = images.pin_memory() if self._on_cuda else images
            index = torch.tensor(good)
            yield Raw(images.permute(0, 3, 1, 2), self.target[self.drawn(index, epoch)], index)


def _answers(loader: DataLoader[_Read]) -> Iterator[_Read]:
    """The workers' answers. Raises `TrainingError` when a worker has died."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # raised by a worker's own code
            raise
        raise TrainingError(
            "a process that reads images was ended, perhaps because memory ran out; try fewer --workers"
        ) from error
