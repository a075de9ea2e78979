"""The centre of an image without resizing the whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from utils.data.crop import centre_crop, resize, resize_to_centre


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
