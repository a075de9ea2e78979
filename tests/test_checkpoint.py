"""Checkpoints: what is on the disk after a failure, what is refused, what is loaded, what is restored."""

from __future__ import annotations

import os
import pickle
import random
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from utils.checkpoint import archive, random_state
from utils.checkpoint.case_files import CheckpointFiles, find_pretrained
from utils.checkpoint.weights import LoadReport, load_weights, state_dict_of
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def nothing(name: str) -> bool:
    """No name may be missing."""
    return False


def message(error: pytest.ExceptionInfo[UserError]) -> str:
    """The text of a user's mistake, which is one line."""
    text = str(error.value)
    assert text and "\n" not in text
    return text


# --- save and read ---------------------------------------------------------------------------


def test_a_payload_comes_back(tmp_path: Path) -> None:
    """Tensors, numbers, text, lists, dicts; missing folders are made and no other file is left."""
    path = tmp_path / "weights" / "resnet20" / "a.pth.tar"
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.5, momentum=0.9)
    payload = {
        "epoch": 3,
        "state_dict": OrderedDict(w=torch.arange(6.0).reshape(2, 3), n=torch.tensor(7)),
        "optimizer": optimizer.state_dict(),
        "best_acc": 91.25,
        "amp": None,
        "words": ["a", ("b", True)],
    }
    archive.save(path, payload)
    back = archive.read(path)
    assert back.keys() == payload.keys()
    assert back["epoch"] == 3 and back["best_acc"] == 91.25 and back["amp"] is None
    assert back["words"] == ["a", ("b", True)]
    assert torch.equal(back["state_dict"]["w"], torch.arange(6.0).reshape(2, 3))
    assert back["optimizer"]["param_groups"][0]["lr"] == 0.5
    assert os.listdir(path.parent) == ["a.pth.tar"]


def test_save_replaces(tmp_path: Path) -> None:
    """A second save wins."""
    path = tmp_path / "a.pth.tar"
    archive.save(path, {"epoch": 1})
    archive.save(path, {"epoch": 2})
    assert archive.read(path) == {"epoch": 2}


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (lambda: None, (AttributeError, pickle.PicklingError)),
        (np.float64(1.5), TypeError),  # pickles, but would not load
        (Path("x"), TypeError),
    ],
)
def test_a_payload_that_would_not_load_leaves_the_old_file(
    tmp_path: Path, value: object, error: type[Exception] | tuple[type[Exception], ...]
) -> None:
    """The target is untouched and nothing is left beside it."""
    path = tmp_path / "a.pth.tar"
    archive.save(path, {"epoch": 1})
    before = path.read_bytes()
    with pytest.raises(error):
        archive.save(path, {"epoch": 2, "value": value})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pth.tar"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A write that the system cuts off half-way: one line, the old content, no temporary file."""
    path = tmp_path / "a.pth.tar"
    archive.save(path, {"epoch": 1})
    before = path.read_bytes()
    program = (
        "import resource, sys, pathlib, torch\n"
        "from utils.checkpoint import archive\n"
        "from utils.errors import UserError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "try:\n"
        "    archive.save(pathlib.Path(sys.argv[1]), {'w': torch.zeros(10000)})\n"
        "except UserError as error:\n"
        "    sys.exit(str(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"{path}: cannot be written (File too large)")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pth.tar"]


@pytest.mark.parametrize("where", ["file/a.pth.tar", "file/more/a.pth.tar", "folder", "folder/" + "n" * 300])
def test_a_place_that_cannot_be_written(tmp_path: Path, where: str) -> None:
    """A folder that is a file, a file that is a folder, a name that is too long."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        archive.save(tmp_path / where, {"epoch": 1})
    assert message(error).startswith(f"{tmp_path / where}: cannot be written (")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert os.listdir(tmp_path / "folder") == ["inside"]


@pytest.mark.parametrize("what", ["missing.pth.tar", "folder", "a.txt/b.pth.tar"])
def test_a_file_that_is_not_there(tmp_path: Path, what: str) -> None:
    """One line with the name."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError) as error:
        archive.read(tmp_path / what)
    assert message(error).startswith(f"{tmp_path / what}: cannot be read (")


