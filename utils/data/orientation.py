"""EXIF's orientation: what turns a stored image upright, and where a part of the upright image is stored."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Edges = tuple[float, float, float, float]
"""Top, left, bottom and right, in pixels from the image's own top left corner."""


class Turn(NamedTuple):
    """How a stored image becomes upright: it is transposed first, and then flipped.

    Attributes:
        transpose: whether rows become columns.
        down: whether it is flipped top to bottom.
        across: whether it is flipped left to right.
    """

    transpose: bool
    down: bool
    across: bool

    def upright(self, pixels: Tensor) -> Tensor:
        """Turn stored pixels, [H, W, C]."""
        pixels = pixels.transpose(0, 1) if self.transpose else pixels
        sides = [side for side, flip in enumerate((self.down, self.across)) if flip]
        return pixels.flip(sides).contiguous() if sides else pixels.contiguous()

    def stored(self, edges: Edges, height: float, width: float) -> Edges:
        """Where the edges of a part of the upright image, `height` x `width`, are in the stored one.

        Edges that a flip exchanges stay exchanged: top is below bottom, or left is to the right of right.
        """
        top, left, bottom, right = edges
        if self.down:
            top, bottom = height - top, height - bottom
        if self.across:
            left, right = width - left, width - right
        return (left, top, right, bottom) if self.transpose else (top, left, bottom, right)


TURNS = {
    1: Turn(False, False, False),
    2: Turn(False, False, True),
    3: Turn(False, True, True),
    4: Turn(False, True, False),
    5: Turn(True, False, False),
    6: Turn(True, False, True),
    7: Turn(True, True, True),
    8: Turn(True, True, False),
}
"""EXIF's orientations (CIPA DC-008, section 4.6.5, tag 274)."""
