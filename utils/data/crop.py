"""Crops of images: drawing them, and cutting them out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional

from utils.config.image_size import RESIZE_RATIO
from utils.data.loader import AUGMENT, PART, seed_of

SLENDER = 16  # ratio of an image's sides above which only its middle is resized


def crop_and_flip(
    height: int, width: int, to: tuple[int, int], seed: int, epoch: int, index: int
) -> tuple[tuple[int, int, int, int], bool]:
    """Return the random crop (top, left, height, width) of an image in an epoch, and whether it is flipped.

    The crop is for an image of height and width `to`.
    """
    words = np.random.default_rng(seed_of(AUGMENT, seed, epoch, index))
    *draws, flip = words.random(CROP_DRAWS + 1).tolist()
    return random_crop(height, width, draws, to[1] / to[0]), flip < 0.5


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize an image, uint8 [H, W, 3], bilinearly with antialiasing, to [3, height, width]."""
    # A batch in channels-last order: torchvision takes twice as long for any other order.
    return functional.resize(pixels[None].permute(0, 3, 1, 2), [height, width], antialias=True)[0]


def resize_to_centre(pixels: Tensor, to: tuple[int, int], ratio: float = RESIZE_RATIO) -> Tensor:
    """Resize an image, uint8 [H, W, 3], as `centre_crop` says, and return its centre, [3, *to].

    Only the middle of an image is resized if it is more than `SLENDER` times as long as the centre's shape, since the
    whole would be that much longer than the centre. That may move the picture by up to a pixel.
    """
    for side in (0, 1):
        most = -(-SLENDER * pixels.shape[1 - side] * to[side] // to[1 - side])
        beyond = pixels.shape[side] - most
        if beyond > 0:
            pixels = pixels.narrow(side, beyond // 2, pixels.shape[side] - beyond)
    height, width, top, left = centre_crop(pixels.shape[0], pixels.shape[1], to, ratio)
    return functional.crop(resize(pixels, height, width), top, left, *to)


def put(image: Tensor, to: Tensor, *, flip: bool) -> None:
    """Copy an image, uint8 [3, H, W], to `to`, uint8 [H, W, 3], flipped left to right if wanted."""
    rows = max(1, PART // (3 * image.shape[2]))
    for source, target in zip(image.split(rows, 1), to.split(rows), strict=True):
        target.copy_((source.flip(-1) if flip else source).permute(1, 2, 0))


def random_crop(
    height: int, width: int, draws: Sequence[float], aspect: float = 1.0
) -> tuple[int, int, int, int]:
    """Draw a crop of 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3 (arXiv 1409.4842, section 6).

    As torchvision's `RandomResizedCrop`: ten trials for a crop that fits, then the largest centred one.

    Args:
        height: of the image, in pixels.
        width: likewise.
        draws: uniform in [0, 1), CROP_DRAWS numbers.
        aspect: width over height of the image that the crop becomes, by which the ratio is multiplied, so that an
            image that is not square is distorted no more than a square one.

    Returns:
        Top, left, height and width of the crop, in pixels.
    """
    for trial in range(10):
        share, shape, down, right = draws[4 * trial : 4 * trial + 4]
        area = height * width * (0.08 + 0.92 * share)
        ratio = aspect * math.exp((2 * shape - 1) * math.log(4 / 3))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = int(down * (height - crop_height + 1)), int(right * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    # An extreme ratio may round to nothing.
    crop_width = max(1, min(width, round(height * 4 / 3 * aspect)))
    crop_height = max(1, min(height, round(width * 4 / 3 / aspect)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


CROP_DRAWS = 40  # ten trials of four numbers


def centre_crop(
    height: int, width: int, to: tuple[int, int], ratio: float = RESIZE_RATIO
) -> tuple[int, int, int, int]:
    """Return the central crop of an image that is resized until it covers `ratio` of the result.

    The side that is shorter, in proportion to the result, gets `ratio` (256/224) of the result's side.

    Args:
        height: of the image, in pixels.
        width: likewise.
        to: height and width of the result, in pixels.
        ratio: side of the resized image over that of the result.

    Returns:
        Height and width of the resized image; top and left of the centre in it.
    """
    wanted, shorter = (to[0], height) if height * to[1] <= width * to[0] else (to[1], width)
    scaled = (round(wanted * ratio) * side / shorter for side in (height, width))
    # The rounded longer side must not fall below the result's.
    high, wide = (max(int(side), least) for side, least in zip(scaled, to, strict=True))
    return high, wide, round((high - to[0]) / 2), round((wide - to[1]) / 2)