@pytest.mark.parametrize("zipped", [True, False])
def test_damage_is_seen(tmp_path: Path, zipped: bool) -> None:
    """Cut at any length the file is refused in one line; of an archive so is any changed weight."""
    path = tmp_path / "a.pth.tar"
    payload = {"epoch": 1, "state_dict": nn.Linear(20, 20).state_dict()}
    torch.save(payload, path, _use_new_zipfile_serialization=zipped)
    assert archive.read(path)["epoch"] == 1
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, len(whole) // 60):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError) as error:
            archive.read(path)
        assert message(error).startswith(f"{path}: ")
    if zipped:
        weight = payload["state_dict"]["weight"].numpy().tobytes()
        where = whole.index(weight)
        path.write_bytes(whole[:where] + bytes(len(weight)) + whole[where + len(weight) :])
        with pytest.raises(UserError, match=r"wrong checksum of .*data/0"):
            archive.read(path)


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    """Changed bytes anywhere give a dict or a UserError, in both formats."""
    rng = np.random.default_rng(0)
    path = tmp_path / "a.pth.tar"
    payload = {"epoch": 1, "state_dict": nn.BatchNorm2d(3).state_dict(), "list": [1, 2.5, "x", None]}
    refused = 0
    for zipped in (True, False):
        torch.save(payload, path, _use_new_zipfile_serialization=zipped)
        whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        for _ in range(150):
            changed = whole.copy()
            changed[rng.integers(len(changed), size=3)] = rng.integers(256, size=3, dtype=np.uint8)
            path.write_bytes(changed.tobytes())
            try:
                assert isinstance(archive.read(path), dict)
            except UserError:
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("own", [True, False])
def test_one_changed_bit_never_changes_what_is_read(tmp_path: Path, own: bool) -> None:
    """Every bit of the archive's directory and behind it, and some of the rest; also of another program's archive."""
    path = tmp_path / "a.pth.tar"
    payload = {"epoch": 1, "state_dict": {"w": torch.arange(1.0, 6.0)}}
    archive.save(path, payload) if own else torch.save(payload, path)
    whole = path.read_bytes()
    directory = whole.index(b"PK\1\2")
    assert directory < len(whole) - 200
    draw = random.Random(0)
    bits = [*range(8 * directory, 8 * len(whole)), *draw.sample(range(8 * directory), 300)]
    refused = 0
    for bit in bits:
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            found = archive.read(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
            continue
        assert not own
        assert found.keys() == payload.keys() and found["epoch"] == 1
        assert found["state_dict"].keys() == payload["state_dict"].keys()
        assert all(torch.equal(found["state_dict"][name], w) for name, w in payload["state_dict"].items())
    assert refused == len(bits) if own else refused > len(bits) // 4


def test_what_another_program_reads(tmp_path: Path) -> None:
    """The digest is a comment of the archive, which torch passes over."""
    path = tmp_path / "a.pth.tar"
    archive.save(path, {"w": torch.arange(5.0)})
    for mapped in (True, False):
        assert torch.load(path, weights_only=True, mmap=mapped)["w"].tolist() == [0, 1, 2, 3, 4]
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match="wrong checksum of the file"):
        archive.read(path)


def test_a_file_cut_off_before_its_digest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth.tar"
    archive.save(path, {"a": torch.zeros(2)})
    data = path.read_bytes()
    for length in range(len(data) - 80, len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="damaged, cut short"):
            archive.read(path)


def test_a_damaged_epoch_is_reported(tmp_path: Path) -> None:
    """The order of the files is found without reading their tensors, but not from damaged numbers."""
    files = CheckpointFiles(tmp_path, "resnet20", "a")
    fill(files, latest=9, e3=3)
    content = files.latest.read_bytes()
    number = b"epochq" + content.partition(b"epochq")[2][:1] + b"K\x09"
    assert content.count(number) == 1
    files.latest.write_bytes(content.replace(number, number[:-1] + b"\x02"))
    found = files.newest()
    assert found.path == files.epoch(3) and len(found.passed_over) == 1


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"version https://git-lfs", bytes(1000)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    """An empty file, a web page, a pointer, zeros."""
    path = tmp_path / "a.pth.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a PyTorch checkpoint; copy or download it again"):
        archive.read(path)


@pytest.mark.parametrize("payload", [[1, 2], 3, torch.zeros(2)])
def test_only_a_dict_is_a_checkpoint(tmp_path: Path, payload: object) -> None:
    """Anything else is refused with its type."""
    path = tmp_path / "a.pth.tar"
    torch.save(payload, path)
    with pytest.raises(UserError, match=f"holds a {type(payload).__name__}, not a dict"):
        archive.read(path)


