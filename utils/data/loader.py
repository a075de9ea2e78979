"""The contract of all loaders: the batches of an epoch depend on (seed, epoch) and nothing else.

No loader reads or changes global random state. The order of an epoch is drawn from (seed, epoch), the
augmentation of a sample from (seed, epoch, index of the sample); neither the number of workers nor earlier
reads matter. A run resumed at batch k of an epoch gets the same batches as an uninterrupted run. Together, the
processes of a distributed run get the batches of a single process with the batch size of all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.data.augment import COLOUR_DRAWS, colour
from utils.data.grey import grey
from utils.errors import UserError

if TYPE_CHECKING:
    from torchvision.transforms import v2

Batch = tuple[Tensor, Tensor]
"""Images, float32 [N, C, H, W], normalised per channel, in channels-last order, on the loader's device; and
their classes, int64 [N], or of mixed images the shares of the classes, float32 [N, classes]."""

# The first word of a seed keeps the streams of random numbers apart.
_ORDER, AUGMENT, PATTERN, NOISE, _COLOUR, _MIX, _BALANCE = range(1, 8)

# A CPU finishes a batch in parts of this many numbers, which stay in its cache. Torch does not divide fewer numbers
# among threads; these would have to wait for cores that are decoding the next batches.
PART = 2**15


def seed_of(*words: int) -> int:
    """Mix words into one 64-bit seed (NumPy's `SeedSequence`), so that neighbouring words are unrelated."""
    mixed = np.random.SeedSequence([word % 2**64 for word in words])
    return int(mixed.generate_state(1, np.uint64)[0])


def generator(*words: int) -> torch.Generator:
    """Return a generator of the CPU that is seeded by these words."""
    return torch.Generator().manual_seed(seed_of(*words))


def rand_augment(augment: v2.Transform, image: Tensor, seed: int, epoch: int, index: int) -> Tensor:
    """Apply a transform that draws from torch's generator to an image, uint8 [C, H, W]."""
    # Only the CPU's generator is touched: `torch.manual_seed` would also change the accelerator's.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(AUGMENT, seed, epoch, index, 1))
        return augment(image)


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which an epoch visits its samples.

    A pure function of its arguments, so that every process of a distributed run can compute the whole order
    and take its share.

    Args:
        samples: number of samples of the set.
        seed: the run's seed.
        epoch: number of the epoch, from 0.

    Returns:
        A permutation of 0 ... samples - 1, int64 [samples].
    """
    return torch.randperm(samples, generator=generator(_ORDER, seed, epoch))


def balanced_samples(target: Tensor, seed: int, epoch: int) -> Tensor:
    """Draw the samples of an epoch whose classes are equally frequent.

    Each position's class is drawn uniformly, and of its samples one at random; with replacement, so that samples of a
    rare class come several times and some of a frequent one not at all.

    Args:
        target: classes of the set's samples, int64 [samples].
        seed: the run's seed.
        epoch: number of the epoch, from 0.

    Returns:
        Numbers of samples, int64 [samples].
    """
    weights = 1 / torch.bincount(target).double()[target]
    # By inverting the cumulative sum: torch's multinomial takes no more than 2^24 samples.
    ends = weights.cumsum(0)
    draws = torch.rand(len(target), dtype=torch.float64, generator=generator(_BALANCE, seed, epoch))
    return torch.searchsorted(ends, draws * ends[-1], right=True).clamp_max(len(target) - 1)


class Raw(NamedTuple):
    """A batch as its source reads it; reading the next one may overwrite the images.

    Attributes:
        images: [N, C, H, W], uint8, or float32 in [0, 255]; C is 3, or 1 for grey.
        target: their classes, int64 [N].
        index: their numbers in the epoch, see `Loader.drawn`, int64 [N], on the CPU.
    """

    images: Tensor
    target: Tensor
    index: Tensor


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """How the batches of a set are cut and finished, whatever its source.

    Attributes:
        batch_size: images per batch and process.
        train: whether to shuffle, augment and leave out an incomplete batch.
        seed: the run's seed.
        mean: per channel, of images in [0, 1]; one number lets colours become grey, see `utils.data.grey`.
        std: per channel, likewise.
        device: the device that the batches are for.
        rank: number of this process of a distributed run, from 0.
        world_size: number of its processes.
        colour: whether to change the colours of training images, see `utils.data.augment.colour`.
        balanced: whether training draws all classes equally often, see `balanced_samples`.
        mix: mixes the images and classes of a training batch; None: they stay as they are.
    """

    batch_size: int
    train: bool
    seed: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    rank: int = 0
    world_size: int = 1
    colour: bool = False
    balanced: bool = False
    mix: v2.Transform | None = None


class Normalisation:
    """Images in [0, 255] become normalised float32: (x / 255 - mean) / std, as one multiplication and one addition.

    Args:
        mean: per channel, of images in [0, 1]; one number lets colours become grey, see `utils.data.grey`.
        std: per channel, likewise.
        device: of the images.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        deviation = torch.tensor(std, device=device)
        self._channels = len(mean)
        self._factor = 1 / (255 * deviation)
        self._shift = -torch.tensor(mean, device=device) / deviation

    def __call__(self, images: Tensor) -> Tensor:
        """[N, 1 or 3, H, W] in [0, 255]; returns float32 with the channels of mean, in channels-last order."""
        channels = self._channels
        images = grey(images) if channels == 1 else images
        pixels = images.expand(-1, channels, -1, -1).permute(0, 2, 3, 1)
        count, height, width, _ = pixels.shape
        # Whole rows, channels innermost: a broadcast over an axis of 3 is slow on a CPU.
        rows = pixels.reshape(count * height, channels * width)
        shift, factor = self._shift.repeat(width), self._factor.repeat(width)
        result = torch.empty(rows.shape, device=images.device)
        part = len(rows) if images.is_cuda else max(1, PART // (channels * width))
        for into, values in zip(result.split(part), rows.split(part), strict=True):
            torch.addcmul(shift, into.copy_(values), factor, out=into)
        return result.view(count, height, width, channels).permute(0, 3, 1, 2)


class Loader(ABC):
    """Batches of one data set, epoch after epoch; the contract of every source.

    `len(loader)` is the number of batches of an epoch and iterating yields them. Training visits the samples
    in the order of `epoch_order` and leaves out the last batch when it is incomplete, unless it is the only
    one (a batch of a single image would break batch normalisation). Validation visits every sample once, in
    the order of the set.

    An image has a number in the epoch, by which its augmentation is drawn: its number in the set, or in a balanced
    epoch, which may see it several times, that of the draw. `drawn` turns the one into the other.

    With W processes and batches of B images, process r gets the r-th part of every batch of W * B images that
    one process would see. An incomplete batch is cut into parts whose sizes differ by at most one, so that
    in validation no image is left out or seen twice; a process whose part is empty has one batch less.

    A subclass only turns batches of indices into batches of images. At most one iteration of a loader runs at
    a time: starting the next one ends it.

    Args:
        target: classes of the images of the set, int64 [samples].
        delivery: how its batches are cut and finished.

    Attributes:
        target: likewise.
        samples: number of images of the set, the same in every process.

    Raises:
        UserError: there are fewer training images than processes.
    """

    def __init__(self, target: Tensor, delivery: Delivery) -> None:
        samples = len(target)
        rank, world_size = delivery.rank, delivery.world_size
        if not 0 <= rank < world_size:
            raise ValueError(f"there is no process {rank} of {world_size}")
        if delivery.train and samples < world_size:
            raise UserError(f"{world_size} processes cannot share {samples} training images: start fewer")
        self.target = target
        self.samples = samples
        self._delivery = delivery
        self._normalisation = Normalisation(delivery.mean, delivery.std, delivery.device)
        self._samples: tuple[int, Tensor] | None = None  # of an epoch, drawn when it is needed
        self._delivered: list[Tensor] = []
        self._epoch = 0
        self._position = 0

    def __len__(self) -> int:
        world_size = self._delivery.world_size
        full, rest = divmod(self.samples, self._delivery.batch_size * world_size)
        if self._delivery.train:
            return full or 1
        return full + (rest // world_size + (self._delivery.rank < rest % world_size) > 0)

    def identity(self) -> dict[str, str]:
        """What tells this set from another one, wherever its files are: texts that all processes must share."""
        return {"images": str(self.samples)}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, that the next iteration delivers; it stays until it is set again."""
        self._epoch = epoch

    def set_position(self, batch: int) -> None:
        """Let the next iteration, and only that one, begin with this batch of its epoch.

        Args:
            batch: number of the batch, from 0; `len(loader)` stands for the end, where nothing is left.

        Raises:
            ValueError: the epoch has no such batch.
        """
        if not 0 <= batch <= len(self):
            raise ValueError(f"position {batch} is not in an epoch of {len(self)} batches")
        self._position = batch

    def __iter__(self) -> Iterator[Batch]:
        # Not a generator: epoch and position are taken here and now, not when the first batch is fetched.
        first, self._position = self._position, 0
        self._delivered = []
        batches = self._deliver(self._batches()[first:], self._epoch, first)
        return _on_side_stream(batches, self._delivery.device) if self._on_cuda else batches

    @property
    def _on_cuda(self) -> bool:
        return self._delivery.device.type == "cuda"

    def _batches(self) -> list[Tensor]:
        """All batches of this process in the current epoch as indices, int64 [N] each."""
        delivery, world_size = self._delivery, self._delivery.world_size
        order = (
            epoch_order(self.samples, delivery.seed, self._epoch)
            if delivery.train
            else torch.arange(self.samples)
        )
        batches = [
            batch.tensor_split(world_size)[delivery.rank]
            for batch in order.split(delivery.batch_size * world_size)
        ]
        return batches[: len(self)]  # without an incomplete batch of training or empty parts

    def _deliver(self, batches: Sequence[Tensor], epoch: int, first: int) -> Iterator[Batch]:
        """Finish the batches on the device; `first` is the number of the first one."""
        delivery = self._delivery
        colours = None
        if delivery.train and delivery.colour:
            # A row for every sample of the set, so that a sample's numbers do not depend on its batch.
            words = generator(_COLOUR, delivery.seed, epoch)
            colours = torch.rand(self.samples, COLOUR_DRAWS, generator=words)
        delivered = False
        for number, raw in enumerate(self._read(batches, epoch), first):
            delivered = True
            if not delivery.train:
                self._delivered.append(raw.index)
            images = raw.images.to(delivery.device, non_blocking=True)
            target = raw.target.to(delivery.device, non_blocking=True)
            if colours is not None:
                draws = colours[raw.index].to(delivery.device, non_blocking=True)
                images = colour(images.expand(-1, 3, -1, -1).float(), draws)
            images = self._normalisation(images)
            if delivery.train and delivery.mix is not None:
                # The transform draws from the global generator; only the CPU's is touched.
                with torch.random.fork_rng(devices=[]):
                    seed = seed_of(_MIX, delivery.seed, epoch, number, delivery.rank)
                    torch.default_generator.manual_seed(seed)
                    images, target = delivery.mix(images, target)
            yield images.contiguous(memory_format=torch.channels_last), target
        if batches and not delivered:
            part = "" if delivery.world_size == 1 else f" that is process {delivery.rank}'s"
            raise UserError(
                f"no image of the validation set{part} can be read: replace them (tools.py --keyword verify-data says "
                "what is wrong), or write --val_batch_size 0"
            )

    @property
    def delivered(self) -> Tensor:
        """The numbers in the set of the validation images of the last pass, in the order of its batches, int64 [N].

        Images that could not be read are not among them.
        """
        return torch.cat([torch.zeros(0, dtype=torch.int64), *self._delivered])

    def name(self, number: int) -> str:
        """The name of an image by its number in the set: the path of its file, or that number."""
        return str(number)

    def drawn(self, numbers: Tensor, epoch: int) -> Tensor:
        """The numbers in the set of images with these numbers in an epoch, int64 [N] each."""
        delivery = self._delivery
        if not (delivery.train and delivery.balanced):
            return numbers
        if self._samples is None or self._samples[0] != epoch:
            self._samples = (epoch, balanced_samples(self.target.cpu(), delivery.seed, epoch))
        return self._samples[1][numbers]

    @abstractmethod
    def _read(self, batches: Sequence[Tensor], epoch: int) -> Iterator[Raw]:
        """Yield the images and classes of these batches of indices."""


def _on_side_stream(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy and finish each batch on a stream of its own, while the device still computes the previous step."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))  # the loader's own tensors are ready
    while True:
        with torch.cuda.stream(side):
            batch = next(batches, None)
        if batch is None:
            return
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        for tensor in batch:
            tensor.record_stream(current)  # else its memory could be reused while it is still read
        yield batch
