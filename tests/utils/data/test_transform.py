"""The transform of a checkpoint: what it makes of an image is the tensor of the validation loader, bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.utils.data.helpers import DIGITS, FAKE, read, validation
from tests.utils.data.test_orientation import exif
from utils.config.schema import DataConfig
from utils.data.sources import open_data, transform_by_name
from utils.data.transform import ImageTransform, transform_of
from utils.errors import UserError


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of all kinds that training takes, of one class."""
    root, draw = tmp_path_factory.mktemp("kinds"), np.random.default_rng(0)
    for part in ("train", "val"):
        folder = root / part / "one"
        folder.mkdir(parents=True)
        colours = draw.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        deep = draw.integers(0, 4096, (50, 40), dtype=np.uint16)
        Image.fromarray(colours).save(folder / "a.jpg", quality=90)
        Image.fromarray(colours).save(folder / "turned.jpg", exif=exif(6))
        Image.fromarray(colours).save(folder / "turned.png", exif=exif(5))
        Image.fromarray(colours).save(folder / "turned.tiff", exif=exif(8))
        Image.fromarray(colours[..., 0]).save(folder / "grey.png")
        Image.fromarray(colours).convert("P").save(folder / "palette.png")
        Image.fromarray(np.dstack([colours, colours[..., :1]])).save(folder / "alpha.png")
        Image.fromarray(colours).convert("CMYK").save(folder / "cmyk.jpg")
        Image.fromarray(deep).save(folder / "deep.png")
        Image.fromarray(draw.integers(0, 256, (20, 700, 3), dtype=np.uint8)).save(folder / "wide.webp")
    return root


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channels": 1},
        {"input_size": (96, 160)},
        {"ignore_orientation": True},
        {"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 0.7), "max_value": 1000},
    ],
)
def test_it_is_the_validation_of_files(photos: Path, options: dict[str, object]) -> None:
    config = DataConfig(
        dataset="imagenet", root=photos, num_classes=1, val_batch_size=4, workers=0,
        **({"input_size": 33} | options),  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    loaders = open_data(config)
    images = torch.cat([batch for batch, _ in read(validation(loaders))])
    transform = transform_of(config, loaders)
    assert ImageTransform.from_dict(transform.to_dict(), "x") == transform
    paths = sorted((photos / "val" / "one").iterdir())
    assert len(paths) == len(images) == 10
    for path, expected in zip(paths, images, strict=True):
        assert torch.equal(transform(path), expected), path
        with Image.open(path) as image:
            if path.name != "turned.tiff" or not config.ignore_orientation:
                assert torch.equal(transform(image), expected), path
    if config.max_value is None:  # found in the images, as a checkpoint without it cannot
        transform = transform_of(config, open_data(config))
        by_name = transform_by_name(config)
        assert by_name.max_value is None and transform.max_value == 4095
    else:
        assert transform_by_name(config) == transform


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "config", [DIGITS, FAKE, DataConfig(dataset="glyphs", num_classes=62, input_size=24)]
)
def test_it_is_the_validation_of_tensors(config: DataConfig, channels: int, tmp_path: Path) -> None:
    """The images of a data set without files, written as files."""
    config = DataConfig(
        dataset=config.dataset, num_classes=config.num_classes, input_size=config.input_size, channels=channels,
        batch_size=8, val_batch_size=8, fake_size=32,
    )  # fmt: skip
    loaders = open_data(config)
    loader = validation(loaders)
    images, _ = read(loader)[0]
    stored = loader._store[torch.arange(8)]  # pyright: ignore[reportAttributeAccessIssue]
    transform = transform_of(config, loaders)
    assert transform == transform_by_name(config)
    for pixels, expected in zip(stored, images, strict=True):
        array = pixels.expand(3, -1, -1).permute(1, 2, 0) if len(pixels) == 3 else pixels[0]
        Image.fromarray(array.contiguous().numpy()).save(tmp_path / "x.png")
        assert torch.equal(transform(tmp_path / "x.png"), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [("mean", [0.5]), ("std", [0.0] * 3), ("height", -1), ("interpolation", "bicubic"), ("resize_ratio", "x"),
     ("max_value", 0), ("channels", 4), ("ignore_orientation", None)],
)  # fmt: skip
def test_a_damaged_description_is_refused(name: str, value: object) -> None:
    images = ImageTransform(size=8, mean=(0.5,) * 3, std=(0.5,) * 3).to_dict()
    with pytest.raises(UserError, match="x is damaged: its images are described as"):
        ImageTransform.from_dict({**images, name: value}, "x")
    with pytest.raises(UserError, match="x is damaged"):
        ImageTransform.from_dict({key: one for key, one in images.items() if key != name}, "x")


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    transform = ImageTransform(size=8, mean=(0.5,), std=(0.5,))
    (tmp_path / "x.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "deep.tiff")
    for name in ("x.png", "deep.tiff", "gone.png"):
        with pytest.raises(UserError, match=f"cannot read the image .*{name} "):
            transform(tmp_path / name)
    with (
        Image.open(tmp_path / "deep.tiff") as image,
        pytest.raises(UserError, match=r"cannot read the image .pixels of 32 bits"),
    ):
        transform(image)
