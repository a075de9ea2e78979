"""Fake images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.utils.data.helpers import FAKE, validation
from utils.data.fake import FakeImages
from utils.data.sources import open_data


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
