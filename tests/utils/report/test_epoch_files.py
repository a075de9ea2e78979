"""The files with a line per epoch: exact, whole after a resume, refused where they are damaged."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.utils.report.columns import FIELDS
from utils.errors import UserError
from utils.report import epoch_files


def row(epoch: int, validated: bool = True) -> dict[str, float]:
    """Numbers of an epoch that have no short decimal form."""
    values = {name: (epoch + 1) / (index + 3) for index, name in enumerate(FIELDS)}
    if not validated:
        values = {name: value for name, value in values.items() if not name.startswith("val_")}
    return {**values, "epoch": epoch}


def test_metrics_are_read_back_exactly(tmp_path: Path) -> None:
    metrics = epoch_files.MetricsFile(tmp_path / "new" / "metrics.csv", FIELDS)
    for epoch in range(3):
        metrics.append(row(epoch))
    assert metrics.path.read_text().splitlines()[0] == ",".join(FIELDS)
    assert len(metrics.path.read_text().splitlines()) == 4
    assert epoch_files.MetricsFile.read(metrics.path) == [row(epoch) for epoch in range(3)]
    metrics.append(row(3, validated=False))
    last = epoch_files.MetricsFile.read(metrics.path)[-1]
    assert {name for name, value in last.items() if math.isnan(value)} == {"val_loss", "val_top1", "val_top5"}
    with pytest.raises(ValueError, match="unheard"):
        metrics.append({"unheard": 1.0})


@pytest.mark.parametrize("reached", [3, 4, 6])
@pytest.mark.parametrize("tail", ["", "6,0.1"])
def test_a_resumed_file_equals_the_uninterrupted_one(tmp_path: Path, reached: int, tail: str) -> None:
    whole = epoch_files.MetricsFile(tmp_path / "whole.csv", FIELDS)
    for epoch in range(6):
        whole.append(row(epoch))
    resumed = epoch_files.MetricsFile(tmp_path / "resumed.csv", FIELDS)
    for epoch in range(reached):
        resumed.append(row(epoch))
    with resumed.path.open("a") as file:
        file.write(tail)  # the line that was being written when the run was killed
    resumed = epoch_files.MetricsFile(tmp_path / "resumed.csv", FIELDS)
    resumed.truncate_after(3)
    assert epoch_files.MetricsFile.read(resumed.path) == [row(epoch) for epoch in range(3)]
    for epoch in range(3, 6):
        resumed.append(row(epoch))
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed.csv", "whole.csv"]


def test_truncation_at_the_ends(tmp_path: Path) -> None:
    metrics = epoch_files.MetricsFile(tmp_path / "metrics.csv", FIELDS)
    metrics.truncate_after(2)
    assert not metrics.path.exists()
    metrics.path.write_text("anything else\n1\n")
    metrics.truncate_after(0)  # a new run begins the file anew, whatever was in it
    assert epoch_files.MetricsFile.read(metrics.path) == []
    metrics.append(row(0))
    assert epoch_files.MetricsFile.read(metrics.path) == [row(0)]


def test_metrics_of_other_columns(tmp_path: Path) -> None:
    metrics = epoch_files.MetricsFile(tmp_path / "metrics.csv", FIELDS)
    metrics.append(row(0))
    with pytest.raises(UserError, match="other columns"):
        epoch_files.MetricsFile(metrics.path, FIELDS[:-1]).truncate_after(1)
    assert epoch_files.MetricsFile.read(metrics.path) == [row(0)]


def test_records_are_read_back_and_cut(tmp_path: Path) -> None:
    """A line that a killed run left unfinished goes; the rest stays byte by byte."""
    records = epoch_files.RecordsFile(tmp_path / "new" / "quantizers.jsonl")
    records.truncate_after(3)
    assert not records.path.exists()
    written = [{"epoch": epoch, "quantizers": [{"range": 1 / epoch, "clipped": None}]} for epoch in (1, 2, 3)]
    for record in written:
        records.append(record)
    assert epoch_files.RecordsFile.read(records.path) == written
    before = records.path.read_bytes().splitlines(keepends=True)
    with records.path.open("a") as file:
        file.write('{"epoch": 4, "quant')
    assert epoch_files.RecordsFile.read(records.path) == written
    records.truncate_after(3)
    assert records.path.read_bytes() == b"".join(before[:2])
    records.truncate_after(0)
    assert records.path.read_bytes() == b""
    with pytest.raises(ValueError, match="JSON"):
        records.append({"epoch": 1, "loss": math.nan})
    assert records.path.read_bytes() == b""


@pytest.mark.parametrize("content", ["no JSON\n", "[1, 2]\n", "{}\n", '{"epoch": "one"}\n', "\x00\n"])
def test_files_that_are_no_records(tmp_path: Path, content: str) -> None:
    path = tmp_path / "quantizers.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="is damaged: its line"):
        epoch_files.RecordsFile.read(path)
    with pytest.raises(UserError, match="is damaged: its line"):
        epoch_files.RecordsFile(path).truncate_after(2)


@pytest.mark.parametrize("content", [b"epoch,lr\n0\n", b"epoch,lr\n0,fast\n", b"\x89PNG\r\n\x1a\n\x00\n"])
def test_files_that_are_no_metrics(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a metrics file"):
        epoch_files.MetricsFile.read(path)


def test_metrics_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.csv"):
        epoch_files.MetricsFile.read(tmp_path / "none.csv")
