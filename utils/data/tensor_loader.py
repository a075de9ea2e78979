"""The loader of images in memory: no workers, augmented a batch at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.config.image_size import InputSize, sides
from utils.data.augment import DRAWS, Augment
from utils.data.loader import AUGMENT, Delivery, Loader, Raw, generator, rand_augment


class Store(Protocol):
    """Images that are fetched by index: a tensor, or an object that computes them."""

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """Return the images of these indices, int64 [N], as uint8 [N, C, H, W]; C is 3, or 1 for grey."""
        ...


class TensorLoader(Loader):
    """Batches of images in memory, augmented in this process on the delivery's device.

    Args:
        store: the images, uint8; a tensor is kept on the device.
        target: their classes, int64 [samples].
        delivery: how batches are cut and finished.
        size: of the images of a batch.
        augment: changes the images of a training batch; None: they stay as they are.
        randaugment: magnitude of RandAugment in training, image after image; None: none.
    """

    def __init__(
        self,
        store: Store,
        target: Tensor,
        delivery: Delivery,
        *,
        size: InputSize,
        augment: Augment | None,
        randaugment: int | None = None,
    ) -> None:
        super().__init__(target, delivery)
        self._store = store.to(delivery.device) if isinstance(store, Tensor) else store
        self._size = sides(size)
        self._augment = augment if delivery.train else None
        self._randaugment = None
        if delivery.train and randaugment is not None:
            from torchvision.transforms import v2  # here: other runs need not wait for it

            self._randaugment = v2.RandAugment(magnitude=randaugment)

    def identity(self) -> dict[str, str]:
        """As in `Loader`; with a digest of the classes and of images that are a tensor."""
        found = hashlib.sha256(self.target.contiguous().numpy().data)
        if isinstance(self._store, Tensor):
            found.update(self._store.cpu().contiguous().numpy().data)
        return super().identity() | {"contents": found.hexdigest()[:12]}

    def _read(self, batches: Sequence[Tensor], epoch: int) -> Iterator[Raw]:
        # A row for every sample of the set, so that a sample's numbers do not depend on its batch.
        draws = torch.rand(self.samples, DRAWS, generator=generator(AUGMENT, self._delivery.seed, epoch))
        augment, transform = self._augment, self._randaugment
        for index in batches:
            drawn = self.drawn(index, epoch)
            images = self._store[drawn.to(self._store.device) if isinstance(self._store, Tensor) else drawn]
            if augment is not None:
                images = augment(images, draws[index].to(images.device))
            if transform is not None:
                numbered = zip(images, index.tolist(), strict=True)
                seed = self._delivery.seed
                images = torch.stack([rand_augment(transform, x, seed, epoch, i) for x, i in numbered])
            if images.shape[-2:] != self._size:
                images = resize(images.float(), self._size, "bilinear")
            yield Raw(images, self.target[drawn], index)


def resize(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize float32 [N, C, H, W] to height and width `size`, with antialiasing."""
    return F.interpolate(images, size=size, mode=mode, align_corners=False, antialias=True)
