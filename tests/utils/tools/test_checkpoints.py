"""The words of checkpoints: verbose, load, save, update, swap."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.utils.tools.commands import STATE, Call, lists
from utils.checkpoint import archive
from utils.errors import UserError
from utils.tools import name_lists


def equal(state: dict[str, Tensor], names: dict[str, str]) -> bool:
    """Whether `state` has exactly the entries of STATE, renamed by `names`, in order."""
    return list(state) == [names.get(name, name) for name in STATE] and all(
        torch.equal(state[names.get(name, name)], value) and state[names.get(name, name)].dtype == value.dtype
        for name, value in STATE.items()
    )


# --- verbose, load, save ---------------------------------------------------------------------


def test_verbose_lists_names_and_shapes(call: Call, old: Path) -> None:
    """By default nothing more, and the keys of the file."""
    status, out, _ = call("--keyword", "verbose", "--old", old)
    assert status == 0
    assert out.splitlines() == [
        "keys: epoch=12, best_acc=91.25, state_dict, optimizer; weights under state_dict",
        "conv1.weight             [2, 4]",
        "conv1.clip_val           [1]",
        "bn1.num_batches_tracked  []",
        "fc.bias                  [2]",
        "4 of 4 entries",
    ]


@pytest.mark.parametrize("option", ["--verbose_list", "--verbose-list"])
def test_verbose_all_lists_types_and_small_values(call: Call, old: Path, option: str) -> None:
    """Integers exactly; tensors of more than four elements without values."""
    status, out, _ = call("--keyword", "verbose", "--old", old, option, "all")
    assert status == 0
    assert out.splitlines()[1:] == [
        "conv1.weight             [2, 4]  float32",
        "conv1.clip_val           [1]     float32  1.5",
        "bn1.num_batches_tracked  []      int64    1234567890",
        "fc.bias                  [2]     float64  0.1 -2",
        "4 of 4 entries",
    ]


def test_verbose_filters_by_endings(call: Call, old: Path) -> None:
    """Several endings; spaces do not matter."""
    status, out, _ = call("--keyword", "verbose", "--old", old, "--verbose_list", "clip_val, bias")
    assert status == 0
    assert out.splitlines()[1:] == [
        "conv1.clip_val  [1]  float32  1.5",
        "fc.bias         [2]  float64  0.1 -2",
        "2 of 4 entries",
    ]


def test_an_ending_that_nothing_has(call: Call, old: Path) -> None:
    """A misspelt ending is no empty list."""
    status, _, err = call("--keyword", "verbose", "--old", old, "--verbose_list", "bias,clip_vall")
    assert (status, err.count("\n")) == (2, 1)
    assert "--verbose_list clip_vall: no name ends so; did you mean clip_val?" in err


@pytest.mark.parametrize(
    ("payload", "form"),
    [
        ({f"module.{name}": value for name, value in STATE.items()}, "bare"),
        ({"model": STATE}, "under model"),
    ],
)
def test_load_accepts_every_form(call: Call, tmp_path: Path, payload: dict[str, object], form: str) -> None:
    """Bare with a prefix, or under model; nothing is written."""
    path = tmp_path / "a.pth"
    torch.save(payload, path)
    status, out, _ = call("--keyword", "load", "--old", path)
    assert status == 0
    assert out == f"{path}: loads as a network's weights, {form}\n4 entries, 12 elements\n"
    assert os.listdir(tmp_path) == ["a.pth"]


def test_load_says_what_does_not_load(call: Call, tmp_path: Path) -> None:
    """A checkpoint without weights."""
    path = tmp_path / "a.pth"
    torch.save({"epoch": 3, "net": [1]}, path)
    status, _, err = call("--keyword", "load", "--old", path)
    assert status == 2
    assert f"{path} has no state_dict and no model, and is none itself; its keys: epoch, net" in err


@pytest.mark.parametrize("raw", [False, True])
def test_save_keeps_the_weights_alone(call: Call, old: Path, tmp_path: Path, raw: bool) -> None:
    """Wrapped, or with raw bare."""
    new = tmp_path / "new.pth"
    status, out, _ = call("--keyword", "save, raw" if raw else "save", "--old", old, "--new", new)
    assert (status, out) == (0, f"{new}: 4 entries, {'bare' if raw else 'under state_dict'}\n")
    payload = archive.read(new)
    if not raw:
        assert list(payload) == ["state_dict"]
    assert equal(payload if raw else payload["state_dict"], {})


# --- update, swap ----------------------------------------------------------------------------


RENAMED = {"conv1.weight": "stem.conv.weight", "conv1.clip_val": "stem.conv.alpha", "fc.bias": "head.bias"}
MF = "# the stem\nconv1.{weight, clip_val}\n\nfc.bias  # and the head\n"
MT = "stem.conv.{weight,alpha}\nhead.bias\n"


@pytest.mark.parametrize("raw", [False, True])
def test_update_renames_and_keeps_the_rest(call: Call, old: Path, tmp_path: Path, raw: bool) -> None:
    """Values, order, unlisted names; epoch and optimizer unless raw."""
    mf, mt = lists(tmp_path, MF, MT)
    new = tmp_path / "new.pth"
    keyword = "update,raw" if raw else "update"
    status, _, _ = call("--keyword", keyword, "--mf", mf, "--mt", mt, "--old", old, "--new", new)
    assert status == 0
    payload = archive.read(new)
    if not raw:
        assert set(payload) == {"epoch", "best_acc", "optimizer", "state_dict"}
        assert payload["epoch"] == 12
        assert payload["optimizer"]["state"][0].tolist() == [1, 1]
    assert equal(payload if raw else payload["state_dict"], RENAMED)


@pytest.mark.parametrize("payload", [STATE, {"model": STATE}, {f"module.{n}": v for n, v in STATE.items()}])
def test_update_wraps_under_state_dict(call: Call, tmp_path: Path, payload: dict[str, object]) -> None:
    """Whatever form the old file has, the new one has the program's own."""
    mf, mt = lists(tmp_path, MF, MT)
    torch.save(payload, tmp_path / "old.pth")
    files = ("--old", tmp_path / "old.pth", "--new", tmp_path / "new.pth")
    assert call("--keyword", "update", "--mf", mf, "--mt", mt, *files)[0] == 0
    new = archive.read(tmp_path / "new.pth")
    assert list(new) == ["state_dict"]
    assert equal(new["state_dict"], RENAMED)


