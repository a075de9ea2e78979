"""The curves of a run as a picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tests.utils.report.columns import FIELDS
from utils.report.curves import draw_curves


def curves(epochs: int, **changes: float) -> list[dict[str, float]]:
    """Rows as a training writes them."""
    return [
        {
            **dict.fromkeys(FIELDS, 1.0),
            "epoch": epoch,
            "lr": 0.1 ** (epoch // 4 + 1),
            "train_loss": 2 / (epoch + 1),
            "train_top1": 90 - 80 / (epoch + 1),
            "val_loss": 2.5 / (epoch + 1),
            "val_top1": 85 - 70 / (epoch + 1),
            **changes,
        }
        for epoch in range(epochs)
    ]


def has_colour(picture: np.ndarray, colour: str) -> list[bool]:
    """Tell for each third of the picture, left to right, whether the colour is in it."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    found = (np.abs(picture[..., :3] - wanted) < 0.01).all(-1)
    return [bool(part.any()) for part in np.array_split(found, 3, axis=1)]


@pytest.mark.parametrize(
    ("rows", "train", "val", "rate"),
    [
        (curves(12), True, True, True),
        (curves(60), True, True, True),
        (curves(1), True, True, True),
        (curves(5, val_loss=math.nan, val_top1=math.nan), True, False, True),
        (curves(5, train_loss=math.inf, train_top1=math.nan), False, True, True),
        (curves(5, lr=0.0), True, True, True),
        ([{"epoch": 0.0, "lr": 0.1, "train_loss": 1.0, "train_top1": 10.0}], True, False, True),
        ([], False, False, False),
    ],
)
def test_curves(tmp_path: Path, rows: list[dict[str, float]], train: bool, val: bool, rate: bool) -> None:
    path = tmp_path / "new" / "curves.png"
    draw_curves(rows, path, "resnet20 $lsq_2bit")
    picture = imread(path)
    assert picture.shape[0] >= 400
    assert picture.shape[1] >= 1200
    assert has_colour(picture, "#0072b2") == [train, train, False]
    assert has_colour(picture, "#d55e00") == [val, val, False]
    assert has_colour(picture, "#009e73") == [False, False, rate]
