"""Draw docs/images/glyphs.png: some training and validation images of each class of the data set glyphs.

python benchmarks/glyphs.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project is no package

from utils.data.glyphs import CHARACTERS, SIZE, TRAIN_FONTS, TRAIN_IMAGES, VAL_IMAGES, glyphs  # noqa: E402

SHEET = ROOT / "docs" / "images" / "glyphs.png"
TRAIN_ROWS, VAL_ROWS = 5, 3
GAP = 6  # pixels of white between the sets and between the two halves of the classes


def rows(images: Tensor, classes: slice) -> Image.Image:
    """Images [rows, classes, SIZE, SIZE] of these classes as one picture."""
    part = images[:, classes]
    return Image.fromarray(part.permute(0, 2, 1, 3).reshape(part.shape[0] * SIZE, -1).numpy())


def sheet(train: Tensor, val: Tensor) -> Image.Image:
    """A column per class, in two halves of 31; above training images, below those of held-out fonts.

    Args:
        train: training images as `glyphs` draws them.
        val: validation images, likewise.
    """
    first = train.view(-1, TRAIN_IMAGES, SIZE, SIZE)[:, :TRAIN_ROWS].transpose(0, 1)
    held_out = val.view(-1, VAL_IMAGES, SIZE, SIZE)[:, len(TRAIN_FONTS) :][:, :VAL_ROWS].transpose(0, 1)
    half = len(CHARACTERS) // 2
    height = (TRAIN_ROWS + VAL_ROWS) * SIZE + GAP
    page = Image.new("L", (half * SIZE, 2 * height + 2 * GAP), 255)
    for top, classes in ((0, slice(half)), (height + 2 * GAP, slice(half, None))):
        page.paste(rows(first, classes), (0, top))
        page.paste(rows(held_out, classes), (0, top + TRAIN_ROWS * SIZE + GAP))
    return page


def main() -> int:
    """Write the picture."""
    SHEET.parent.mkdir(parents=True, exist_ok=True)
    (train, _), (val, _) = glyphs()
    sheet(train, val).quantize(16).save(SHEET, optimize=True)  # greys are enough
    print(SHEET.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
