"""The centre of an image without resizing the whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from utils.data.crop import centre_crop, resize, resize_to_centre


@pytest.mark.parametrize("to", [(24, 24), (16, 40), (40, 16)])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (40, 40), (30, 180), (180, 30), (7, 9), (500, 375)])
def test_the_centre_of_ordinary_images_is_that_of_the_whole(
    shape: tuple[int, int], to: tuple[int, int]
) -> None:
    """To the bit."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    height, width, top, left = centre_crop(*shape, to)
    whole = resize(image, height, width)
    assert torch.equal(resize_to_centre(image, to), whole[:, top : top + to[0], left : left + to[1]])


@pytest.mark.parametrize(
    ("shape", "to"),
    [
        ((30, 481), (24, 24)), ((20, 700), (24, 24)), ((701, 20), (24, 24)), ((5, 801), (24, 24)),
        ((40, 1900), (24, 24)), ((701, 20), (16, 40)), ((10, 1000), (16, 40)), ((300, 20), (16, 40)),
    ],
)  # fmt: skip
def test_the_centre_of_slender_images_is_that_of_the_whole_within_a_pixel(
    shape: tuple[int, int], to: tuple[int, int]
) -> None:
    """A slope along the longer side shows how far the picture has moved."""
    longer = max(shape)
    slope = torch.linspace(0, 255, longer).view((-1, 1) if shape[0] == longer else (1, -1))
    image = slope.expand(shape).round().to(torch.uint8)[..., None].expand(-1, -1, 3).contiguous()
    height, width, top, left = centre_crop(*shape, to)
    whole = resize(image, height, width)[:, top : top + to[0], left : left + to[1]]
    difference = (resize_to_centre(image, to).int() - whole.int()).abs().max()
    assert difference <= math.ceil(255 / max(height, width)) + 1


@pytest.mark.parametrize("to", [(96, 160), (160, 96), (1, 500)])
@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (96, 160), (333, 1000), (3, 7)])
def test_an_image_covers_a_centre_that_is_not_square(shape: tuple[int, int], to: tuple[int, int]) -> None:
    """In proportion, and by 256/224 of the side that is shorter beside the centre's, as the square rule says."""
    height, width, top, left = centre_crop(*shape, to)
    assert height >= to[0] and width >= to[1]
    assert 0 <= top <= height - to[0] and 0 <= left <= width - to[1]
    scale = max(round(to[i] * 256 / 224) / shape[i] for i in (0, 1))
    assert abs(height - scale * shape[0]) <= 1 and abs(width - scale * shape[1]) <= 1
