"""Files that are no checkpoint: a line that says what each is, and not that it is damaged."""

from __future__ import annotations

import gzip
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.utils.checkpoint.helpers import message
from utils.checkpoint import archive
from utils.checkpoint.case_files import find_pretrained
from utils.errors import UserError

Make = Callable[[Path], object]


def torchscript(path: Path) -> None:
    """An archive with the entries of a TorchScript file."""
    torch.save(nn.Linear(1, 1).state_dict(), path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(f"{path.stem}/constants.pkl", b"")


def exported(path: Path) -> None:
    """An archive with the first entries of one of torch.export."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{path.stem}/archive_format", b"pt2")
        file.writestr(f"{path.stem}/models/model.json", b"{}")


def program(path: Path) -> None:
    """An archive with the entries of a program that export has written."""
    exported(path)
    with zipfile.ZipFile(path, "a") as file:
        for name in ("classes.json", "images.json"):
            file.writestr(f"{path.stem}/extra/{name}", b"[]")


def tar(path: Path) -> None:
    """A tar archive of an empty file."""
    with tarfile.open(path, "w") as file:
        file.addfile(tarfile.TarInfo("a.pth"))


def zipped(path: Path) -> None:
    """A zip archive of a checkpoint."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("folder/a.pth", b"x")


KINDS: dict[str, tuple[str, Make, str]] = {
    "TorchScript": ("a.pt", torchscript, "a TorchScript file, which holds code; if you trust"),
    "torch.export": ("a.pt2", exported, "a program of torch.export"),
    "pickle": ("a.pth", lambda path: path.write_bytes(pickle.dumps({"w": 1})), "a pickle of another program"),
    "web page": ("a.pth", lambda path: path.write_text("\n<!DOCTYPE html><html>"), "a web page"),
    "Git LFS": (
        "a.pth",
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        "a pointer of Git LFS, no PyTorch checkpoint; fetch the file with git lfs pull",
    ),
    "HDF5": ("a.h5", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(90)), "an HDF5 file"),
    "gzip": ("a.gz", lambda path: path.write_bytes(gzip.compress(b"x")), "compressed with gzip; unpack it"),
    "tar": ("a.pth.tar", tar, "a tar archive; unpack it with tar -xf"),
    "zip": ("a.zip", zipped, "a zip archive with 'folder/a.pth' in it; unpack it"),
    "npz": ("a.npz", lambda path: np.savez(path, w=np.ones(2)), "an archive of NumPy arrays"),
    "npy": ("a.npy", lambda path: np.save(path, np.ones(2)), "a NumPy array"),
    "program": ("any.name", program, "a program that export has written, no checkpoint; name the checkpoint"),
    "packed": (
        "any.name",
        lambda path: save_file({"w": torch.ones(2)}, path, {"lowbit": "{}"}),
        "a packed network, no checkpoint: tools.py --keyword import makes one of it",
    ),
    "OpenVINO": (
        "a.xml",
        lambda path: path.write_text("<net/>"),
        "a file of OpenVINO, no PyTorch checkpoint; name",
    ),
    "page": (
        "page",
        lambda path: (path.mkdir(), (path / "network.onnx").touch()),
        "a folder with a page, no checkpoint; name the checkpoint that it was exported from",
    ),
    "ONNX": ("a.onnx", lambda path: path.write_bytes(b"\x08\x07"), "an ONNX file"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_says_what_a_file_is(tmp_path: Path, kind: str) -> None:
    name, make, text = KINDS[kind]
    make(tmp_path / name)
    for mapped in (True, False):
        with pytest.raises(UserError) as error:
            archive.load_archive(tmp_path / name, mapped=mapped)
        assert message(error).startswith(f"{tmp_path / name}: is {text}")
        assert "download it again" not in message(error)


def test_the_folder_of_a_page_is_no_missing_file(tmp_path: Path) -> None:
    KINDS["page"][1](tmp_path / "page")
    with pytest.raises(
        UserError, match=r"^--pretrained .*page is a folder with a page, no checkpoint; name the"
    ):
        find_pretrained(str(tmp_path / "page"), tmp_path, "resnet20")
