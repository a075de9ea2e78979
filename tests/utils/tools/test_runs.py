"""The word compare."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import pytest
import yaml

from tests.utils.tools.commands import Call
from utils.report import run_files
from utils.tools import comparison


def finished(folder: Path, case: str, *, seed: int = 0, lr: float = 0.1, **changes: object) -> Path:
    """The configuration and the summary that a finished run leaves in a folder of its own."""
    run = {
        "case": case, "network": "resnet20", "dataset": "digits", "bits": "32/32", "epochs": 2, "best_top1": 99.75,
        "last_top1": 99.5, "weight_bytes": 4096, "float_weight_bytes": 4096, "macs": 10, "bit_operations": 10240,
        "audit": "full precision, nothing to audit",
    }  # fmt: skip
    config = {
        "optim": {"lr": lr}, "data": {"seed": seed}, "schedule": {"epochs": 2, "extra_epoch": 0},
        "run": {"case": case, "seed": seed, "pretrained": None},
    }  # fmt: skip
    (folder / case).mkdir(parents=True)
    (folder / case / "summary.json").write_text(json.dumps(run | changes))
    (folder / case / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / case


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    """One run in full precision, three seeds of a 2-bit one at another rate."""
    low = {"bits": "2/2", "weight_bytes": 256, "audit": "passed: 40 quantizers"}
    top1 = {1: 99.25, 2: 98.5, 3: 99.0}
    return [
        finished(tmp_path, "full"),
        *(finished(tmp_path, f"low-{n}", seed=n, lr=0.02, last_top1=top, **low) for n, top in top1.items()),
    ]


def test_compare(call: Call, tmp_path: Path) -> None:
    """One row a run, rate and seed, the gap and the size against the first and float32, the files that are there."""
    first = finished(tmp_path, "full", seed=4)
    (first / "curves.png").write_bytes(b"")
    low = {"bits": "2/2", "last_top1": 99.25, "weight_bytes": 256, "audit": "passed: 40 quantizers"}
    second = finished(tmp_path, "low", lr=0.02, **low)
    unknown = finished(tmp_path, "blind", lr=0.3, last_top1=None)
    status, out, err = call("--keyword", "compare", str(first), str(second), str(unknown))
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[2][:9] == ["full", "resnet20", "32/32", "0.1", "4", "99.50", "4.0", "4.0", "1.0x"]
    assert rows[3][:8] == ["low", "resnet20", "2/2", "0.02", "0", "99.25", "-0.25", "0.2"]
    assert rows[3][9:11] == ["16.0x", "passed:"]
    assert rows[4][5] == "-"
    assert str(first / "curves.png") in out and str(second / "curves.png") not in out
    assert "optim.lr" in out and "run.seed" not in out


@pytest.mark.parametrize("size", [{"weight_bytes": 0, "float_weight_bytes": 0}, {"weight_bytes": 0}])
def test_weights_without_a_size(call: Call, tmp_path: Path, size: dict[str, int]) -> None:
    status, out, err = call("--keyword", "compare", finished(tmp_path, "none", **size))
    assert (status, err) == (0, "")
    row = out.splitlines()[2].split()
    assert row[6] == "0.0" and row[8] == "-"


def test_a_seed_without_accuracy_is_not_in_the_mean(call: Call, tmp_path: Path) -> None:
    """The row says of how many runs the mean is; other warnings make no other row."""
    folders = [finished(tmp_path, f"run-{n}", seed=n, last_top1=top) for n, top in enumerate((99.25, None))]
    config = yaml.safe_load((folders[1] / "config.yaml").read_text())
    (folders[1] / "config.yaml").write_text(yaml.safe_dump(config | {"warnings": ["--root has no effect"]}))
    status, out, _ = call("--keyword", "compare", *folders)
    assert status == 0
    assert out.splitlines()[2].split()[:9] == [
        "run-*", "resnet20", "32/32", "0.1", "0", "1", "99.25", "(1", "of",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["weight_bytes", "last_top1"])
def test_true_is_no_number(call: Call, tmp_path: Path, name: str) -> None:
    status, _, err = call("--keyword", "compare", finished(tmp_path, "run", **{name: True}))
    assert status == 2 and f"{name} is missing or not what it should be" in err


def test_seeds_are_one_row(call: Call, seeds: list[Path]) -> None:
    """With their mean, the lowest and the highest; what the groups differ in is listed."""
    status, out, _ = call("--keyword", "compare", *seeds)
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[3][:12] == [
        "low-*", "resnet20", "2/2", "0.02", "1", "2", "3", "98.92", "98.50", "-", "99.25", "-0.58",
    ]  # fmt: skip
    assert [line for line in lines if line[:1] == ["optim.lr"] or line[:1] == ["0.02"]] == [
        ["optim.lr", "0.1", "full"],
        ["0.02", "low-*"],
    ]


def test_what_is_no_new_sample_is_no_seed_of_a_group(tmp_path: Path) -> None:
    """The same seed twice would narrow the spread; another rate is another experiment."""
    paths = [
        finished(tmp_path, "a-1", seed=1), finished(tmp_path, "a-2", seed=2), finished(tmp_path, "again", seed=1),
        finished(tmp_path, "a-3", seed=3, lr=0.5),
    ]  # fmt: skip
    rows = comparison.grouped(run_files.read(paths))
    assert [(row["name"], row["seeds"]) for row in rows] == [
        ("a-1, a-2", [1, 2]),
        ("again", [1]),
        ("a-3", [3]),
    ]
    assert [row["std"] for row in rows] == [0.0, None, None]


@pytest.mark.parametrize("name", ["rows.json", "rows.csv"])
def test_compare_writes_files(call: Call, seeds: list[Path], tmp_path: Path, name: str) -> None:
    """A row each as on the screen, with the figures of every seed and the fields that differ."""
    path = tmp_path / name
    assert call("--keyword", "compare", *seeds, "--output", path)[0] == 0
    low = [99.25, 98.5, 99.0]
    if name.endswith("json"):
        full, row = json.loads(path.read_text())
        assert (row["seeds"], row["top1"]) == ([1, 2, 3], low)
        assert row["runs"] == [str(seed) for seed in seeds[1:]]
        assert (full["differs"], row["differs"]) == ({"optim.lr": "0.1"}, {"optim.lr": "0.02"})
    else:
        with path.open(newline="") as file:
            _, row = csv.DictReader(file)
        assert (row["seeds"], row["top1"], row["optim.lr"]) == ("1 2 3", "99.25 98.5 99.0", "0.02")
    expected = (statistics.mean(low), statistics.stdev(low), 98.5, 99.25, statistics.mean(low) - 99.5, 16.0)
    names = ("mean", "std", "lowest", "highest", "gap", "smaller")
    assert [float(row[each]) for each in names] == pytest.approx(expected)
    assert call("--keyword", "compare", *seeds, "--output", path)[0] == 2  # it exists


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows.txt", "end the file's name in .csv or .json"),
        ("nowhere/rows.csv", "name a file in a folder that exists"),
    ],
)
def test_compare_refuses_other_files(
    call: Call, seeds: list[Path], tmp_path: Path, name: str, message: str
) -> None:
    status, out, err = call("--keyword", "compare", *seeds, "--output", tmp_path / name)
    assert (status, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_what_is_no_finished_training_is_left_out(call: Call, seeds: list[Path], tmp_path: Path) -> None:
    """An evaluation leaves a folder with a log alone; a page may lie beside the runs; others are still trained."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "log.txt").write_text("top-1 99.50\n")
    (tmp_path / "report.html").write_text("<!doctype html>")
    unfinished = finished(tmp_path, "unfinished")
    (unfinished / "summary.json").unlink()
    resumed = finished(tmp_path, "resumed")
    (resumed / "metrics.csv").write_text("epoch,lr\n1,0.1\n")  # the summary is of an earlier end
    status, out, err = call("--keyword", "compare", *sorted(tmp_path.iterdir()))
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["full", "low-*"]
    assert err.splitlines() == [
        f"left out, nothing was trained there: {tmp_path / 'eval'}, {tmp_path / 'report.html'}",
        f"left out, not finished: {resumed} (1 of 2 epochs)",
        f"left out, not finished: {unfinished} (0 of 2 epochs)",
    ]
    status, out, err = call("--keyword", "compare", unfinished)
    assert (status, out) == (2, "") and "is not finished; compare needs finished runs" in err


