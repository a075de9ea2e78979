"""The data set glyphs: what is drawn, that it is the same every time, and how it reaches training."""

from __future__ import annotations

import shutil
import string
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks import glyphs as contact
from utils.config.resolve import read
from utils.config.schema import DataConfig
from utils.data.augment import warp
from utils.data.glyphs import CHARACTERS, HELD_OUT_FONTS, TRAIN_FONTS, find_fonts, font_files, glyphs
from utils.data.loader import epoch_order
from utils.data.loaders import Loaders
from utils.data.sources import check_data, open_data
from utils.errors import UserError

CONFIG = DataConfig(dataset="glyphs", num_classes=62, batch_size=3100, val_batch_size=1240)

Split = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def drawn() -> tuple[Split, Split]:
    return glyphs()


@pytest.fixture(scope="module")
def loaders() -> Loaders:
    return open_data(CONFIG)


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_every_class_has_its_images(drawn: tuple[Split, Split]) -> None:
    assert string.digits + string.ascii_uppercase + string.ascii_lowercase == CHARACTERS
    for (images, target), count in zip(drawn, (50, 20), strict=True):
        assert images.shape == (62 * count, 1, 32, 32)
        assert images.dtype == torch.uint8
        assert target.dtype == torch.int64
        assert target.bincount().tolist() == [count] * 62


def test_drawing_again_gives_the_same(drawn: tuple[Split, Split]) -> None:
    np.random.seed(5)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for (images, target), (again, target_again) in zip(drawn, glyphs(), strict=True):
        assert torch.equal(images, again)
        assert torch.equal(target, target_again)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_two_images_are_alike(drawn: tuple[Split, Split]) -> None:
    (train, _), (val, _) = drawn
    assert len(rows(train) | rows(val)) == len(train) + len(val)


def test_validation_has_fonts_of_its_own() -> None:
    assert len({*TRAIN_FONTS, *HELD_OUT_FONTS}) == len(TRAIN_FONTS) + len(HELD_OUT_FONTS) == 20
    assert set(font_files()) == {*TRAIN_FONTS, *HELD_OUT_FONTS}


@pytest.mark.parametrize("name", [*TRAIN_FONTS, *HELD_OUT_FONTS])
def test_a_font_has_every_character(name: str) -> None:
    """No character is missing, which would be drawn as the same box, and no two look exactly alike."""
    font = ImageFont.truetype(font_files()[name], 64)
    shapes = set()
    for character in [*CHARACTERS, "\uffff"]:
        image = Image.new("L", (128, 128))
        ImageDraw.Draw(image).text((64, 96), character, fill=255, font=font, anchor="ms")
        shapes.add(image.tobytes())
        assert 0.005 < np.asarray(image).mean() / 255 < 0.5 or character == "\uffff"
    assert len(shapes) == len(CHARACTERS) + 1


def test_images_fill_the_range_and_show_a_glyph_in_the_middle(drawn: tuple[Split, Split]) -> None:
    for images, _ in drawn:
        values = images.float()
        assert (values.flatten(1).std(1) > 8).all()
        border = torch.cat([values[..., 0, :], values[..., -1, :]], dim=-1).mean()
        assert values[..., 8:24, 8:24].mean() - border > 40  # bright on dark


def test_classes_look_different(drawn: tuple[Split, Split]) -> None:
    """The nearest mean training image names the class far more often than chance, yet often wrongly."""
    (train, target), (val, val_target) = drawn

    def standardised(images: Tensor) -> Tensor:
        flat = images.float().flatten(1)
        return (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)

    sums = torch.zeros(62, 32 * 32).index_add_(0, target, standardised(train))
    nearest = torch.cdist(standardised(val), sums / 50).argmin(1)
    right = (nearest == val_target).float()
    assert 0.3 < right.mean() < 0.9  # chance: 1 / 62
    by_class = right.view(62, 20).mean(1)
    assert (by_class > 0).float().mean() > 0.9


def test_loaders_deliver_three_equal_normalised_channels(
    drawn: tuple[Split, Split], loaders: Loaders
) -> None:
    assert loaders.val is not None
    ((images, target),) = list(loaders.val)
    (train, _), (val, val_target) = drawn
    values = train.numpy().astype(np.float64) / 255
    assert loaders.mean == pytest.approx((values.mean(),) * 3, rel=1e-4)
    assert loaders.std == pytest.approx((values.std(),) * 3, rel=1e-3)
    assert torch.equal(target, val_target)
    expected = (val.numpy() / 255 - values.mean()) / values.std()
    np.testing.assert_allclose(images.numpy(), np.repeat(expected, 3, axis=1), atol=2e-3)
    assert loaders.num_classes == 62


def test_other_sizes_are_resized(drawn: tuple[Split, Split]) -> None:
    loaders = open_data(replace(CONFIG, input_size=16, val_batch_size=8))
    assert loaders.val is not None
    images, _ = next(iter(loaders.val))
    assert images.shape == (8, 3, 16, 16)
    pixels = images[0, 0].numpy() * loaders.std[0] + loaders.mean[0]
    original = Image.fromarray(drawn[1][0][0, 0].numpy().astype(np.float32))
    expected = np.asarray(original.resize((16, 16), Image.Resampling.BILINEAR)) / 255
    np.testing.assert_allclose(pixels, expected, atol=2e-3)


def test_what_moves_in_is_not_black() -> None:
    white = torch.full((4, 1, 32, 32), 255, dtype=torch.uint8)
    draws = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(warp(white, draws, padding="border").numpy(), 255, atol=1e-3)
    assert warp(white, draws).min() < 100


