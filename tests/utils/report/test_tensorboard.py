"""TensorBoard's event files, read back."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from utils.errors import UserError
from utils.report.quantizer_record import HealthRow, Histogram
from utils.report.tensorboard import Board, draw_levels

ROW = HealthRow(
    name="conv.quant_activation", tag="fm", method="lsq", levels=4, bits=2, used=3, range=1.5,
    range_lowest=1.5, range_highest=1.5, clipped=0.1,
    shares=(0.5, 0.25, 0.25, 0.0), values=(0.0, 0.5, 1.0, 1.5),
    histogram=Histogram(edges=(0.0, 1.0, 2.0), counts=(6, 2)),
)  # fmt: skip


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_board_writes_event_files(tmp_path: Path) -> None:
    board = Board(tmp_path / "board")
    for step in range(3):
        board.scalars({"train/loss": 2.0 - step, "lr": 0.5}, step)
    weights = torch.tensor([[0.0, 1.0], [3.0, math.nan]], dtype=torch.bfloat16, requires_grad=True)
    board.histogram("weights", weights, 2)
    board.histogram("diverged", torch.full((4,), math.inf), 2)
    board.close()
    read = events(tmp_path / "board")
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(0, 2), (1, 1), (2, 0)]
    assert [event.value for event in read.Scalars("lr")] == [0.5] * 3
    assert read.Tags()["histograms"] == ["weights"]
    (histogram,) = read.Histograms("weights")
    value = histogram.histogram_value
    assert (histogram.step, value.num, value.min, value.max, value.sum) == (2, 3, 0, 3, 4)


def test_a_resumed_board_hides_what_is_done_again(tmp_path: Path) -> None:
    for purge_step, steps, value in ((None, range(4), 1.0), (2, range(2, 5), 2.0)):
        board = Board(tmp_path, purge_step)
        for step in steps:
            board.scalars({"loss": value}, step)
        board.close()
    points = [(event.step, event.value) for event in events(tmp_path).Scalars("loss")]
    assert points == [(0, 1), (1, 1), (2, 2), (3, 2), (4, 2)]


def test_a_board_without_folder_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    board = Board(None)
    board.scalars({"loss": 1.0}, 0)
    board.histogram("weights", torch.ones(3), 0)
    board.close()
    assert list(tmp_path.iterdir()) == []


def test_a_board_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write TensorBoard's files"):
        Board(tmp_path / "file" / "board")


def test_counts_are_shown_as_they_are(tmp_path: Path) -> None:
    board = Board(tmp_path)
    board.counts("inputs", ROW.histogram, 3)
    board.close()
    (event,) = events(tmp_path).Histograms("inputs")
    value = event.histogram_value
    assert (event.step, value.num, value.sum, value.sum_squares) == (3, 8, 6, 6)
    assert [(limit, count) for limit, count in zip(value.bucket_limit, value.bucket, strict=True)] == [
        (1, 6),
        (2, 2),
    ]


def test_levels_are_drawn(tmp_path: Path) -> None:
    """A line at each level, among the inputs."""
    axes = draw_levels(ROW, 5).axes[0]
    assert [line.get_xdata()[0] for line in axes.lines] == [0.0, 0.5, 1.0, 1.5]
    assert "epoch 5: 4 levels" in axes.get_title()
    board = Board(tmp_path)
    board.levels("levels", ROW, 5)
    board.close()
    (picture,) = events(tmp_path).Images("levels")
    assert (picture.step, picture.width, picture.height) == (5, 416, 208)


def test_images_are_clamped(tmp_path: Path) -> None:
    board = Board(tmp_path)
    board.images("images", torch.full((4, 3, 5, 7), 2.0), 0)
    board.close()
    (picture,) = events(tmp_path).Images("images")
    assert picture.encoded_image_string.startswith(b"\x89PNG")


def test_options_and_outcome_are_one_run(tmp_path: Path) -> None:
    """No second folder, which would be another run; metrics that are not finite are left out."""
    board = Board(tmp_path)
    board.outcome({"lr": 0.1, "steps": (1, 2), "mean": None}, {"top1": 90.0, "loss": math.nan}, 7)
    board.close()
    assert [path.is_file() for path in tmp_path.iterdir()] == [True]
    read = events(tmp_path)
    content = read.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    options = HParamsPluginData.FromString(content).session_start_info.hparams
    assert options["lr"].number_value == 0.1
    assert (options["steps"].string_value, options["mean"].string_value) == ("(1, 2)", "None")
    assert [(event.step, event.value) for event in read.Scalars("top1")] == [(7, 90)]
    assert "loss" not in read.Tags()["scalars"]