@pytest.mark.parametrize("core", ["core", "_core"])
@pytest.mark.parametrize(
    "number", [np.float64(71.5), np.float32(71.5), np.float16(71.5), np.int64(7), np.int32(7), np.bool_(True)]
)
def test_numbers_of_numpy_are_plain_data(tmp_path: Path, number: np.generic, core: str) -> None:
    """Published files note an accuracy as one, under the module's name of either version of NumPy."""
    path = tmp_path / "a.pth.tar"
    torch.save({"best_acc": number}, path, pickle_protocol=2, _use_new_zipfile_serialization=False)
    content, count = re.subn(rb"numpy\._?core\.", f"numpy.{core}.".encode(), path.read_bytes())
    assert count == 1
    path.write_bytes(content)
    assert archive.read(path)["best_acc"] == number


class Pickled:
    """Is pickled as a call of a function, and a state that its result is given."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


SCALAR = np.float64(0).__reduce__()[0]


def test_a_state_of_a_type_of_numpy_is_not_believed(tmp_path: Path) -> None:
    """Flags that NumPy itself would follow to an object where there is none, and end the process."""
    path = tmp_path / "a.pth.tar"
    kind = Pickled(np.dtype, ("f8", False, True), (3, ">", None, None, None, -1, -1, 63))
    torch.save({"best_acc": Pickled(SCALAR, (kind, np.array([71.5], ">f8").tobytes()))}, path)
    assert archive.read(path)["best_acc"] == 71.5


@pytest.mark.parametrize("name", ["O8", "V8", "V2000000000", "S5", "M8[s]", "f8,f8"])
def test_other_types_of_numpy_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.pth.tar"
    torch.save({"x": Pickled(SCALAR, (Pickled(np.dtype, (name, False, True)), bytes(8)))}, path)
    with pytest.raises(UserError, match="not a PyTorch checkpoint"):
        archive.read(path)


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        """Keep the shell command."""
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        """What pickle stores."""
        return (os.system, (self.command,))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    """The command would make a file; the same file unpickled plainly proves that it works."""
    path, trace = tmp_path / "a.pth.tar", tmp_path / "trace"
    content = {"state_dict": {"w": torch.ones(2)}, "x": Malicious(f"touch {trace}")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as error:
        archive.read(path)
    assert message(error).startswith(f"{path}: refused, because it holds ")
    assert f"{os.system.__module__}.system" in message(error)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()


# --- state dicts -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dict_of_accepts_every_form(key: str | None, prefix: str) -> None:
    """Bare, under either key, with or without the prefix."""
    weights = {f"{prefix}a.weight": torch.ones(2), f"{prefix}a.module.bias": torch.zeros(3)}
    state = state_dict_of(weights if key is None else {"epoch": 1, key: weights})
    assert list(state) == ["a.weight", "a.module.bias"]
    assert state["a.weight"] is weights[f"{prefix}a.weight"]


def test_a_module_that_is_called_model_is_no_wrapper() -> None:
    """Only a dict under the key counts."""
    assert list(state_dict_of({"model": torch.ones(1)})) == ["model"]


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        ({}, "holds no weights"),
        ({"state_dict": {}}, "holds no weights"),
        ({"epoch": 3, "net": {}}, "its keys: epoch, net"),
        ({"state_dict": {"w": torch.ones(1), "n": 3}}, "the entry 'n' under state_dict is not a dense"),
        ({"model": {1: torch.ones(1)}}, "the entry 1 under model"),
        ({"model": {"w": torch.ones(2).to_sparse()}}, "the entry 'w' under model is not a dense real"),
        ({"model": {"w": torch.ones(2, dtype=torch.complex64)}}, "not a dense real tensor"),
        ({"w": torch.ones(1), "module.w": torch.ones(1)}, "has both 'w' and 'module.w'"),
    ],
)
def test_what_is_no_state_dict(payload: dict[str, Any], text: str) -> None:
    """One line that says what is wrong, with the source."""
    with pytest.raises(UserError) as error:
        state_dict_of(payload, source="some.pth")
    assert text in message(error) and "some.pth" in message(error)


# --- loading ---------------------------------------------------------------------------------


class QuantConv(nn.Conv2d):
    """A convolution with the state of a quantizer."""

    level_num: Tensor

    def __init__(self) -> None:
        """2 channels in, 4 out."""
        super().__init__(2, 4, 3)
        self.clip_val = nn.Parameter(torch.ones(4, 1, 1, 1))
        self.register_buffer("level_num", torch.tensor([4]))


class Net(nn.Module):
    """A convolution, with a quantizer or without, a norm and a linear layer."""

    def __init__(self, classes: int = 3, quantized: bool = True) -> None:
        """11 entries, 9 without the quantizer."""
        super().__init__()
        self.conv = QuantConv() if quantized else nn.Conv2d(2, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all the state."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether the model still has exactly this state."""
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_state_loads_exactly() -> None:
    """Every value arrives, in place: parameters stay the objects an optimizer knows."""
    source, target = Net(), Net()
    nn.init.constant_(source.bn.weight, 0.25)
    weight = target.conv.weight
    report = load_weights(target, source.state_dict(), allow_missing=nothing, source="a.pth")
    assert report == LoadReport(loaded=tuple(source.state_dict()))
    assert report.summary() == "11 loaded"
    assert same(target, source.state_dict())
    assert target.conv.weight is weight and weight.requires_grad


