"""The size of the images that a network gets: one number for square images, or height and width."""

from __future__ import annotations

import argparse

InputSize = int | tuple[int, int]
"""Pixels: height and width in one number where they are equal, otherwise both, in this order."""

RESIZE_RATIO = 256 / 224
"""Side of the resized image over that of its centre, which an evaluation cuts out of image files."""


def sides(size: InputSize) -> tuple[int, int]:
    """Height and width in pixels.

    Example:
        >>> from utils.config.image_size import sides
        >>> sides(32), sides((96, 160))
        ((32, 32), (96, 160))
    """
    return (size, size) if isinstance(size, int) else size


def size_text(size: InputSize) -> str:
    """A size as `--input_size` takes it: 32, or 96x160."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def input_size(text: str) -> InputSize:
    """A size as the command line writes it; 32x32 is 32."""
    numbers = text.lower().split("x")
    try:
        height, width = map(int, numbers if len(numbers) == 2 else numbers * 2)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: write 32, or height and width, like 96x160"
        ) from error
    return height if height == width else (height, width)
