"""The word compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.utils.tools.commands import Call


def finished(folder: Path, case: str, **changes: object) -> Path:
    """The summary that a finished run leaves in a folder of its own."""
    run = {
        "case": case, "network": "resnet20", "bits": "32/32", "last_top1": 99.5, "weight_bytes": 4096,
        "float_weight_bytes": 4096, "audit": "full precision, nothing to audit",
    }  # fmt: skip
    (folder / case).mkdir(parents=True)
    (folder / case / "summary.json").write_text(json.dumps(run | changes))
    return folder / case


def test_compare(call: Call, tmp_path: Path) -> None:
    """One row a run, the gap and the size against the first and float32, the files that are there."""
    first = finished(tmp_path, "full")
    (first / "curves.png").write_bytes(b"")
    low = {"bits": "2/2", "last_top1": 99.25, "weight_bytes": 256, "audit": "passed: 40 quantizers"}
    second = finished(tmp_path, "low", **low)
    unknown = finished(tmp_path, "blind", last_top1=None)
    status, out, err = call("--keyword", "compare", str(first), str(second), str(unknown))
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[2][:7] == ["full", "resnet20", "32/32", "99.50", "4.0", "4.0", "1.0x"]
    assert rows[3][:9] == ["low", "resnet20", "2/2", "99.25", "-0.25", "0.2", "4.0", "16.0x", "passed:"]
    assert rows[4][3] == "-"
    assert str(first / "curves.png") in out and str(second / "curves.png") not in out


@pytest.mark.parametrize("content", [None, "{", "[]", '{"case": "x"}'])
def test_compare_refuses_what_is_no_finished_run(call: Call, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    status, _, err = call("--keyword", "compare", str(tmp_path))
    assert status == 2
    assert "summary.json" in err and err.count("\n") == 1
