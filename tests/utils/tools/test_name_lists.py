"""Lists of names: braces in them, and the word sort."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.utils.tools.commands import Call, lists
from utils.tools import name_lists


@pytest.mark.parametrize(
    ("line", "expanded"),
    [
        ("a.weight", ["a.weight"]),
        ("a.{x,y}", ["a.x", "a.y"]),
        ("{a,b}.w", ["a.w", "b.w"]),
        ("l{1,2}.{x, y}.w", ["l1.x.w", "l1.y.w", "l2.x.w", "l2.y.w"]),
        ("a{,.b}.w", ["a.w", "a.b.w"]),
        ("  a.w  # why", ["a.w"]),
    ],
)
def test_brace_lists_expand_in_order(tmp_path: Path, line: str, expanded: list[str]) -> None:
    """As a shell does it."""
    (tmp_path / "mf").write_text(f"\n# {{ ignored\n{line}\n")
    assert name_lists.read_names(tmp_path / "mf") == [(3, expanded)]


def test_sort_keeps_pairs_together(call: Call, tmp_path: Path) -> None:
    """Numbers count as numbers; braces are written out."""
    mf, mt = lists(tmp_path, "layer10.w\nlayer2.{w,b}\n# end\nbn.w\nlayer2.0.w\n", "a\nb.{1,2}\nc\nd\n")
    status, out, _ = call("--keyword", "sort", "--mf", mf, "--mt", mt)
    assert status == 0
    assert (tmp_path / "mf.sorted").read_text() == "bn.w\nlayer2.0.w\nlayer2.b\nlayer2.w\nlayer10.w\n"
    assert (tmp_path / "mt.sorted").read_text() == "c\nd\nb.2\nb.1\na\n"
    assert out == f"{mf}.sorted: 5 names\n{mt}.sorted: 5 names\n"
    pairs = set(name_lists.read_pairs(mf, mt))
    assert set(name_lists.read_pairs(tmp_path / "mf.sorted", tmp_path / "mt.sorted")) == pairs


def test_sort_writes_where_it_is_told(call: Call, tmp_path: Path) -> None:
    """Onto the lists themselves only with --force; never both to one file."""
    mf, mt = lists(tmp_path, "b\na\n", "1\n2\n")
    base = ("--keyword", "sort", "--mf", mf, "--mt", mt)
    status, _, err = call(*base, "--new_mf", tmp_path / "x", "--new-mt", mt)
    assert (status, err) == (2, f"tools.py: error: {mt} exists; --force writes over it\n")
    assert not (tmp_path / "x").exists()
    assert call(*base, "--new_mf", tmp_path / "x", "--new_mt", tmp_path / "x")[0] == 2
    assert call(*base, "--new_mf", mf, "--new_mt", mt, "--force")[0] == 0
    assert (mf.read_text(), mt.read_text()) == ("a\nb\n", "2\n1\n")
