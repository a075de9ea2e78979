"""Data sources behind one loader contract: what an epoch delivers depends on (seed, epoch) and nothing else.

No loader reads or changes global random state. The order of an epoch is drawn from (seed, epoch), the
augmentation of a sample from (seed, epoch, index of the sample); neither the number of workers nor what was
read before plays a part. A run resumed at batch k of an epoch sees the very batches it would have seen.
"""

from __future__ import annotations

import http.client
import math
import multiprocessing
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.folder import is_image_file, pil_loader
from torchvision.transforms import v2

from utils.config import DataConfig
from utils.errors import UserError
from utils.glyphs import CHARACTERS, font_files, glyphs

Batch = tuple[Tensor, Tensor]
"""Images, float32 [N, 3, S, S], normalised per channel; and their classes, int64 [N]."""

Augment = Callable[[Tensor, Tensor], Tensor]
"""Changes images [N, C, H, W] in [0, 255] as draws say, float32 [N, DRAWS] uniform in [0, 1)."""

DRAWS = 4  # uniform numbers that a sample's augmentation gets in each epoch

# The first word of a seed keeps the streams of random numbers apart.
_ORDER, _AUGMENT, _PATTERN, _NOISE = range(1, 5)


def _seed(*words: int) -> int:
    """Mix words into one 64-bit seed (NumPy's `SeedSequence`), so that neighbouring words are unrelated."""
    mixed = np.random.SeedSequence([word % 2**64 for word in words])
    return int(mixed.generate_state(1, np.uint64)[0])


def _generator(*words: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(*words))


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
    return torch.randperm(samples, generator=_generator(_ORDER, seed, epoch))