def test_quantizers_may_start_from_full_precision() -> None:
    """Names that allow_missing accepts keep the model's values."""
    target = Net()
    target.state_dict()["conv.clip_val"].fill_(7.0)
    state = Net(quantized=False).state_dict()
    report = load_weights(target, state, allow_missing=lambda name: name.startswith("conv."), source="a.pth")
    assert report.missing == ("conv.clip_val", "conv.level_num")
    assert report.summary() == "9 loaded, 2 missing (conv.clip_val, conv.level_num)"
    assert torch.equal(target.state_dict()["conv.clip_val"], torch.full((4, 1, 1, 1), 7.0))


@pytest.mark.parametrize(
    ("source", "target", "parts"),
    [
        (Net(quantized=False), Net(), ["2 missing (conv.clip_val [4, 1, 1, 1], conv.level_num [1])"]),
        (Net(), Net(quantized=False), ["2 unused (conv.clip_val [4, 1, 1, 1], conv.level_num [1])"]),
        (
            Net(classes=10),
            Net(),
            ["2 of another shape (fc.weight: [10, 4] in the file, [3, 4] in the network, fc.bias: [10] in"],
        ),
        (nn.Linear(4, 3), Net(), ["10 missing (", ", ...); 2 unused (weight [3, 4], bias [3])"]),
    ],
)
def test_what_does_not_fit_is_an_error_and_copies_nothing(
    source: nn.Module, target: nn.Module, parts: list[str]
) -> None:
    """Names, shapes and advice in one line; the model keeps every value, also of the names that fit."""
    before = snapshot(target)
    with pytest.raises(UserError) as error:
        load_weights(target, source.state_dict(), allow_missing=nothing, source="a.pth")
    text = message(error)
    assert text.startswith("a.pth does not fit the network: ")
    for part in [*parts, "--model, --width_alpha, --keyword", "--unresume_scope NAME"]:
        assert part in text
    assert same(target, before)


def test_at_most_five_names_are_listed() -> None:
    """The rest is counted."""
    with pytest.raises(UserError) as error:
        load_weights(Net(), nn.Conv2d(1, 1, 1).state_dict(), allow_missing=nothing, source="a.pth")
    assert "10 missing (" in message(error)
    assert message(error).count("conv.") + message(error).count("bn.") == 5


def test_scope_skips_on_both_sides() -> None:
    """Another class count and another quantizer, both left out on request and reported."""
    source, target = Net(classes=10, quantized=False), Net()
    before = snapshot(target)
    scope = ("fc", "clip_val", "level_num")
    report = load_weights(target, source.state_dict(), allow_missing=nothing, scope=scope, source="a.pth")
    assert report.skipped == ("conv.clip_val", "conv.level_num", "fc.weight", "fc.bias")
    assert report.missing == report.unused == report.mismatched == ()
    assert torch.equal(target.fc.weight, before["fc.weight"])
    assert torch.equal(target.conv.weight, source.conv.weight)


@pytest.mark.parametrize(
    ("scope", "text"), [("clip_vall", "did you mean clip_val?"), ("zzz", "no name in a.pth")]
)
def test_a_scope_that_matches_nothing_is_an_error(scope: str, text: str) -> None:
    """A misspelt name would silently load what was to be left out."""
    target = Net()
    before = snapshot(target)
    with pytest.raises(UserError) as error:
        load_weights(target, Net().state_dict(), allow_missing=nothing, scope=("fc", scope), source="a.pth")
    assert text in message(error) and f"--unresume_scope '{scope}'" in message(error)
    assert same(target, before)


