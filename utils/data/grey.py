"""From colours to grey: ITU-R BT.601's luma, in the arithmetic of Pillow's mode L."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

# 0.299, 0.587 and 0.114 as Pillow has them, multiplied by 65536. A sum of three bytes so weighted is exact in float32.
_WEIGHTS = (19595, 38470, 7471)


def grey(images: Tensor) -> Tensor:
    """Convert images in [0, 255] to grey: L = (19595 R + 38470 G + 7471 B) / 65536, rounded half up for bytes.

    Bytes become what Pillow's `convert("L")` makes of them, equal channels what each of them is.

    Args:
        images: [N, 3, H, W] in red, green and blue; or [N, 1, H, W], which is returned.

    Returns:
        float32 [N, 1, H, W]; the dtype stays where nothing is converted.
    """
    if images.shape[1] == 1:
        return images
    red, green, blue = (
        weight * x.float() for weight, x in zip(_WEIGHTS, images.split(1, dim=1), strict=True)
    )
    total = (red + green + blue) / 2**16
    return total if images.is_floating_point() else total.add_(0.5).floor_()


def grey_value(values: Sequence[float]) -> float:
    """The same of three numbers: the mean of grey images from those of their channels, exactly.

    Of standard deviations it is that of channels which rise and fall together, and an upper bound for others.
    """
    return sum(value * weight for value, weight in zip(values, _WEIGHTS, strict=True)) / 2**16
