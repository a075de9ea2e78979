"""Weights of classes: balanced ones, those of a file, and what is wrong with files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.utils.data.helpers import FAKE
from utils.config.schema import DataConfig
from utils.data.class_weights import weights_of
from utils.data.sources import check_data, open_data
from utils.errors import UserError

NAMES = ("ant", "bee, honey", "cat")
TARGET = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2])


def test_balanced_weights_are_the_formula() -> None:
    """N / (C * n_c): each class has the same sum of weights."""
    assert weights_of("balanced", TARGET, NAMES) == pytest.approx((10 / 18, 10 / 9, 10 / 3))


def test_weights_of_a_file_keep_their_ratios_and_have_the_mean_one(tmp_path: Path) -> None:
    path = tmp_path / "weights.csv"
    path.write_text('\ufeffclass,weight\n"bee, honey",2\ncat, 8\n\nant,1e0\n', encoding="utf-8")
    found = torch.tensor(weights_of(str(path), TARGET, NAMES))
    torch.testing.assert_close(found / found[0], torch.tensor([1.0, 2.0, 8.0]))
    assert float(found[TARGET].mean()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line must be class,weight, then a line for every class"),
        ("0,1\n1,1\n2,1\n3,1\n", "the first line must be class,weight"),
        ("class,weight\n0,1\n2,1\n", "lacks 2 classes: add 1, 3$"),
        ("class,weight\n0,1\n1,1\n2,1\n3,1\n33,1\n", "there is no class '33'; did you mean 3"),
        ("class,weight\n0,1\n1,1\n0,1\n", "the class '0' is there twice"),
        ("class,weight\n0,1\n1\n", "'1' must be a class, a comma and its weight"),
        ("class,weight\n0,1\n1,2,3\n", "'1,2,3' must be a class, a comma and its weight"),
        ("class,weight\n0,much\n", "the weight 'much' of '0' must be a number from 1e-06 to 1e\\+06"),
        ("class,weight\n0,0\n", "the weight '0' of '0' must be a number"),
        ("class,weight\n0,-1\n", "the weight '-1' of '0' must be a number"),
        ("class,weight\n0,nan\n", "the weight 'nan' of '0' must be a number"),
        ("class,weight\n0,inf\n", "the weight 'inf' of '0' must be a number"),
        (b"class,weight\n\xff,1\n", "is no CSV file in UTF-8"),
        (None, "No such file or directory; write balanced, or the path of a CSV file"),
    ],
)
def test_files_are_checked_class_by_class(text: str | bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        check_data(replace(FAKE, class_weights=str(path)))
    assert str(error.value).startswith(f"--class_weights {path}") and "\n" not in str(error.value)


def test_a_class_without_images_cannot_be_balanced() -> None:
    with pytest.raises(UserError, match=r"--class_weights: the training set has no image of 2, 3$"):
        open_data(replace(FAKE, fake_size=2, class_weights="balanced"))


def test_folders_name_their_classes(imagenet: DataConfig, tmp_path: Path) -> None:
    path = tmp_path / "weights.csv"
    path.write_text("class,weight\ncat,4\nbee,2\nant,3\n", encoding="utf-8")
    loaders = open_data(replace(imagenet, class_weights=str(path)))
    assert loaders.classes == ("ant", "bee", "cat")
    assert loaders.class_weights == pytest.approx((1, 2 / 3, 4 / 3))