def test_loading_nothing_is_an_error() -> None:
    """All skipped: hardly what was meant."""
    state = nn.Linear(1, 1).state_dict()
    with pytest.raises(
        UserError, match=r"nothing of a\.pth would be loaded: 0 loaded, 2 skipped \(weight, bias"
    ):
        load_weights(nn.Linear(1, 1), state, allow_missing=nothing, scope=("weight", "bias"), source="a.pth")


def test_published_files_load_by_value() -> None:
    """Counters as float parameters, one-element tensors of another rank, tables that are not needed."""

    class Quantizer(nn.Module):
        obsolete = frozenset({"auxil", "codec_vector", "codec_index", "thrs_multiplier"})
        level_num: Tensor
        steps: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.clip_val = nn.Parameter(torch.zeros(1, 1, 1, 1))
            self.basis = nn.Parameter(torch.zeros(2, 1))
            self.register_buffer("level_num", torch.tensor([2]))
            self.register_buffer("steps", torch.tensor(0))

    published = {
        "clip_val": torch.tensor([2.5]),
        "basis": torch.tensor([[0.5], [1.0]], dtype=torch.float64),
        "level_num": nn.Parameter(torch.tensor(16.0)),
        "steps": torch.tensor([[3.0]]),
        "auxil": torch.zeros(7),
        "codec_vector": torch.zeros(4, 2),
        "codec_index": torch.zeros(4),
        "deep.er.thrs_multiplier": torch.zeros(3, 4),
    }
    model = Quantizer()
    report = load_weights(model, published, allow_missing=nothing, source="a.pth")
    assert model.clip_val.tolist() == [[[[2.5]]]]
    assert model.basis.tolist() == [[0.5], [1.0]] and model.basis.dtype == torch.float32
    assert model.level_num.tolist() == [16] and model.level_num.dtype == torch.int64
    assert model.steps.item() == 3
    assert report.obsolete == ("auxil", "codec_vector", "codec_index", "deep.er.thrs_multiplier")
    assert report.summary().startswith("4 loaded, 4 obsolete (auxil, ")


def test_a_table_that_the_model_has_is_loaded() -> None:
    """Obsolete names are only passed over where nothing is called so."""
    model = nn.Module()
    model.register_buffer("auxil", torch.zeros(2))
    report = load_weights(model, {"auxil": torch.ones(2)}, allow_missing=nothing, source="a.pth")
    assert report.loaded == ("auxil",) and report.obsolete == ()
    assert model.state_dict()["auxil"].tolist() == [1, 1]


def test_equal_element_counts_are_not_enough() -> None:
    """Only one-element tensors change their rank."""
    model = nn.Module()
    model.register_buffer("x", torch.zeros(2, 1))
    with pytest.raises(UserError, match=r"x: \[2\] in the file, \[2, 1\] in the network"):
        load_weights(model, {"x": torch.ones(2)}, allow_missing=nothing, source="a.pth")


# --- paths -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["none", "None", " NONE ", "", "  "])
def test_no_pretrained_file(tmp_path: Path, value: str) -> None:
    """The word none, in any case."""
    assert find_pretrained(value, tmp_path, "resnet20") is None


def test_pretrained_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare name: the model's folder, then here. A path: as it is."""
    weights, here = tmp_path / "weights", tmp_path / "here"
    inside = weights / "resnet20" / "a.pth"
    inside.parent.mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "a.pth").touch()
    assert find_pretrained("a.pth", weights, "resnet20") == Path("a.pth")
    inside.touch()
    assert find_pretrained("a.pth", weights, "resnet20") == inside
    assert find_pretrained("./a.pth", weights, "resnet20") == Path("a.pth")
    assert find_pretrained(str(inside), Path("elsewhere"), "resnet18") == inside


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("case-model_bets.pth.tar", "close names there: case-model_best.pth.tar"),
        ("zzz", "in that folder: case-model_best.pth.tar, other.pth"),
        ("nowhere/zzz", "no such file in nowhere; in that folder: nothing"),
        ("n" * 300, "no such file"),
    ],
)
def test_a_missing_pretrained_file(tmp_path: Path, value: str, text: str) -> None:
    """An error with the names that are there."""
    folder = tmp_path / "resnet20"
    folder.mkdir()
    for name in ("case-model_best.pth.tar", "other.pth"):
        (folder / name).touch()
    with pytest.raises(UserError) as error:
        find_pretrained(value, tmp_path, "resnet20")
    assert text in message(error) and f"--pretrained {value}" in message(error)