def test_swap_undoes_update(call: Call, old: Path, tmp_path: Path) -> None:
    """The same two lists the other way round."""
    mf, mt = lists(tmp_path, MF, MT)
    new, back = tmp_path / "new.pth", tmp_path / "back.pth"
    assert call("--keyword", "update", "--mf", mf, "--mt", mt, "--old", old, "--new", new)[0] == 0
    assert call("--keyword", "swap", "--mf", mf, "--mt", mt, "--old", new, "--new", back)[0] == 0
    payload = archive.read(back)
    assert equal(payload["state_dict"], {}) and payload["epoch"] == 12


def test_names_may_trade_places() -> None:
    """All names change at once."""
    a, b = torch.zeros(1), torch.ones(1)
    renamed = name_lists.rename({"a": a, "b": b}, [("a", "b"), ("b", "a")], "x.pth")
    assert list(renamed) == ["b", "a"] and renamed["b"] is a and renamed["a"] is b


@pytest.mark.parametrize(
    ("mf", "mt", "text"),
    [
        ("conv1.weight\nfc.bias\n", "a\n", "mf has 2 lines of names, DIR/mt 1; they pair line by line"),
        ("# x\nconv1.{weight,clip_val}\n", "\n\na.{b,c,d}", "mf, line 2 has 2 names, DIR/mt, line 3 has 3;"),
        ("conv1.{weight,clip_val}\n", "a\nb\n", "mf has 1 lines of names, DIR/mt 2"),
        ("conv1.weigth\n", "a\n", "'conv1.weigth' is not in DIR/old.pth.tar; did you mean conv1.weight?"),
        ("conv1.weight\n", "fc.bias\n", "both 'conv1.weight' and 'fc.bias' would be named 'fc.bias'"),
        ("conv1.weight\nfc.bias\n", "a\na\n", "mt: 'a' is listed twice"),
        ("fc.bias\nfc.bias\n", "a\nb\n", "mf: 'fc.bias' is listed twice"),
        ("conv1.{weight\n", "a\n", "mf, line 1: a brace without its partner"),
        ("conv1.{a,{b,c}}\n", "a\n", "mf, line 1: a brace without its partner, or one inside another"),
        ("# nothing\n", "\n", "mf: no names"),
    ],
)
def test_mapping_mistakes(call: Call, old: Path, tmp_path: Path, mf: str, mt: str, text: str) -> None:
    """One line that says where; nothing is written."""
    mf_path, mt_path = lists(tmp_path, mf, mt)
    files = ("--old", old, "--new", tmp_path / "new.pth")
    status, out, err = call("--keyword", "update", "--mf", mf_path, "--mt", mt_path, *files)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert text.replace("DIR", str(tmp_path)) in err
    assert not (tmp_path / "new.pth").exists()


@pytest.mark.parametrize(
    ("content", "text"), [(None, "cannot be read (No such file"), (b"\xff\xfe\x00", "not a text file")]
)
def test_mapping_files_that_cannot_be_read(tmp_path: Path, content: bytes | None, text: str) -> None:
    """Missing or binary."""
    if content is not None:
        (tmp_path / "mf").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(text)):
        name_lists.read_names(tmp_path / "mf")


@pytest.mark.parametrize("word", ["save", "update", "swap"])
def test_an_existing_file_needs_force(call: Call, old: Path, tmp_path: Path, word: str) -> None:
    """Also when it is the old file itself, and before anything else is looked at."""
    mf, mt = lists(tmp_path, "fc.bias", "fc.bias")
    mapping = () if word == "save" else ("--mf", mf, "--mt", mt)
    before = old.read_bytes()
    status, _, err = call("--keyword", word, "--old", old, "--new", old, *mapping)
    assert (status, err) == (2, f"tools.py: error: {old} exists; --force writes over it\n")
    assert old.read_bytes() == before
    assert call("--keyword", word, "--old", old, "--new", old, *mapping, "--force")[0] == 0
    assert equal(archive.read(old)["state_dict"], {})


def test_a_failed_write_is_one_line(call: Call, old: Path, tmp_path: Path) -> None:
    """A folder that is a file."""
    (tmp_path / "file").write_text("x")
    status, _, err = call("--keyword", "save", "--old", old, "--new", tmp_path / "file" / "new.pth")
    assert (status, err.count("\n")) == (2, 1)
    assert "cannot be written" in err
