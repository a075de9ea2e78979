"""Augmentation of whole batches from given random numbers, and torchvision's Mixup and CutMix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torchvision.transforms import v2

Augment = Callable[[Tensor, Tensor], Tensor]
"""Changes images [N, C, H, W] in [0, 255] by draws, float32 [N, DRAWS] uniform in [0, 1)."""

DRAWS = 4  # uniform numbers that a sample's augmentation gets in each epoch
COLOUR_DRAWS = 6  # the same for its colours


def warp(images: Tensor, draws: Tensor, padding: str = "zeros") -> Tensor:
    """Turn by up to 10 degrees, zoom by 0.9 to 1.1 and shift by up to 1/16 of the size (2 of 32 pixels).

    Nothing is flipped.

    Args:
        images: [N, C, H, W] in [0, 255].
        draws: uniform in [0, 1), [N, DRAWS].
        padding: fills the image from outside: "zeros", black, or "border", the outermost pixels.

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
    """Pad by 4 reflected pixels, crop the original size at random and flip left to right with probability 1/2.

    Args:
        images: [N, C, S, S], any dtype.
        draws: uniform in [0, 1), [N, DRAWS].

    Returns:
        The changed images, of the same shape and dtype.
    """
    count, channels, size, _ = images.shape
    offset = (9 * draws[:, :2]).long() - 4
    along = torch.arange(size, device=images.device)
    row, column = (_reflect(offset[:, i, None] + along, size) for i in range(2))
    column = torch.where(draws[:, 2, None] < 0.5, column.flip(1), column)
    # One gather instead of padding, cropping and flipping: each pixel is copied once, as a byte.
    pixel = (size * row[:, :, None] + column[:, None, :]).view(count, 1, -1)
    return images.flatten(2).gather(2, pixel.expand(-1, channels, -1)).view(images.shape)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Mirror positions outside 0 ... size - 1 back at the centre of the outermost pixel."""
    last = size - 1
    return last - (last - position.abs()).abs()


# Principal components of the colours of ImageNet's pixels, for images in [0, 1]; a component per column.
_COMPONENTS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
_DEVIATIONS = (0.2175, 0.0188, 0.0045)
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


def colour(images: Tensor, draws: Tensor) -> Tensor:
    """Change brightness, contrast and saturation by a factor of 0.6 to 1.4 each, and the lighting.

    The three factors, in this order and each clamped to [0, 255], mix the image with black, with its mean grey
    and with its grey image. The lighting adds to all pixels the principal components of ImageNet's colours, times
    normal numbers of deviation 0.1 (AlexNet, Krizhevsky et al. 2012, section 4.1).

    Args:
        images: float32 [N, 3, H, W] in [0, 255].
        draws: uniform in [0, 1), [N, COLOUR_DRAWS].

    Returns:
        The changed images, of the same shape and dtype; the lighting may leave [0, 255].
    """
    brightness, contrast, saturation = (0.6 + 0.8 * draws[:, i].view(-1, 1, 1, 1) for i in range(3))
    images = (images * brightness).clamp_(0, 255)
    mean = _grey(images).mean((1, 2, 3), keepdim=True)
    images = torch.lerp(mean, images, contrast).clamp_(0, 255)
    images = torch.lerp(_grey(images), images, saturation).clamp_(0, 255)
    # Draws are below 1 already; a draw of 0 would give minus infinity.
    normal = 0.1 * torch.special.ndtri(draws[:, 3:].clamp_min(2**-25))
    scaled = images.new_tensor(_COMPONENTS) * images.new_tensor(_DEVIATIONS)
    return images.add_(255 * (normal @ scaled.T)[:, :, None, None])


def _grey(images: Tensor) -> Tensor:
    weights = images.new_tensor(_GREY).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def mixing(mixup_alpha: float, cutmix_alpha: float, num_classes: int) -> v2.Transform | None:
    """Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a batch; with both, one at random.

    Args:
        mixup_alpha: parameter of the beta distribution of Mixup's shares; 0: no Mixup.
        cutmix_alpha: the same of CutMix.
        num_classes: number of classes.

    Returns:
        A transform of images, float32 [N, 3, H, W], and classes, int64 [N], to mixed images and shares of the
        classes, float32 [N, classes], that draws from torch's generator; None when both parameters are 0.
    """
    if not mixup_alpha and not cutmix_alpha:
        return None
    from torchvision.transforms import v2  # here: other runs need not wait for it

    chosen: list[v2.Transform] = []
    if mixup_alpha:
        chosen.append(v2.MixUp(alpha=mixup_alpha, num_classes=num_classes))
    if cutmix_alpha:
        chosen.append(v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes))
    return v2.RandomChoice(chosen)