def test_the_files_of_a_case() -> None:
    """Their names are public."""
    files = CheckpointFiles(Path("weights"), "resnet20", "lsq-2bit_a.1+")
    assert str(files.latest) == "weights/resnet20/lsq-2bit_a.1+-checkpoint.pth.tar"
    assert str(files.best) == "weights/resnet20/lsq-2bit_a.1+-model_best.pth.tar"
    assert str(files.epoch(12)) == "weights/resnet20/lsq-2bit_a.1+-epoch12-checkpoint.pth.tar"


@pytest.mark.parametrize("case", ["", ".a", "..", "a/b", "/a", "a b", "a\n", "ä", "a-epoch3", "a-backup1"])
def test_a_case_is_a_plain_name(case: str) -> None:
    """No separators, no hidden files, nothing that reads as another case's epoch file."""
    with pytest.raises(UserError, match="--case"):
        CheckpointFiles(Path("weights"), "resnet20", case)


def fill(files: CheckpointFiles, **epochs: int) -> None:
    """Write checkpoints: `latest=3` or `e2=2`, the value is the epoch inside."""
    for name, epoch in epochs.items():
        path = files.latest if name == "latest" else files.epoch(int(name[1:]))
        archive.save(path, {"epoch": epoch, "state_dict": {"w": torch.ones(50)}})


def cut(path: Path) -> None:
    """Lose the last third of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    """Neither without a folder nor with other cases' files in it."""
    files = CheckpointFiles(tmp_path / "weights", "resnet20", "a")
    assert files.newest().path is None
    fill(CheckpointFiles(tmp_path / "weights", "resnet20", "a-b"), latest=5, e2=2)
    fill(CheckpointFiles(tmp_path / "weights", "resnet20", "ba"), latest=5)
    assert files.newest().path is None


@pytest.mark.parametrize(
    ("epochs", "newest"),
    [
        ({"latest": 3}, "latest"),
        ({"latest": 3, "e2": 2, "e3": 3}, "latest"),
        ({"latest": 3, "e2": 2, "e10": 10, "e9": 9}, "e10"),
        ({"e9": 9, "e10": 10}, "e10"),
        ({"e9": 10, "e10": 9}, "e9"),
    ],
)
def test_the_newest_is_the_one_with_the_highest_epoch_inside(
    tmp_path: Path, epochs: dict[str, int], newest: str
) -> None:
    """Not by name, not by time; the latest among equals."""
    files = CheckpointFiles(tmp_path, "resnet20", "a")
    fill(files, **epochs)
    assert files.newest().path == (files.latest if newest == "latest" else files.epoch(int(newest[1:])))


def test_damaged_checkpoints_are_passed_over(tmp_path: Path) -> None:
    """Cut short, a changed weight, no epoch: each is named and the one before is taken."""
    files = CheckpointFiles(tmp_path, "resnet20", "a")
    fill(files, latest=9, e9=9, e8=8, e7=7, e6=6)
    cut(files.latest)
    content = files.epoch(9).read_bytes()
    weights = np.ones(50, dtype=np.float32).tobytes()
    assert weights in content
    files.epoch(9).write_bytes(content.replace(weights, bytes(200)))
    archive.save(files.epoch(8), {"state_dict": {}})
    found = files.newest()
    assert found.path == files.epoch(7) and found.payload["epoch"] == 7
    assert len(found.passed_over) == 3
    for path in (files.latest, files.epoch(9), files.epoch(8)):
        assert sum(text.startswith(f"passed over {path}: ") for text in found.passed_over) == 1
    cut(files.epoch(7))
    cut(files.epoch(6))
    assert files.newest().path is None


def test_the_position_within_an_epoch_counts(tmp_path: Path) -> None:
    files = CheckpointFiles(tmp_path, "resnet20", "a")
    archive.save(files.latest, {"epoch": 3, "position": 16})
    archive.save(files.backup(1), {"epoch": 3, "position": 64})
    archive.save(files.best, {"epoch": 3})
    assert files.newest().path == files.backup(1)
    cut(files.backup(1))
    assert files.newest().path == files.latest
    cut(files.latest)
    assert files.newest().path == files.best


