"""Files of checkpoints: what is on the disk after a failure, which damage is seen, what is refused."""

from __future__ import annotations

import argparse
import os
import pickle
import random
import re
import subprocess
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests import ROOT
from tests.utils.checkpoint.helpers import fill, message
from tests.utils.checkpoint.malicious import Malicious
from utils.checkpoint import archive
from utils.checkpoint.case_files import CheckpointFiles
from utils.errors import UserError

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


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, interpreter: str) -> None:
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
        [interpreter, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True, check=False
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


@pytest.mark.parametrize("content", [b"", b"text", bytes(1000)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    """An empty file, a text, zeros."""
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
    "number",
    [
        np.float64(71.5),
        np.float32(71.5),
        np.float16(71.5),
        np.int64(7),
        np.int32(7),
        np.bool_(True),
        np.int8(-7),
        np.int16(-7),
        np.uint8(200),
        np.uint16(7),
        np.uint32(7),
        np.uint64(2**63),
        np.str_("Ωmega 𝄞"),
    ],
    ids=repr,
)
def test_numbers_of_numpy_are_plain_data(tmp_path: Path, number: np.generic, core: str) -> None:
    """Published files note an accuracy as one, under the module's name of either version of NumPy."""
    path = tmp_path / "a.pth.tar"
    torch.save({"best_acc": number}, path, pickle_protocol=2, _use_new_zipfile_serialization=False)
    content, count = re.subn(rb"numpy\._?core\.", f"numpy.{core}.".encode(), path.read_bytes())
    assert count == 1
    path.write_bytes(content)
    found = archive.read(path)["best_acc"]
    assert found == number and type(found) is type(number.item())  # which can be saved again


class Pickled:
    """Is pickled as a call of a function, and a state that its result is given."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


SCALAR = np.float64(0).__reduce__()[0]
ARRAY = np.zeros(1).__reduce__()[0]


def test_a_state_of_a_type_of_numpy_is_not_believed(tmp_path: Path) -> None:
    """Flags that NumPy itself would follow to an object where there is none, and end the process."""
    path = tmp_path / "a.pth.tar"
    kind = Pickled(np.dtype, ("f8", False, True), (3, ">", None, None, None, -1, -1, 63))
    torch.save({"best_acc": Pickled(SCALAR, (kind, np.array([71.5], ">f8").tobytes()))}, path)
    assert archive.read(path)["best_acc"] == 71.5


@pytest.mark.parametrize("name", ["O8", "V8", "V2000000000", "S5", "M8[s]", "f8,f8"])
def test_other_types_of_numpy_are_refused(tmp_path: Path, name: str) -> None:
    """Alone and as an array; the line says which type it is."""
    path = tmp_path / "a.pth.tar"
    kind = Pickled(np.dtype, (name, False, True))
    array = Pickled(ARRAY, (np.ndarray, (0,), b"b"), (1, (1,), kind, False, bytes(8)))
    for value in (Pickled(SCALAR, (kind, bytes(8))), array):
        torch.save({"x": value}, path)
        with pytest.raises(UserError) as error:
            archive.read(path)
        assert f"refused, because it holds a NumPy value of type {name} and not only" in message(error)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        np.arange(3, dtype=">i4"),
        np.array(2**31, dtype=np.uint32),
        np.zeros((0, 2), dtype=np.int8),
    ],
)
def test_arrays_of_numpy_become_tensors(tmp_path: Path, array: np.ndarray) -> None:
    """State dicts of other programs, and NumPy's random state."""
    path = tmp_path / "a.pth.tar"
    torch.save({"rng": ("MT19937", [array]), "same": {"array": array}}, path)
    payload = archive.read(path)
    found = payload["rng"][1][0]
    assert found.shape == array.shape and np.array_equal(found.numpy(), array)
    assert found.dtype == torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).dtype
    found.fill_(1)  # its memory is its own
    archive.save(tmp_path / "again.pth.tar", payload)


def test_options_of_a_program_become_a_dict(tmp_path: Path) -> None:
    """Training scripts keep their arguments beside the weights; parts that refer to each other end."""
    path = tmp_path / "a.pth.tar"
    options = argparse.Namespace(lr=0.1, more=argparse.Namespace(name="x"))
    options.own = options
    nested: list[Any] = []
    for _ in range(60):
        nested = [nested, nested]
    torch.save({"args": options, "model": {"w": torch.ones(1)}, "nested": nested}, path)
    payload = archive.read(path)
    assert payload["args"]["lr"] == 0.1 and payload["args"]["more"] == {"name": "x"}
    assert payload["args"]["own"] is payload["args"]
    assert payload["nested"][0][1] is payload["nested"][1][0]


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


# --- beside the training ----------------------------------------------------------------------


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