def test_where_tensorboard_looks(
    call: Call, seeds: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for runs in the current folder, and for a relative and an absolute path."""
    (seeds[0] / "tensorboard").mkdir()
    monkeypatch.chdir(tmp_path)
    for second, folder in (("low-1", "."), (seeds[1], tmp_path)):
        status, out, _ = call("--keyword", "compare", "full", second)
        assert status == 0 and out.endswith(f"tensorboard --logdir {folder}\n")


@pytest.mark.parametrize(
    "content",
    [None, "{", "[]", '{"case": "x"}', "[" * 100_000, b"\xff"],
    ids=["missing", "cut", "list", "part", "deep", "bytes"],
)
def test_compare_refuses_what_is_no_summary(call: Call, tmp_path: Path, content: str | bytes | None) -> None:
    path = finished(tmp_path, "run")
    if content is None:
        (path / "config.yaml").unlink()
    else:
        data = content.encode() if isinstance(content, str) else content
        (path / "summary.json").write_bytes(data)
    status, out, err = call("--keyword", "compare", path)
    assert (status, out) == (2, "")
    assert ("config.yaml" if content is None else "summary.json") in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "size", [None, "4096", 4096.5, float("nan"), 10**400], ids=["none", "text", "float", "nan", "huge"]
)
def test_compare_refuses_a_size_that_is_no_number(call: Call, tmp_path: Path, size: object) -> None:
    status, out, err = call("--keyword", "compare", finished(tmp_path, "run", weight_bytes=size))
    assert (status, out) == (2, "")
    assert "summary.json is damaged: weight_bytes is missing or not what it should be" in err


def test_a_folder_that_does_not_exist(call: Call, seeds: list[Path], tmp_path: Path) -> None:
    """It is a mistake, not left out."""
    status, out, err = call("--keyword", "compare", *seeds, tmp_path / "lwo")
    assert (status, out) == (2, "")
    assert "lwo/config.yaml: No such file or directory; name the folders of runs" in err