def payload_of(epoch: int) -> memoryview:
    return archive.serialise({"epoch": epoch, "w": torch.ones(1000)})


@pytest.fixture(params=[True, False], ids=["links", "no links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that knows links, and one that knows none."""
    if not request.param:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))


def kept_epochs(files: CheckpointFiles, keep: int) -> list[int]:
    """The epochs in the latest checkpoint and those before it."""
    kept = [files.latest, *(files.backup(number) for number in range(1, keep))]
    return [archive.read(path)["epoch"] for path in kept if path.exists()]


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_retention(tmp_path: Path, links: None, keep: int) -> None:
    """The latest and those before it, in order, and no more; also where the disk knows no links."""
    files = CheckpointFiles(tmp_path, "resnet20", "a")
    for epoch in range(1, 7):
        files.write_latest(payload_of(epoch), keep)
    assert kept_epochs(files, keep) == [6, 5, 4, 3][:keep]
    assert len(files.existing()) == keep
    files.write_latest(payload_of(7), 1)
    assert files.existing() == [files.latest]


def whole(files: CheckpointFiles) -> set[int]:
    """The epochs in all files of the case that are whole."""
    return {archive.read(path)["epoch"] for path in files.existing()}


STEPS = ("open", "fsync", "replace", "link", "unlink")  # of `os`


def save_ended_at(files: CheckpointFiles, epoch: int, step: int) -> bool:
    """Save in a process that ends itself in place of its nth step on the disk; whether it was ended."""
    pid = os.fork()
    if pid == 0:
        steps = iter(range(step))

        def ending(real: Any) -> Any:
            def stand_in(*arguments: Any, **options: Any) -> Any:
                if next(steps, None) is None:
                    os._exit(9)
                return real(*arguments, **options)

            return stand_in

        for name in STEPS:
            setattr(os, name, ending(getattr(os, name)))
        status = 1
        try:
            files.write_latest(payload_of(epoch), 3)
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9)
    return status == 9


def test_a_save_that_is_ended_at_any_step_loses_nothing(tmp_path: Path, links: None) -> None:
    """There are as many whole checkpoints as before, the newest among them; so there are after each next one."""
    files = CheckpointFiles(tmp_path, "resnet20", "a")
    for epoch in (1, 2, 3):
        files.write_latest(payload_of(epoch), 3)
    epoch, newest, ended = 4, 3, 0
    for step in range(100):  # every end begins with what the one before has left
        came_through = not save_ended_at(files, epoch, step)
        found = whole(files)
        assert len(found) >= 3 and max(found) in (newest, epoch), f"step {step}"
        assert {newest, newest - 1} <= found or max(found) == epoch
        newest, epoch, ended = max(found), max(found) + 1, ended + (not came_through)
        if came_through:
            break
    assert ended >= 5
    assert kept_epochs(files, 3)[0] == newest and len(files.existing()) == 3
    for step in range(100):  # every end in files that are in order
        for further in (1, 2, 3):
            files.write_latest(payload_of(newest + further), 3)
        newest += 3
        if not save_ended_at(files, newest + 1, step):
            break
        assert len(whole(files)) >= 3 and newest in whole(files)
        files.remove_leftovers()
        files.write_latest(payload_of(newest + 1), 3)
        assert kept_epochs(files, 3) in ([newest + 1, newest, newest - 1], [newest + 1, newest + 1, newest])
        assert len(files.existing()) == 3
        newest += 1


def test_saves_that_fail_leave_all_checkpoints(tmp_path: Path) -> None:
    """A full disk, again and again: neither the latest one nor those before it are another file then."""
    files = CheckpointFiles(tmp_path, "resnet20", "a")
    for epoch in (1, 2, 3):
        files.write_latest(payload_of(epoch), 3)
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in files.existing()}
    program = (
        "import resource, sys, pathlib, torch\n"
        "from utils.checkpoint import archive\n"
        "from utils.checkpoint.case_files import CheckpointFiles\n"
        "from utils.errors import UserError\n"
        "files = CheckpointFiles(pathlib.Path(sys.argv[1]), 'resnet20', 'a')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "for _ in range(3):\n"
        "    try:\n"
        "        files.write_latest(archive.serialise({'w': torch.zeros(10000)}), 3)\n"
        "    except UserError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("cannot be written (File too large)") == 3
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in files.existing()} == before
    assert len(os.listdir(files.folder)) == 3


