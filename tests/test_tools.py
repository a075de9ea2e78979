"""tools.py: every word, in process for speed and as a real command for exit statuses and streams."""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tools
from tests.test_checkpoint import Malicious
from tests.test_interrupt import job_is_gone, processes, started_by
from utils.checkpoint import archive
from utils.data.fake import photograph
from utils.errors import UserError
from utils.tools import image_findings, name_lists

ROOT = Path(__file__).resolve().parent.parent

STATE = {
    "conv1.weight": torch.arange(8.0).reshape(2, 4),
    "conv1.clip_val": torch.tensor([1.5]),
    "bn1.num_batches_tracked": torch.tensor(1234567890),
    "fc.bias": torch.tensor([0.1, -2.0], dtype=torch.float64),
}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`python tools.py ...` in a process of its own."""
    command = [sys.executable, "tools.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The same without the process: exit status, standard output, standard error."""

    def run_inside(*arguments: str | Path) -> tuple[int, str, str]:
        status = tools.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_inside


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A checkpoint of a run."""
    path = tmp_path / "old.pth.tar"
    optimizer = {"state": {0: torch.ones(2)}, "param_groups": []}
    archive.save(path, {"epoch": 12, "best_acc": 91.25, "state_dict": STATE, "optimizer": optimizer})
    return path


def lists(folder: Path, mf: str, mt: str) -> tuple[Path, Path]:
    """Two mapping files."""
    (folder / "mf").write_text(mf)
    (folder / "mt").write_text(mt)
    return folder / "mf", folder / "mt"


def equal(state: dict[str, Tensor], names: dict[str, str]) -> bool:
    """Whether `state` has exactly the entries of STATE, renamed by `names`, in order."""
    return list(state) == [names.get(name, name) for name in STATE] and all(
        torch.equal(state[names.get(name, name)], value) and state[names.get(name, name)].dtype == value.dtype
        for name, value in STATE.items()
    )


# --- the command line ------------------------------------------------------------------------


def test_help_lists_every_word_without_loading_torch() -> None:
    """The heavy packages are imported after the command line is understood."""
    command = [sys.executable, "-X", "importtime", "tools.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for word in tools.WORDS:
        assert re.search(rf"^  {word} ", done.stdout, re.MULTILINE)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "PIL", "tqdm"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--keyword"),
        (["--keyword", ""], "0 words are given; write one of compare, report, verbose, load"),
        (["--keyword", "raw"], "0 words are given"),
        (["--keyword", "verbos", "--old", "x"], "did you mean verbose?"),
        (["--keyword", "verify_image", "--root", "x"], "did you mean verify-image"),
        (
            ["--keyword", "qqq"],
            "no such word of compare, report, verbose, load, save, update, swap, sort, verify-image, verify-data, ",
        ),
        (["--keyword", "load,save", "--old", "x"], "2 words are given"),
        (["--keyword", "update,row"], "--keyword row: no such word"),
        (["--keyword", "verbose"], "the word verbose needs --old"),
        (["--keyword", "verbose,raw", "--old", "x"], "raw means nothing to the word verbose"),
        (["--keyword", "load", "--old", "x", "--new", "y"], "--new means nothing to the word load"),
        (["--keyword", "load", "--old", "x", "--force"], "--force means nothing to the word load"),
        (["--keyword", "load", "--older", "x"], "unrecognized arguments: --older"),
        (["--keyword", "verify-image", "--root", "x", "-j", "0"], "'0' is not a number of 1 or more"),
        (["--keyword", "load", "--old", "missing.pth"], "missing.pth: cannot be read (No such file"),
    ],
)
def test_mistakes(call: Call, arguments: list[str], text: str) -> None:
    """Status 2 and one line on standard error."""
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("tools.py: error: ") and text in err
    assert err.count("\n") == 1


def test_real_commands_end_with_their_status(tmp_path: Path, old: Path) -> None:
    """A mistake, a damaged file and a success."""
    mistake = run("--keyword", "lod", "--old", old)
    assert (mistake.returncode, mistake.stdout) == (2, "")
    assert mistake.stderr.startswith("tools.py: error: --keyword lod: no such word of ")
    assert mistake.stderr.endswith("; did you mean load?\n")

    cut = tmp_path / "cut.pth.tar"
    cut.write_bytes(old.read_bytes()[:700])
    damaged = run("--keyword", "load", "--old", cut)
    assert (damaged.returncode, damaged.stdout) == (2, "")
    assert damaged.stderr.startswith(f"tools.py: error: {cut}: damaged, cut short")
    assert damaged.stderr.count("\n") == 1

    done = run("--keyword", " load ", "--old", old)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{old}: loads as a network's weights, under state_dict\n4 entries, 12 elements\n"


def test_a_file_with_code_is_refused(call: Call, tmp_path: Path) -> None:
    """Status 2 and the name of what is in it."""
    path = tmp_path / "code.pth.tar"
    torch.save({"state_dict": STATE, "x": Path("x")}, path)
    status, out, err = call("--keyword", "verbose", "--old", path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"tools.py: error: {path}: refused, because it holds pathlib.")


READS = sorted(name for name, word in tools.WORDS.items() if "old" in word.needs)


@pytest.mark.parametrize("word", READS)
def test_code_in_a_checkpoint_is_refused_and_not_run(call: Call, tmp_path: Path, word: str) -> None:
    """By every word that reads one, with all else that it asks for; nothing is written."""
    path, trace, new = tmp_path / "code.pth.tar", tmp_path / "trace", tmp_path / "new.pth.tar"
    torch.save({"state_dict": STATE, "x": Malicious(f"touch {trace}")}, path)
    mf, mt = lists(tmp_path, "fc.bias\n", "head.bias\n")
    given = {"old": path, "new": new, "mf": mf, "mt": mt}
    arguments = [part for name in tools.WORDS[word].needs for part in (f"--{name}", given[name])]
    status, out, err = call("--keyword", word, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"{path}: refused, because it holds " in err
    assert not trace.exists() and not new.exists()
    torch.load(path, weights_only=False)  # it would have
    assert trace.exists()


def test_words_that_read_checkpoints() -> None:
    assert {"load", "save", "swap", "update", "verbose"} <= set(READS)


def test_names_show_no_control_characters(call: Call, tmp_path: Path) -> None:
    """They could move the cursor, or look like lines of their own."""
    path = tmp_path / "odd.pth.tar"
    archive.save(path, {"a\x1b[2J\nb": torch.ones(1), "../../x": torch.ones(2), "\u00e9": torch.ones(1)})
    for options in ((), ("--verbose_list", "all")):
        status, out, _ = call("--keyword", "verbose", "--old", path, *options)
        assert status == 0 and "\x1b" not in out
        assert [line.split()[0] for line in out.splitlines()[1:-1]] == [r"a\x1b[2J\nb", "../../x", "\u00e9"]
    archive.save(path, {"state_dict": {"w": torch.ones(1)}, "k\x1b[2J": 3})
    assert (
        r"keys: state_dict, k\x1b[2J=3; weights under state_dict"
        in call("--keyword", "verbose", "--old", path)[1]
    )


def test_a_reader_that_stops_early(tmp_path: Path) -> None:
    """`tools.py ... | head`: no traceback."""
    path = tmp_path / "long.pth"
    torch.save({f"layer{i}.{'x' * 50}": torch.zeros(1) for i in range(2000)}, path)
    command = f"{sys.executable} tools.py --keyword verbose --old {path} | head -n 2"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.count("\n") == 2
    assert done.stderr == ""


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


# --- sort ------------------------------------------------------------------------------------


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


# --- verify-image ----------------------------------------------------------------------------


def images(folder: Path) -> None:
    """Nine good images of several formats and modes, and a file that is none."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(20, 30, 3), dtype=np.uint8)
    names = ["RGB.jpg", "L.JPEG", "CMYK.jpg", "RGBA.png", "P.png", "1.png", "RGB.bmp", "RGB.webp", "L.tiff"]
    for number, name in enumerate(names):
        mode, ending = name.split(".")
        path = folder / f"class{number % 2}" / f"{number}.{ending}"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(pixels).convert(mode).save(path)
    (folder / "README.txt").write_text("no image")


