"""Colours that become grey (`--channels 1`): Pillow's mode L, the same for every source."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.utils.data.helpers import DIGITS, FAKE, read, validation
from tests.utils.data.test_dali_loader import needs_dali
from utils.config.schema import DataConfig
from utils.data.grey import grey
from utils.data.loaders import Loaders
from utils.data.sources import check_data, open_data
from utils.errors import UserError


def pillow(images: torch.Tensor) -> np.ndarray:
    """Images, uint8 [N, 3, H, W], in mode L: uint8 [N, H, W]."""
    pictures = (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images)
    return np.stack([np.asarray(picture.convert("L")) for picture in pictures])


def shown(loaders: Loaders) -> torch.Tensor:
    """The validation images before normalisation, rounded: uint8 [N, C, H, W]."""
    images = torch.cat([images for images, _ in read(validation(loaders))])
    shape = (1, -1, 1, 1)
    plain = images * torch.tensor(loaders.std).view(shape) + torch.tensor(loaders.mean).view(shape)
    return (255 * plain).round().to(torch.uint8)


def test_bytes_become_those_of_pillow() -> None:
    images = torch.randint(0, 256, (4, 3, 64, 48), dtype=torch.uint8)
    assert np.array_equal(grey(images)[:, 0].numpy(), pillow(images))
    weighted = (images.double() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    # Not rounded: what augmentation has made.
    torch.testing.assert_close(grey(images.float())[:, 0].double(), weighted, rtol=0, atol=0.01)


def test_equal_channels_become_that_channel() -> None:
    channel = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(grey(channel.expand(1, 3, 16, 16)), channel.float())
    assert grey(channel) is channel


@pytest.mark.parametrize("options", [{}, {"colour": True, "rand_augment": 3, "mixup_alpha": 0.2}])
def test_a_set_of_colours(options: dict[str, object]) -> None:
    coloured, config = open_data(FAKE), replace(FAKE, channels=1, **options)
    loaders = open_data(config)
    assert np.array_equal(shown(loaders)[:, 0].numpy(), pillow(shown(coloured)))
    assert loaders.mean == pytest.approx((0.5,)) and loaders.std == pytest.approx((0.2,))
    assert {images.shape[1:] for images, _ in read(loaders.train)} == {(1, 16, 16)}


def test_the_statistics_of_a_set() -> None:
    assert open_data(replace(FAKE, channels=1, mean=(0.25,), std=(0.5,))).mean == (0.25,)
    with pytest.raises(UserError, match="--mean has 3 values: grey images have one"):
        check_data(replace(FAKE, channels=1, mean=(0.5,) * 3, std=(0.5,)))


def test_grey_images_stay_as_they_are() -> None:
    config = replace(DIGITS, input_size=16)
    three, one = (read(open_data(replace(config, channels=channels)).train)[0] for channels in (3, 1))
    assert one[0].shape[1] == 1
    torch.testing.assert_close(one[0], three[0][:, :1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Folders of PNG files, which all decoders read alike: colours, grey, and grey of 16 bits."""
    root, draw = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    for part in ("train", "val"):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
            coarse = draw.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            coloured = Image.fromarray(coarse).resize((48, 40), Image.Resampling.BICUBIC)
            coloured.save(root / part / name / "0.png")
            coloured.convert("L").save(root / part / name / "1.png")
            Image.fromarray(256 * np.asarray(coloured.convert("L")).astype(np.uint16)).save(
                root / part / name / "2.png"
            )
    return DataConfig(
        dataset="imagenet", root=root, num_classes=2, input_size=28, batch_size=6, val_batch_size=6, workers=0,
        max_value=65535,
    )  # fmt: skip


def test_files(folder: DataConfig) -> None:
    found = shown(open_data(replace(folder, channels=1)))
    assert np.array_equal(found[:, 0].numpy(), pillow(shown(open_data(folder))))
    colours, eight, sixteen = found[:3].int()  # the same picture; interpolation and grey in another order
    assert (colours - eight).abs().max() <= 1 and torch.equal(eight, sixteen)


@needs_dali
def test_files_that_dali_decodes(folder: DataConfig) -> None:
    both = [open_data(replace(folder, channels=1, dataset=name)) for name in ("imagenet", "dali")]
    for part in ("train", "val"):
        ours, dalis = (read(getattr(loaders, part)) for loaders in both)
        for (images, _), (others, _) in zip(ours, dalis, strict=True):
            assert images.shape[1] == 1 and torch.equal(images, others)


def test_a_folder_has_imagenets_statistics(folder: DataConfig) -> None:
    loaders = open_data(replace(folder, channels=1))
    assert loaders.mean == pytest.approx((0.299 * 0.485 + 0.587 * 0.456 + 0.114 * 0.406,), abs=1e-4)
    assert loaders.std == pytest.approx((0.299 * 0.229 + 0.587 * 0.224 + 0.114 * 0.225,), abs=1e-4)