def test_a_damaged_latest_checkpoint_is_replaced(tmp_path: Path) -> None:
    """By the one that the run goes on from, so that no save keeps the damaged one; a whole one stays."""
    files = CheckpointFiles(tmp_path, "resnet20", "a")
    for epoch in (1, 2, 3):
        files.write_latest(payload_of(epoch), 3)
    archive.save(files.epoch(4), {"epoch": 4})
    files.promote(files.epoch(4))  # the latest one is whole
    assert kept_epochs(files, 3) == [3, 2, 1]
    cut(files.latest)
    files.promote(files.backup(1))
    files.write_latest(payload_of(5), 3)
    assert kept_epochs(files, 3) == [5, 2, 1]
    cut(files.latest)
    files.promote(files.epoch(4))
    assert kept_epochs(files, 3) == [4, 2, 1] and files.epoch(4).exists()


def test_leftovers_are_removed(tmp_path: Path) -> None:
    """Temporary files of this case, and no other file."""
    files = CheckpointFiles(tmp_path, "resnet20", "a")
    archive.save(files.latest, {"epoch": 1})
    others = [
        files.folder / name
        for name in (".b-checkpoint.pth.tar.7.tmp", "a.tmp", ".a-b-checkpoint.pth.tar.7.tmp")
    ]
    mine = [
        files.folder / f".a-{name}.pth.tar.17.tmp"
        for name in ("checkpoint", "model_best", "backup1-checkpoint")
    ]
    for path in (*others, *mine):
        path.touch()
    files.remove_leftovers()
    assert set(files.folder.iterdir()) == {files.latest, *others}


def test_a_model_cannot_leave_the_folder(tmp_path: Path) -> None:
    for name in ("../x", "a/../../x", "/x", ""):
        with pytest.raises(UserError, match="--model"):
            CheckpointFiles(tmp_path, name, "a")
    assert CheckpointFiles(tmp_path, "timm:hf-hub:a/b", "a").folder == tmp_path / "timm:hf-hub:a" / "b"


def test_a_writer_works_in_order_and_reports_errors() -> None:
    done: list[int] = []
    with archive.Writer() as writer:
        for number in range(5):
            writer.start(lambda number=number: done.append(number))
        writer.wait()
        assert done == [0, 1, 2, 3, 4]
        writer.start(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            writer.wait()
        writer.wait()


def test_a_snapshot_does_not_change() -> None:
    tensor = torch.zeros(3)
    copy = archive.snapshot({"a": [tensor, 1], "b": {"c": tensor}})
    tensor += 1
    assert torch.equal(copy["a"][0], torch.zeros(3)) and torch.equal(copy["b"]["c"], torch.zeros(3))


# --- random state ----------------------------------------------------------------------------


def draws() -> list[float]:
    """Numbers of every generator, with one of a pair of normals left over in two of them."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(1)),
        float(torch.randn(1)),
    ]


def test_random_state_survives_a_checkpoint(tmp_path: Path) -> None:
    """What is drawn after restoring from a file is what was drawn after saving it."""
    draws()
    archive.save(tmp_path / "a.pth.tar", {"random": random_state.random_state()})
    expected = [draws() for _ in range(3)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert draws() != expected[0]
    random_state.set_random_state(archive.read(tmp_path / "a.pth.tar")["random"])
    assert [draws() for _ in range(3)] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_state_of_cuda(tmp_path: Path) -> None:
    """The device's generator, too."""
    archive.save(tmp_path / "a.pth.tar", {"random": random_state.random_state()})
    expected = torch.rand(5, device="cuda")
    random_state.set_random_state(archive.read(tmp_path / "a.pth.tar")["random"])
    assert torch.equal(torch.rand(5, device="cuda"), expected)


@pytest.mark.parametrize(
    "change", [{"python": None}, {"numpy": {}}, {"torch": torch.zeros(3, dtype=torch.uint8)}]
)
def test_a_foreign_random_state(change: dict[str, Any]) -> None:
    """One line, no traceback."""
    before = random_state.random_state()
    with pytest.raises(UserError, match="random state was not written by this program"):
        random_state.set_random_state({**before, **change})
    with pytest.raises(UserError):
        random_state.set_random_state({})
    random_state.set_random_state(before)
