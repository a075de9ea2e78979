"""Log, meters, metrics file, TensorBoard, progress and curves."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch.utils._python_dispatch import TorchDispatchMode

from utils.data.image_folder import Unreadable
from utils.errors import UserError
from utils.report import epoch_files, log
from utils.report.curves import draw_curves
from utils.step import meters

FIELDS = (
    *("epoch", "lr", "train_loss", "train_top1", "train_top5"),
    *("val_loss", "val_top1", "val_top5", "seconds", "images_per_second"),
)


@pytest.fixture(autouse=True)
def closed_log() -> Iterator[None]:
    yield
    log.close()


def test_console_is_plain_and_file_has_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "run.log"
    logger = log.setup(path, verbose=False)
    logger.info("loss %.2f", 1.5)
    logger.debug("unseen")
    logger.warning("careful")
    assert capsys.readouterr().out == "loss 1.50\ncareful\n"
    first, second = path.read_text().splitlines()  # before any close: every line is flushed
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO loss 1\.50", first)
    assert second.endswith(" WARNING careful")


def test_names_that_are_not_utf8_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(tmp_path / "run.log", verbose=False).info("cannot read %s", os.fsdecode(b"\xff.jpg"))
    assert capsys.readouterr() == ("cannot read \\udcff.jpg\n", "")
    assert (tmp_path / "run.log").read_text().endswith("INFO cannot read \\udcff.jpg\n")


def test_verbose_shows_debug(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(None, verbose=True).debug("detail")
    assert capsys.readouterr().out == "detail\n"


def test_another_process_says_only_what_it_alone_knows(capsys: pytest.CaptureFixture[str]) -> None:
    """As the images that it leaves out."""
    logger = log.silent(3)
    logger.error("what the first process says")
    Unreadable(limit=2).add("x.jpg", "no image")
    assert capsys.readouterr() == (
        "process 3: left out an image that cannot be read, 1 of 2: x.jpg (no image)\n", ""
    )  # fmt: skip


def test_a_second_setup_replaces_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(tmp_path / "a.log", verbose=False).info("one")
    logger = log.setup(tmp_path / "b.log", verbose=False)
    logger.info("two")
    assert logger is logging.getLogger("train")
    assert capsys.readouterr().out == "one\ntwo\n"
    assert [len((tmp_path / name).read_text().splitlines()) for name in ("a.log", "b.log")] == [1, 1]
    log.close()
    assert logger.handlers == []
    log.setup(tmp_path / "b.log", verbose=False).info("three")  # a resumed run goes on in its file
    assert len((tmp_path / "b.log").read_text().splitlines()) == 2


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "run.log", tmp_path):
        with pytest.raises(UserError, match=r"cannot write the log .*--log_dir"):
            log.setup(path, verbose=False)
    assert logging.getLogger("train").handlers == []


def batch(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of 7 classes and the right ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 7, generator=generator), torch.randint(7, (count,), generator=generator)


def test_totals_are_those_of_all_images() -> None:
    """Batches of any size, summed in parts, give what one pass of NumPy gives."""
    totals = meters.Totals()
    assert all(math.isnan(value) for value in meters.Totals.means(totals.sums).values())
    outputs, targets, losses = [], [], []
    for seed, count in enumerate((3, 1, 8)):
        output, target = batch(seed, count)
        loss = torch.nn.functional.cross_entropy(output, target, reduction="none")
        if seed == 2:  # go on from the sums so far, as a resumed run does
            totals = meters.Totals(start=totals.values)
        totals.update(loss.mean().requires_grad_(), output, target)
        outputs.append(output), targets.append(target), losses.append(loss)
    assert not totals.sums.requires_grad
    ranks = np.argsort(-torch.cat(outputs).numpy(), axis=1) == torch.cat(targets).numpy()[:, None]
    means = meters.Totals.means(totals.sums)
    assert means["loss"] == pytest.approx(np.mean(torch.cat(losses).double().numpy()), rel=1e-6)
    assert means["top1"] == 100 * ranks[:, 0].sum() / 12 and means["top5"] == 100 * ranks[:, :5].sum() / 12


def test_totals_do_not_lose_small_parts() -> None:
    """In float32 the sum would stop growing at 2^24; half precision would overflow."""
    output, target = batch(0, 1)
    totals = meters.Totals(start=(2.0**24, 0, 0, 2.0**24))
    totals.update(torch.tensor(3.0), output, target)
    assert meters.Totals.means(totals.sums)["loss"] == (2**24 + 3) / (2**24 + 1)
    output, target = batch(0, 256)
    half = meters.Totals()
    for _ in range(3):
        half.update(torch.tensor(60000.0, dtype=torch.float16), output, target)
    assert meters.Totals.means(half.sums)["loss"] == torch.tensor(60000.0, dtype=torch.float16).item()


class _Reads(TorchDispatchMode):
    """Count the calls that bring a number to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_totals_read_tensors_only_for_their_values() -> None:
    totals = meters.Totals()
    output, target = batch(0, 8)
    with _Reads() as reads:
        for _ in range(3):
            totals.update(torch.tensor(2.0), output, target)
        assert reads.count == 0
        assert meters.Totals.means(totals.sums)["loss"] == 2.0


def test_top_k_takes_the_largest_share_of_mixed_classes() -> None:
    output = torch.tensor([[1.0, 2, 3], [3, 2, 1]])
    shares = torch.tensor([[0.3, 0.1, 0.6], [0.0, 0.9, 0.1]])
    assert [count.item() for count in meters.top_k(output, shares, (1, 2))] == [1, 2]


def test_waiting_counts_the_time_before_items_and_not_after_them() -> None:
    clock = [0.0]

    def items() -> Iterator[int]:
        for item in range(3):
            clock[0] += 2
            yield item

    waiting = meters.Waiting(items(), clock=lambda: clock[0])
    for _ in waiting:
        clock[0] += 10
    assert waiting.seconds == 6


def test_top_k_by_hand() -> None:
    output = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.3, 0.1, 0.6]])
    target = torch.tensor([1, 1, 0, 0])
    counts = meters.top_k(output, target, (1, 2, 3, 5))
    assert [int(count) for count in counts] == [1, 3, 4, 4]
    assert all(count.shape == () and count.dtype == torch.int64 for count in counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_top_k_against_numpy(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    scores = np.stack([rng.permutation(12) for _ in range(64)])  # no ties, exact in every type
    target = rng.integers(0, 12, 64)
    rank = (scores > scores[np.arange(64), target][:, None]).sum(1)
    counts = meters.top_k(torch.tensor(scores, dtype=dtype), torch.tensor(target))
    assert [int(count) for count in counts] == [(rank < 1).sum(), (rank < 5).sum()]


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