class Loader(ABC):
    """Batches of one data set, epoch after epoch; the contract of every source.

    `len(loader)` is the number of batches of an epoch and iterating yields them. Training visits the samples
    in the order of `epoch_order` and leaves out the last batch when it is incomplete, unless it is the only
    one (a batch of a single image would break batch normalisation). Validation visits every sample once, in
    the order of the set. Among `world_size` processes a batch of training is that many times larger and each
    takes its part of it, in the order of ranks; of validation each takes every `world_size`-th sample.

    A subclass only says how batches of indices become batches of images. At most one iteration of a loader
    runs at a time: the next one ends it.

    Attributes:
        samples: number of images of the set.
    """

    def __init__(
        self, samples: int, *, batch_size: int, train: bool, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if train and world_size > 1 and samples < batch_size * world_size:
            raise UserError(
                f"--batch_size {batch_size}: {samples} training images are no batch of {world_size} processes; "
                f"write at most {samples // world_size}"
            )
        self.samples = samples
        self._batch_size = batch_size
        self._train = train
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._epoch = 0
        self._position = 0

    def __len__(self) -> int:
        if self._train:
            full, rest = divmod(self.samples, self._batch_size * self._world_size)
            return full if full else int(bool(rest))
        return -(-len(range(self._rank, self.samples, self._world_size)) // self._batch_size)

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
        batches = self._batches()[self._position :]
        self._position = 0
        return self._read(batches, self._epoch)

    def _batches(self) -> Sequence[Tensor]:
        """All batches of the current epoch as indices, int64 [N] each."""
        if not self._train:
            return torch.arange(self._rank, self.samples, self._world_size).split(self._batch_size)[
                : len(self)
            ]
        order = epoch_order(self.samples, self._seed, self._epoch)
        whole = order.split(self._batch_size * self._world_size)[: len(self)]
        return [batch.tensor_split(self._world_size)[self._rank] for batch in whole]

    @abstractmethod
    def _read(self, batches: Sequence[Tensor], epoch: int) -> Iterator[Batch]:
        """Yield the images and classes of these batches of indices."""


class Store(Protocol):
    """Images that are fetched by index: a tensor, or what computes them."""

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """Return the images of these indices, int64 [N], as uint8 [N, C, H, W]; C is 3, or 1 for grey."""
        ...


class TensorLoader(Loader):
    """Batches of images that are at hand in memory, augmented a batch at a time in this process.

    Args:
        store: the images, uint8.
        target: their classes, int64 [samples].
        size: height and width of the images of a batch, in pixels.
        mean: per channel, of images in [0, 1].
        std: per channel, of images in [0, 1].
        augment: changes the images of a training batch; None: they stay as they are.
        batch_size: images per batch.
        train: whether to shuffle, augment and leave out an incomplete batch.
        seed: the run's seed.
        rank: this process among `world_size`.
        world_size: processes that share each batch.
    """

    def __init__(
        self,
        store: Store,
        target: Tensor,
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augment | None,
        batch_size: int,
        train: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(
            len(target), batch_size=batch_size, train=train, seed=seed, rank=rank, world_size=world_size
        )
        self._store = store
        self._target = target
        self._size = size
        self._mean = 255 * torch.tensor(mean).view(-1, 1, 1)
        self._std = 255 * torch.tensor(std).view(-1, 1, 1)
        self._augment = augment if train else None

    def _read(self, batches: Sequence[Tensor], epoch: int) -> Iterator[Batch]:
        # A row for every sample of the set, so that a sample's numbers do not depend on its batch.
        draws = torch.rand(self.samples, DRAWS, generator=_generator(_AUGMENT, self._seed, epoch))
        augment = self._augment
        for index in batches:
            images = self._store[index]
            if augment is not None:
                images = augment(images, draws[index])
            images = images.float()
            if images.shape[-1] != self._size:
                images = _resize(images, self._size, "bilinear")
            images = images.expand(-1, 3, -1, -1).sub(self._mean).div_(self._std)
            yield images, self._target[index]


def _resize(images: Tensor, size: int, mode: str) -> Tensor:
    return F.interpolate(images, size=(size, size), mode=mode, align_corners=False, antialias=True)


def warp(images: Tensor, draws: Tensor, padding: str = "zeros") -> Tensor:
    """Turn by up to 10 degrees, zoom by 0.9 to 1.1 and shift by up to 1/16 of the size (2 of 32 pixels).

    Nothing is flipped.

    Args:
        images: [N, C, H, W] in [0, 255].
        draws: uniform in [0, 1), [N, DRAWS].
        padding: what moves in from outside: "zeros", black, or "border", the outermost pixels.

    Returns:
        The changed images, float32 [N, C, H, W].
    """
    signed = 2 * draws - 1
    angle = signed[:, 0] * math.radians(10)
    zoom = 1 + 0.1 * signed[:, 1]
    shift_x, shift_y = signed[:, 2] / 8, signed[:, 3] / 8  # the grid spans 2, from -1 to 1
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    theta = torch.stack([cos, -sin, shift_x, sin, cos, shift_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode=padding, align_corners=False)


def crop_flip(images: Tensor, draws: Tensor) -> Tensor:
    """Pad by 4 reflected pixels, crop the former size at random and flip every second image left to right.

    Args:
        images: [N, C, S, S], any dtype.
        draws: uniform in [0, 1), [N, DRAWS].

    Returns:
        The changed images, of the same shape and dtype.
    """
    count, channels, size, _ = images.shape
    offset = (9 * draws[:, :2]).long() - 4
    row, column = (_reflect(offset[:, i, None] + torch.arange(size), size) for i in range(2))
    column = torch.where(draws[:, 2, None] < 0.5, column.flip(1), column)
    # One gather instead of padding, cropping and flipping: each pixel is copied once, as a byte.
    sample = torch.arange(count)[:, None, None, None]
    channel = torch.arange(channels)[:, None, None]
    return images[sample, channel, row[:, None, :, None], column[:, None, None, :]]


def _reflect(position: Tensor, size: int) -> Tensor:
    """Mirror positions outside 0 ... size - 1 back at the centre of the outermost pixel."""
    last = size - 1
    return last - (last - position.abs()).abs()


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
        build: the loaders; runs after `check`.
    """

    check: Callable[[DataConfig], None]
    build: Callable[[DataConfig], Loaders]


def _check_classes(config: DataConfig, classes: int, what: str) -> None:
    if config.num_classes != classes:
        raise UserError(
            f"{what} has {classes} classes, not {config.num_classes}: write --num_classes {classes} or name "
            "another data set"
        )


def _tensor_loaders(
    config: DataConfig,
    train: tuple[Store, Tensor],
    val: tuple[Store, Tensor] | None,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: Augment | None,
) -> Loaders:
    """Loaders over (images, classes) in memory; `mean` and `std` are the set's own."""
    mean, std = config.mean or mean, config.std or std

    def loader(part: tuple[Store, Tensor], batch_size: int, *, train: bool) -> TensorLoader:
        return TensorLoader(
            *part,
            size=config.input_size,
            mean=mean,
            std=std,
            augment=augment,
            batch_size=batch_size,
            train=train,
            seed=config.seed,
            rank=config.rank,
            world_size=config.world_size,
        )

    return Loaders(
        train=loader(train, config.batch_size, train=True),
        val=None if val is None else loader(val, config.val_batch_size, train=False),
        num_classes=config.num_classes,
        mean=mean,
        std=std,
    )


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
    images = _resize(small, size, "bicubic").round_().clamp_(0, 255).to(torch.uint8)
    target = torch.from_numpy(classes).long()
    train, val = train_test_split(np.arange(len(classes)), test_size=0.2, stratify=classes, random_state=0)
    return (images[train], target[train]), (images[val], target[val])


def _grey_loaders(
    config: DataConfig, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], augment: Augment
) -> Loaders:
    """Loaders over grey images, normalised by the statistics of the training set."""
    std, mean = torch.std_mean(train[0].float() / 255)
    return _tensor_loaders(
        config,
        train,
        val if config.val_batch_size else None,
        mean=(mean.item(),) * 3,
        std=(std.item(),) * 3,
        augment=augment,
    )


def _build_digits(config: DataConfig) -> Loaders:
    return _grey_loaders(config, *digits(config.input_size), warp)


# ---- glyphs: characters drawn by `utils.glyphs`


def _check_glyphs(config: DataConfig) -> None:
    _check_classes(config, len(CHARACTERS), "--dataset glyphs")
    font_files()


def _build_glyphs(config: DataConfig) -> Loaders:
    return _grey_loaders(config, *glyphs(), partial(warp, padding="border"))


# ---- fake: images that are computed


class FakeImages:
    """Images made of their class's pattern of 4x4 coloured tiles and as much noise of their own.

    They are computed when they are fetched, so that their number and size cost no memory. An image depends on
    its split, index and class only; the images are the same in every run.

    Args:
        split: 0 for training, 1 for validation.
        num_classes: number of classes; image i has class i modulo this.
        size: height and width in pixels.
    """

    MEAN = (0.5,) * 3
    STD = (0.2,) * 3  # of the mean of two numbers uniform in [0, 1]: sqrt(1 / 24)

    def __init__(self, split: int, num_classes: int, size: int) -> None:
        self._split = split
        self._size = size
        shape = (num_classes, 3, 4, 4)
        self._patterns = torch.randint(0, 256, shape, dtype=torch.uint8, generator=_generator(_PATTERN))

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """Return the images of these indices, int64 [N], as uint8 [N, 3, size, size]."""
        noise = torch.empty(len(index), 3, self._size, self._size, dtype=torch.uint8)
        for image, i in zip(noise, index.tolist(), strict=True):
            image.random_(0, 256, generator=_generator(_NOISE, self._split, i))
        pattern = F.interpolate(self._patterns[index % len(self._patterns)], size=(self._size, self._size))
        return pattern // 2 + noise // 2


def _check_fake(config: DataConfig) -> None:
    if config.fake_size < 1:
        raise UserError(f"--fake_size {config.fake_size}: write the number of training images, 1 or more")


def _build_fake(config: DataConfig) -> Loaders:
    def part(split: int, samples: int) -> tuple[Store, Tensor]:
        store = FakeImages(split, config.num_classes, config.input_size)
        return store, torch.arange(samples) % config.num_classes

    return _tensor_loaders(
        config,
        part(0, config.fake_size),
        part(1, max(1, config.fake_size // 4)) if config.val_batch_size else None,
        mean=FakeImages.MEAN,
        std=FakeImages.STD,
        augment=None,
    )


# ---- cifar10, cifar100: the python files of https://www.cs.toronto.edu/~kriz/cifar.html


@dataclass(frozen=True)
class Cifar:
    """A CIFAR set as a `Source`'s functions: where torchvision reads it from, and its usual statistics."""

    files: type[CIFAR10]
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def check(self, config: DataConfig) -> None:
        """Raise `UserError` for a wrong number of classes or a root that is no folder."""
        _check_classes(config, self.num_classes, f"--dataset {config.dataset}")
        if config.root is not None and not config.root.is_dir():
            raise UserError(
                f"--root {config.root} is not a folder: name the one that holds {self.files.base_folder}, "
                f"or make it, and {self.files.filename} is downloaded into it"
            )

    def build(self, config: DataConfig) -> Loaders:
        """Load both sets into memory; files that are missing are downloaded."""
        root = Path("data") if config.root is None else config.root
        return _tensor_loaders(
            config,
            self._load(root, train=True),
            self._load(root, train=False) if config.val_batch_size else None,
            mean=self.mean,
            std=self.std,
            augment=crop_flip,
        )

    def _load(self, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
        """Return images, uint8 [n, 3, 32, 32], and classes, int64 [n]; torchvision verifies checksums."""
        files = self.files
        folder = root / files.base_folder
        names = [name for name, _ in files.train_list + files.test_list] + [files.meta["filename"]]
        missing = not all((folder / name).is_file() for name in names)
        try:
            data = files(root, train=train, download=missing)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            reason = f"the download failed: {error}" if missing else "checksums differ"
            raise UserError(
                f"no usable files in {folder} ({reason}): remove that folder if there is one, download "
                f"{files.url} and put it at {root / files.filename}, which the next start unpacks"
            ) from error
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor(data.targets)


_CIFAR10 = Cifar(CIFAR10, 10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
_CIFAR100 = Cifar(CIFAR100, 100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))


# ---- imagenet: a folder of image files


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# What Pillow raises for files that are missing, truncated, no image, broken inside or suspiciously large.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class _Unreadable:
    """Stands for an image that cannot be decoded.

    A value, not an exception: a worker's exception would arrive with its traceback as its message.
    """

    message: str


_Sample = tuple[Tensor, int] | _Unreadable


class _ImageFiles(Dataset[_Sample]):
    """Image files in a folder per class, decoded and transformed; a key is (epoch, index)."""

    def __init__(self, folder: Path, transform: v2.Transform, *, seed: int) -> None:
        files = ImageFolder(folder)
        # Arrays, not lists of objects: they reach the workers quickly and are stored once per worker.
        self._paths = np.array([os.fsencode(path) for path, _ in files.samples])
        self._target = np.array(files.targets)
        self._transform = transform
        self._seed = seed

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, key: tuple[int, int]) -> _Sample:
        epoch, index = key
        path = os.fsdecode(bytes(self._paths[index]))
        try:
            image = pil_loader(path)
        except _DECODE_ERRORS as error:
            return _Unreadable(
                f"cannot read the image {path} ({error}): replace or remove it "
                "(tools.py --keyword verify-image lists all such files)"
            )
        # Transforms draw from the global generator. Only the CPU's is touched: `torch.manual_seed` would also
        # change the accelerator's when there are no workers.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_seed(_AUGMENT, self._seed, epoch, index))
            return self._transform(image), int(self._target[index])


def _collate(samples: list[_Sample]) -> Batch | _Unreadable:
    for sample in samples:
        if isinstance(sample, _Unreadable):
            return sample
    images, target = default_collate(samples)
    return images, target


def _leave_signals(_: int) -> None:
    """Ctrl-C reaches workers too, but it is the training that ends them, when it has saved its state."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
    """Batches of image files in a folder per class, read and augmented by worker processes.

    Args:
        folder: has one folder per class.
        transform: an RGB image of Pillow to a normalised float32 [3, S, S]; draws from torch's generator.
        workers: number of processes, which stay between epochs; 0: read in this process.
        batch_size: images per batch.
        train: whether to shuffle and leave out an incomplete batch.
        seed: the run's seed.
        rank: this process among `world_size`.
        world_size: processes that share each batch.

    Raises:
        UserError: while iterating, when an image cannot be decoded; names its path.
    """

    def __init__(
        self, folder: Path, transform: v2.Transform, *, workers: int, batch_size: int, train: bool, seed: int,
        rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        files = _ImageFiles(folder, transform, seed=seed)
        super().__init__(
            len(files), batch_size=batch_size, train=train, seed=seed, rank=rank, world_size=world_size
        )
        context = None
        if workers:
            # Forking this process, which has threads, may deadlock. The server has one; what it has imported
            # need not be imported by each worker.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
        self._keys = _Keys()
        self._loader = DataLoader(
            files,
            batch_sampler=self._keys,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            multiprocessing_context=context,
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),  # else each iteration draws from the global one
        )

    def _read(self, batches: Sequence[Tensor], epoch: int) -> Iterator[Batch]:
        self._keys.batches, self._keys.epoch = batches, epoch
        for batch in self._loader:
            if isinstance(batch, _Unreadable):
                raise UserError(batch.message)
            images, target = batch
            yield images, target


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


def _check_imagenet(config: DataConfig) -> None:
    if config.root is None:
        raise UserError("--dataset imagenet needs --root: the folder that holds train/ and val/")
    if not config.root.is_dir():
        raise UserError(f"--root {config.root} is not a folder: name the one that holds train/ and val/")
    classes = _class_folders(config.root / "train")
    if config.val_batch_size:
        other = set(classes) ^ set(_class_folders(config.root / "val"))
        if other:
            raise UserError(
                f"train/ and val/ in {config.root} have different classes: {_some(sorted(other))} must be in "
                "both"
            )
    _check_classes(config, len(classes), f"{config.root}")


def _build_imagenet(config: DataConfig) -> Loaders:
    assert config.root is not None  # checked
    mean, std, size = config.mean or IMAGENET_MEAN, config.std or IMAGENET_STD, config.input_size
    tail = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()]
    augmented = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *tail])
    centred = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), *tail])
    train = FolderLoader(
        config.root / "train",
        augmented,
        workers=config.workers,
        batch_size=config.batch_size,
        train=True,
        seed=config.seed,
        rank=config.rank,
        world_size=config.world_size,
    )
    val = None
    if config.val_batch_size:
        val = FolderLoader(
            config.root / "val",
            centred,
            workers=config.workers,
            batch_size=config.val_batch_size,
            train=False,
            seed=config.seed,
            rank=config.rank,
            world_size=config.world_size,
        )
    return Loaders(train=train, val=val, num_classes=config.num_classes, mean=mean, std=std)


SOURCES: dict[str, Source] = {
    "digits": Source(_check_digits, _build_digits),
    "fake": Source(_check_fake, _build_fake),
    "glyphs": Source(_check_glyphs, _build_glyphs),
    "cifar10": Source(_CIFAR10.check, _CIFAR10.build),
    "cifar100": Source(_CIFAR100.check, _CIFAR100.build),
    "imagenet": Source(_check_imagenet, _build_imagenet),
}
"""Every data set by its name."""


def check(config: DataConfig) -> None:
    """Look for mistakes that are cheap to find, before anything heavy is built.

    Nothing is downloaded or read beyond the names of folders and files.

    Raises:
        UserError: an unknown data set; a number of classes that is not the set's; a root, its `train/` or
            `val/`, class folders or images that are missing; classes that differ between training and
            validation; a mean or std that is not of three channels.
    """
    if config.dataset not in SOURCES:
        raise UserError(f"--dataset {config.dataset} is unknown: choose one of {', '.join(SOURCES)}")
    for name, values in (("mean", config.mean), ("std", config.std)):
        if values is not None and len(values) != 3:
            raise UserError(f"--{name} has {len(values)} values: write three, for red, green and blue")
    if config.std is not None and min(config.std) <= 0:
        raise UserError(f"--std has the value {min(config.std):g}: write numbers above 0")
    try:
        SOURCES[config.dataset].check(config)
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: {error.strerror}; check --root and its permissions"
        ) from error


def build(config: DataConfig) -> Loaders:
    """Check the configuration and open the data set it names.

    Returns:
        The loaders of both sets; `val` is None when `val_batch_size` is 0.

    Raises:
        UserError: as `check`; or the CIFAR files are missing and cannot be downloaded, or are damaged.
    """
    check(config)
    return SOURCES[config.dataset].build(config)