def test_good_images(tmp_path: Path) -> None:
    """All are decoded, also through a link to a folder: status 0."""
    images(tmp_path / "elsewhere")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    done = run("--keyword", "verify-image", "--root", tmp_path / "root")
    assert (done.returncode, done.stdout, done.stderr) == (0, "9 images, 0 bad\n", "")


def test_bad_images_are_listed(tmp_path: Path) -> None:
    """Cut short, of another kind, empty, a broken link: one line each, status 1."""
    images(tmp_path)
    whole = (tmp_path / "class0" / "0.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) * 9 // 10])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    png = bytearray((tmp_path / "class1" / "3.png").read_bytes())
    png[len(png) // 2] ^= 0xFF
    (tmp_path / "flipped.png").write_bytes(png)
    done = run("--keyword", "verify-image", "--root", tmp_path, "--workers", "2")
    assert (done.returncode, done.stderr) == (1, "")
    *lines, last = done.stdout.splitlines()
    assert last == "14 images, 5 bad"
    reasons = dict(line.split(": ", 1) for line in lines)
    assert list(reasons) == [
        str(tmp_path / n) for n in ("cut.jpg", "empty.jpg", "flipped.png", "gone.jpg", "text.png")
    ]
    assert "truncated" in reasons[str(tmp_path / "cut.jpg")]
    assert reasons[str(tmp_path / "gone.jpg")] == "No such file or directory"
    assert reasons[str(tmp_path / "text.png")] == "no image"


# --- verify-data -----------------------------------------------------------------------------


def test_findings_of_every_kind_are_listed(tmp_path: Path) -> None:
    """One line each, with their kind; an image may have several; status 1."""
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(folder / "good.jpg")
    image.convert("P").save(folder / "good.png")
    image.convert("CMYK").save(folder / "four.jpg")
    image.convert("L").save(folder / "grey.jpg")
    image.convert("L").save(folder / "both.jpg", "PNG")
    image.save(folder / "png.JPEG", "PNG")
    whole = (folder / "good.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[:-30])
    (folder / "text.jpg").write_text("no image")
    (folder / os.fsdecode(b"\xff\n.jpg")).write_text("no image")
    image.save(folder / "picture.gif")
    Image.fromarray(pixels[..., 0].astype(np.float32)).save(folder / "float.tif")
    (folder / "photo.jfif").write_bytes(whole)
    (folder / "photo").write_bytes(whole)
    (folder / "README.txt").write_text("no image")
    os.mkfifo(folder / "pipe")
    (tmp_path / "val" / "b").mkdir(parents=True)
    image.save(tmp_path / "val" / "b" / "good.jpg")
    done = run("--keyword", "verify-data", "--root", tmp_path, "-j", "2")
    assert (done.returncode, done.stderr) == (1, "")
    *lines, last = done.stdout.splitlines()
    assert last == (
        "12 images: 4 mislabelled, 2 single-channel, 1 truncated, 3 broken, 1 CMYK, 1 GIF, 1 class folders"
    )
    found = {tuple(line.removeprefix(f"{folder}/").split(": ", 2)[:2]) for line in lines[:-1]}
    assert found == {
        ("both.jpg", "mislabelled"), ("both.jpg", "single-channel"), ("cut.jpg", "truncated"), ("four.jpg", "CMYK"),
        ("grey.jpg", "single-channel"), ("png.JPEG", "mislabelled"), ("text.jpg", "broken"),
        ("picture.gif", "GIF"), ("float.tif", "broken"), (r"\udcff\n.jpg", "broken"),
        ("photo.jfif", "mislabelled"), ("photo", "mislabelled"),
    }  # fmt: skip
    assert len(lines[:-1]) == len(found)
    assert lines[-1].startswith(
        f"{tmp_path}: class folders: train/ and val/ in {tmp_path} have different classes"
    )


def test_the_folder_that_is_made_is_good_and_the_same_every_time(call: Call, tmp_path: Path) -> None:
    """Also other tools find nothing in it; a folder that is there is not touched."""
    for name in ("one", "two"):
        status, out, err = call(
            "--keyword", "make-fake-imagenet", "--root", tmp_path / name, "--num_classes", "3",
            "--fake_size", "12", "--image-size", "50x37",
        )  # fmt: skip
        assert (status, out) == (0, f"{tmp_path / name}: 15 images of 3 classes, 50x37 pixels\n"), err
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.jpg"))
    assert [str(path.parent) for path in files] == [
        *["train/class0"] * 4, *["train/class1"] * 4, *["train/class2"] * 4, *(f"val/class{i}" for i in range(3)),
    ]  # fmt: skip
    contents = [(tmp_path / "one" / path).read_bytes() for path in files]
    assert contents == [(tmp_path / "two" / path).read_bytes() for path in files]
    assert len(set(contents)) == 15
    with Image.open(tmp_path / "one" / files[0]) as image:
        assert (image.size, image.mode, image.format) == ((50, 37), "RGB", "JPEG")
    status, out, _ = call("--keyword", "verify-data", "--root", tmp_path / "one", "--workers", "1")
    assert (status, out) == (0, "15 images: nothing found\n")
    base = ("--keyword", "make-fake-imagenet", "--root")
    for more, text in (
        ((tmp_path / "one",), f"{tmp_path / 'one' / 'train'} exists; name another --root"),
        ((tmp_path / "x", "--image_size", "50"), "'50' is not WIDTHxHEIGHT, like 500x375"),
        ((tmp_path / "x", "--image_size", "0x5"), "'0' is not a number of 1 or more"),
        ((tmp_path / "x", "--fake_size", "3"), "--fake_size 3: 10 classes need at least 10 training images"),
    ):
        status, out, err = call(*base, *more)
        assert (status, out) == (2, "")
        assert text in err
    assert not (tmp_path / "x").exists()


def test_a_thousand_images(tmp_path: Path) -> None:
    """All are counted, a few bad ones among them are found."""
    pixels = np.random.default_rng(0).integers(256, size=(9, 8, 3), dtype=np.uint8)
    whole = tmp_path / "0000.jpg"
    Image.fromarray(pixels).save(whole)
    bad = {77, 500, 999}
    for number in range(1, 1000):
        path = tmp_path / f"{number:04}.jpg"
        path.write_bytes(b"no image" if number in bad else whole.read_bytes())
    done = run("--keyword", "verify-data", "--root", tmp_path, "-j", "2")
    assert (done.returncode, done.stderr) == (1, "")
    lines = [f"{tmp_path / f'{number:04}.jpg'}: broken: no image" for number in sorted(bad)]
    assert done.stdout.splitlines() == [*lines, "1000 images: 3 broken"]


def test_images_beside_the_class_folders_are_listed(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "a" / "deeper").mkdir(parents=True)
        for path in ("a/0.png", "a/deeper/1.png", "2.png"):
            Image.new("RGB", (8, 8)).save(tmp_path / part / path)
    done = run("--keyword", "verify-data", "--root", f"{tmp_path}/", "-j", "1")
    says = "without class: training passes over images beside the class folders"
    assert (done.returncode, done.stderr) == (1, "")
    lines = [f"{tmp_path / part / '2.png'}: {says}" for part in ("train", "val")]
    assert done.stdout.splitlines() == [*lines, "6 images: 2 without class"]


@pytest.mark.parametrize(("there", "missing"), [("train", "val"), ("val", "train")])
def test_a_missing_half_of_a_data_set_is_listed(tmp_path: Path, there: str, missing: str) -> None:
    (tmp_path / there / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / there / "a" / "0.png")
    done = run("--keyword", "verify-data", "--root", tmp_path, "-j", "1")
    assert (done.returncode, done.stderr) == (1, "")
    line, last = done.stdout.splitlines()
    assert line.startswith(f"{tmp_path}: class folders: {tmp_path / missing} is missing")
    assert last == "1 images: 1 class folders"


def test_damage_that_pillow_passes_over_is_listed(tmp_path: Path) -> None:
    """In files of the size of photographs; what means another picture is no damage to a decoder."""
    photograph(0, 0, 1, 500, 375).save(tmp_path / "good.jpg", quality=95)
    photograph(0, 0, 1, 500, 375).save(tmp_path / "steps.jpg", quality=95, progressive=True)
    good, steps = ((tmp_path / name).read_bytes() for name in ("good.jpg", "steps.jpg"))
    size = good.index(b"\xff\xc0") + 5  # of two bytes each: rows and columns
    middle = len(good) // 2
    files = {
        "half.jpg": good[:middle] + b"\xff\xd9",
        "half steps.jpg": steps[: len(steps) // 2] + b"\xff\xd9",
        "marker.jpg": good[:middle] + b"\xff\xd3" + good[middle + 2 :],
        "rows.jpg": good[:size] + (475).to_bytes(2, "big") + good[size + 2 :],
        "huge.jpg": good[:size] + (12000).to_bytes(2, "big") * 2 + good[size + 4 : 1500] + b"\xff\xd9",
        "more.jpg": good + b"more",
        "zeros.jpg": good[:middle] + bytes(500) + good[middle + 500 :],
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert image_findings.image_error(tmp_path / name) is None
    done = run("--keyword", "verify-data", "--root", tmp_path, "-j", "2")
    assert (done.returncode, done.stderr) == (1, "")
    found = [line.removeprefix(f"{tmp_path}/") for line in done.stdout.splitlines()]
    short = "damaged: Corrupt JPEG data: premature end of data segment"
    names = ("half steps.jpg", "half.jpg", "huge.jpg", "marker.jpg", "rows.jpg")
    listed = [*(f"{name}: {short}" for name in names), "huge.jpg: huge: 12000x12000 pixels in 1502 bytes"]
    assert found == [*sorted(listed), "9 images: 5 damaged, 1 huge"]


def test_what_dali_decodes_otherwise_is_listed(tmp_path: Path) -> None:
    grey = Image.linear_gradient("L")
    grey.convert("RGB").save(tmp_path / "gif.jpg", "GIF")
    grey.convert("LA").save(tmp_path / "LA.tiff")
    Image.new("LAB", (8, 8)).save(tmp_path / "LAB.tiff")
    (tmp_path / "levels.pgm").write_bytes(b"P5 2 2 100\n1234")
    (tmp_path / "good.ppm").write_bytes(b"P6 1 1 255\n123")
    found = {path.name: image_findings.image_findings(path) for path in tmp_path.iterdir()}
    assert {name for name, kinds in found.items() if "not for dali" in dict(kinds)} == {
        "gif.jpg", "LA.tiff", "LAB.tiff", "levels.pgm",
    }  # fmt: skip


def test_verify_data_needs_pyvips(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyvips", None)
    status, out, err = call("--keyword", "verify-data", "--root", tmp_path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "verify-data needs pyvips" in err and "pip install pyvips pyvips-binary" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_with_a_line_and_all_its_processes(tmp_path: Path, number: signal.Signals) -> None:
    """As a terminal sends them, to every process, several times."""
    Image.effect_noise((1500, 1000), 50).convert("RGB").save(tmp_path / "0.jpg")
    for name in range(1, 5000):  # a minute or two of decoding
        (tmp_path / f"{name}.jpg").symlink_to("0.jpg")
    process = subprocess.Popen(
        [sys.executable, "tools.py", "--keyword", "verify-data", "--root", tmp_path, "-j", "2"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a runner in the background ignores SIGINT
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(started_by(process.pid)) < 5:  # itself, two that decode, what these are forked from, a tracker
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    everyone = started_by(process.pid)
    for _ in range(3):
        for pid in everyone & processes().keys():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + number, "", f"tools.py: ended by {number.name}\n")
    job_is_gone(everyone)


@pytest.mark.parametrize(
    ("root", "text"),
    [("nowhere", "no such folder"), ("file.png", "no such folder"), ("empty", "no image below")],
)
def test_a_root_without_images(call: Call, tmp_path: Path, root: str, text: str) -> None:
    """Status 2."""
    (tmp_path / "file.png").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").touch()
    status, out, err = call("--keyword", "verify-image", "--root", tmp_path / root)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert text in err


def test_a_link_that_leads_back_up(tmp_path: Path) -> None:
    """Every image once, and an end."""
    images(tmp_path)
    (tmp_path / "class0" / "loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "class1")
    found = list(image_findings.image_files(tmp_path))
    assert len(found) == len({os.path.realpath(path) for path in found}) == 9


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tiff", "gif", "bmp", "ppm"])
def test_damaged_images_never_escape(tmp_path: Path, ending: str) -> None:
    """Changed bytes anywhere give an image or a reason of one line."""
    rng = np.random.default_rng(0)
    path = tmp_path / f"a.{ending}"
    Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(path)
    assert image_findings.image_error(path) is None
    whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    for _ in range(100):
        changed = whole.copy()
        changed[rng.integers(min(len(whole), 200), size=4)] = rng.integers(256, size=4, dtype=np.uint8)
        path.write_bytes(changed[: rng.integers(len(whole) + 1)].tobytes())
        reason = image_findings.image_error(path)
        assert reason is None or (reason and "\n" not in reason)


# --- the documentation -----------------------------------------------------------------------


def test_the_examples_of_the_documentation(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command of docs/tools.md prints what is shown there."""
    text = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (setup,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    Path("setup.py").write_text(setup)
    runpy.run_path("setup.py")
    words: set[str] = set()
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for command, shown in re.findall(r"^\$ (.*)\n((?:[^$\n].*\n)*)", block, re.MULTILINE):
            program, *arguments = shlex.split(command)
            if program == "cat":
                printed = Path(arguments[0]).read_text()
            else:
                assert (program, arguments[0]) == ("python", "tools.py")
                _, out, err = call(*arguments[1:])
                printed = out + err
                words.add(arguments[2].partition(",")[0])
            # how much of a cut image is left over depends on Pillow's version
            left_over = r"\(\d+ bytes not processed\)"
            assert re.sub(left_over, "", printed) == re.sub(left_over, "", shown), command
    assert words == set(tools.WORDS) - {"compare", "report"}  # of runs, see test_compare and test_report.py


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