def test_training_is_augmented_anew_each_epoch(drawn: tuple[Split, Split], loaders: Loaders) -> None:
    train = drawn[0][0].float()
    seen = []
    for epoch in range(2):
        loaders.train.set_epoch(epoch)
        images, _ = next(iter(loaders.train))
        order = epoch_order(len(train), CONFIG.seed, epoch)
        seen.append(255 * (images[order.argsort(), :1] * loaders.std[0] + loaders.mean[0]))
    for one, other in ((seen[0], seen[1]), (seen[0], train), (seen[1], train)):
        difference = (one - other).abs().mean((1, 2, 3))
        assert (difference > 0.5).all()
        assert difference.mean() < train.std()  # still the same glyphs


# ---- mistakes, the keyword and the contact sheet


def test_the_number_of_classes_is_fixed() -> None:
    with pytest.raises(UserError, match="glyphs has 62 classes, not 10: write --num_classes 62"):
        check_data(replace(CONFIG, num_classes=10))


def test_a_missing_font_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fonts = tmp_path / "fonts" / "ttf"
    fonts.mkdir(parents=True)
    for path in font_files().values():
        shutil.copy(path, fonts)
    (fonts / "cmss10.ttf").unlink()
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    for function in (check_data, open_data):
        with pytest.raises(UserError, match=r"cmss10\.ttf is not in .*: install matplotlib with pip"):
            function(CONFIG)


@pytest.mark.parametrize(
    "line",
    [
        "--keyword glyphs",
        "--dataset glyphs",
        "--dataset glyphs --keyword glyphs,cbas",
        "--keyword glyphs,cbsa,dorefa,lsq --fm_enable --wt_enable --fm_bit 2 --wt_bit 2",
    ],
)
def test_the_keyword_and_the_option_choose_it(line: str) -> None:
    config = read(line.split())
    assert config.keywords[0] == "glyphs"
    assert config.data.dataset == "glyphs"
    assert config.data.num_classes == config.model.num_classes == 62
    assert config.data.input_size == 32
    assert config.model.stem.kind == "cifar"
    assert config.warnings == ()


def test_the_contact_sheet_shows_every_class(drawn: tuple[Split, Split]) -> None:
    (train, _), (val, _) = drawn
    sheet = np.asarray(contact.sheet(train, val))
    assert sheet.shape == (2 * (8 * 32 + contact.GAP) + 2 * contact.GAP, 31 * 32)
    for label, column, top in ((0, 0, 0), (61, 30, 8 * 32 + 3 * contact.GAP)):
        tile = sheet[top : top + 32, column * 32 : column * 32 + 32]
        np.testing.assert_array_equal(tile, train[label * 50, 0].numpy())
        below = top + 5 * 32 + contact.GAP
        tile = sheet[below : below + 32, column * 32 : column * 32 + 32]
        np.testing.assert_array_equal(tile, val[label * 20 + 16, 0].numpy())


def folder_of(folder: Path, names: tuple[str, ...]) -> Path:
    (folder / "inner").mkdir(parents=True)
    for i, name in enumerate(names):
        shutil.copy(font_files()[name], folder / ("inner" if i % 2 else "") / f"{i}.ttf")
    return folder


def test_fonts_of_a_folder(tmp_path: Path, drawn: tuple[Split, Split]) -> None:
    """Each fifth one is held out, and a class begins where the class before it ended."""
    folder = folder_of(tmp_path / "fonts", TRAIN_FONTS[:11])
    found = find_fonts(folder)
    assert [path.name for path in found.val] == [
        "6.ttf",
        "7.ttf",
    ]  # 0, 10, 2, 4, 6, 8 stand before inner/1, 3, 5, 7, 9
    assert {path.stem for path in found.train} == {*map(str, range(11))} - {"6", "7"}
    loaders = open_data(replace(CONFIG, fonts=folder))
    assert loaders.val is not None
    ((images, target),) = list(loaders.val)
    assert torch.equal(target, drawn[1][1]) and images.shape[0] == 1240
    assert not torch.equal(glyphs(folder)[1][0], drawn[1][0])


def test_fonts_that_cannot_be_drawn_with(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "fonts", TRAIN_FONTS[:4])
    for wrong, said in (
        (tmp_path / "none", "is not a folder"),
        (folder, "holds 4 .ttf and .otf files: put 5"),
    ):
        with pytest.raises(UserError, match=f"^--fonts {wrong} {said}"):
            check_data(replace(CONFIG, fonts=wrong))
    symbols = font_files()[TRAIN_FONTS[0]].parent / "STIXSizFiveSymReg.ttf"
    shutil.copy(symbols, folder / "a.ttf")
    with pytest.raises(UserError, match=r"^--fonts: .*a\.ttf has no '0'; remove it$"):
        check_data(replace(CONFIG, fonts=folder))
    (folder / "a.ttf").write_bytes(b"no font")
    with pytest.raises(UserError, match=r"^--fonts: .*a\.ttf cannot be read as a font"):
        check_data(replace(CONFIG, fonts=folder))


def test_fonts_are_for_glyphs() -> None:
    assert read(["--keyword", "glyphs", "--fonts", "somewhere"]).data.fonts == Path("somewhere")
    with pytest.raises(UserError, match="--fonts somewhere has no effect with the data set digits: write"):
        read(["--keyword", "digits", "--fonts", "somewhere"])
