"""From an image, or its file, to the tensor that a network was validated with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.config.image_size import InputSize, sides
from utils.config.schema import DataConfig
from utils.data.image_file import DECODE_ERRORS, Decoding, as_rgb, decode, read, reason_of
from utils.data.loader import Normalisation
from utils.data.loaders import CPU, Loaders
from utils.data.tensor_loader import resize
from utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """Turns an image into the tensor that a network takes, exactly as its validation did.

    Attributes:
        size: height and width of the tensor, or one number for both.
        mean: per channel, of images in [0, 1]; one number: colours become grey.
        std: per channel, likewise.
        resize_ratio: an image is resized until it covers this many times the size, and its centre is cut out;
            None: the whole image is resized to the size.
        interpolation: of resizing, with antialiasing; there is only "bilinear".
        max_value: the value of 16-bit images that becomes white; None: 65535.
        ignore_orientation: JPEG, PNG and WebP stay as they are stored, whatever EXIF says.

    Example:
        >>> from PIL import Image
        >>> from utils.data.transform import ImageTransform
        >>> transform = ImageTransform(size=8, mean=(0.5,), std=(0.5,), resize_ratio=None)
        >>> transform(Image.new("RGB", (16, 12), "white")).shape
        torch.Size([1, 8, 8])
    """

    size: InputSize
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_ratio: float | None = None
    interpolation: str = "bilinear"
    max_value: int | None = None
    ignore_orientation: bool = False

    @property
    def channels(self) -> int:
        """Channels of the tensor: 3, or 1 for grey."""
        return len(self.mean)

    def __call__(self, image: Image.Image | str | os.PathLike[str] | bytes, name: str = "") -> Tensor:
        """The tensor of an image, or of a file's by its path or bytes, float32 [C, H, W]; `name` is for messages.

        Raises:
            UserError: the file cannot be read, or has pixels of 32 bits.
        """
        return self._normalised(torch.from_numpy(np.array(self.decoded(image, name))))

    def decoded(self, image: Image.Image | str | os.PathLike[str] | bytes, name: str = "") -> Image.Image:
        """An image, or that of a file, in RGB and upright, in its own size; raises as a call does."""
        decoding = Decoding(
            ignore_orientation=self.ignore_orientation,
            max_value=65535 if self.max_value is None else self.max_value,
        )
        try:
            if isinstance(image, Image.Image):
                return as_rgb(image, decoding)
            return decode(image if isinstance(image, bytes) else read(os.fspath(image)), decoding)
        except DECODE_ERRORS as error:
            if not name and not isinstance(image, Image.Image | bytes):
                name = os.fspath(image)
            raise UserError(f"cannot read {f'the image {name}'.strip()} ({reason_of(error)})") from error

    def _normalised(self, pixels: Tensor) -> Tensor:
        """The tensor of uint8 [H, W, 3]."""
        size = sides(self.size)
        if self.resize_ratio is not None:
            from utils.data.crop import resize_to_centre  # here: other data needs no torchvision

            images = resize_to_centre(pixels, size, self.resize_ratio)[None]
        else:
            if (pixels == pixels[..., :1]).all():  # grey in data sets of tensors has one channel
                pixels = pixels[..., :1]
            images = pixels.permute(2, 0, 1)[None]
            if images.shape[-2:] != size:
                images = resize(images.float(), size, "bilinear")
        return Normalisation(self.mean, self.std, CPU)(images)[0]

    def to_dict(self) -> dict[str, Any]:
        """It as plain numbers and texts, for a checkpoint or an exported file's metadata."""
        height, width = sides(self.size)
        return {
            "height": height,
            "width": width,
            "channels": self.channels,
            "mean": list(self.mean),
            "std": list(self.std),
            "resize_ratio": self.resize_ratio,
            "interpolation": self.interpolation,
            "max_value": self.max_value,
            "ignore_orientation": self.ignore_orientation,
        }

    @classmethod
    def from_dict(cls, values: Any, source: str) -> ImageTransform:
        """It from `to_dict` of it; raises UserError, which names the file `source`, for anything else."""
        try:
            height, width, mean, std = (values[name] for name in ("height", "width", "mean", "std"))
            ratio, most = values["resize_ratio"], values["max_value"]
            fits = (
                all(type(side) is int and 0 < side < 2**15 for side in (height, width))
                and len(mean) == len(std) == values["channels"]
                and len(mean) in (1, 3)
                and all(type(number) is float and abs(number) < np.inf for number in (*mean, *std))
                and all(std)
                and (ratio is None or 1 <= ratio < 100)
                and values["interpolation"] == "bilinear"
                and (most is None or (type(most) is int and 0 < most < 2**16))
                and type(values["ignore_orientation"]) is bool
            )
        except (KeyError, TypeError) as error:
            raise _damaged(source, values) from error
        if not fits:
            raise _damaged(source, values)
        return cls(
            size=height if height == width else (height, width),
            mean=tuple(mean),
            std=tuple(std),
            resize_ratio=ratio,
            max_value=most,
            ignore_orientation=values["ignore_orientation"],
        )


def transform_of(config: DataConfig, loaders: Loaders) -> ImageTransform:
    """The transform that gives what the validation loader gives."""
    return ImageTransform(
        size=config.input_size,
        mean=tuple(map(float, loaders.mean)),
        std=tuple(map(float, loaders.std)),
        resize_ratio=loaders.resize_ratio,
        max_value=loaders.max_value,
        ignore_orientation=config.ignore_orientation,
    )


def _damaged(source: str, values: Mapping[str, Any]) -> UserError:
    return UserError(f"{source} is damaged: its images are described as {values!r:.200}; use another file")
