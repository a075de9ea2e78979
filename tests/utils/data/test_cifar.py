"""CIFAR from its own files: reading, unpacking, downloading, and what is refused."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import pickle
import shutil
import socket
import subprocess
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from tests import ROOT
from tests.utils.data.helpers import pixels, read, resized, validation
from utils.config.schema import DataConfig
from utils.data.loader import epoch_order
from utils.data.sources import open_data
from utils.errors import UserError


class OldPickler(pickle.Pickler):
    """Writes a byte array's type as the NumPy of 2009 did, which wrote the CIFAR files."""

    def reducer_override(self, obj: object) -> object:
        """Describe a type as (function, arguments, state); leave everything else alone."""
        if isinstance(obj, np.dtype):
            return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)
        return NotImplemented


def dump(path: Path, entry: dict[str, object]) -> list[str]:
    """Write one file of a CIFAR set; return its name and checksum as torchvision lists them."""
    buffer = io.BytesIO()
    OldPickler(buffer, protocol=2).dump(entry)
    path.write_bytes(buffer.getvalue())
    return [path.name, hashlib.md5(buffer.getvalue()).hexdigest()]


def write_cifar(root: Path, kind: type[CIFAR10], monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Write a small set in CIFAR's own format and give torchvision its checksums.

    Returns:
        `train` and `test`, uint8 [n, 3, 32, 32], and their classes, `train_target` and `test_target`.
    """
    rng = np.random.default_rng(0)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    classes, key = (100, "fine_labels") if kind is CIFAR100 else (10, "labels")
    written: dict[str, np.ndarray] = {}
    for part, listed in (("train", "train_list"), ("test", "test_list")):
        names = [name for name, _ in (kind.train_list if part == "train" else kind.test_list)]
        data = rng.integers(0, 256, (len(names), 20, 3072), dtype=np.uint8)
        target = rng.integers(0, classes, (len(names), 20))
        entries = [
            dump(folder / name, {"data": rows, key: labels.tolist(), "batch_label": name})
            for name, rows, labels in zip(names, data, target, strict=True)
        ]
        monkeypatch.setattr(kind, listed, entries)
        written[part] = data.reshape(-1, 3, 32, 32)
        written[f"{part}_target"] = target.reshape(-1)
    meta = dump(folder / kind.meta["filename"], {kind.meta["key"]: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": meta[1]})
    return written


CIFAR_SETS = [
    pytest.param("cifar10", CIFAR10, 10, 100, id="cifar10"),
    pytest.param("cifar100", CIFAR100, 100, 20, id="cifar100"),
]


@pytest.mark.parametrize(("name", "kind", "classes", "samples"), CIFAR_SETS)
def test_cifar_is_read_from_its_own_files(
    name: str,
    kind: type[CIFAR10],
    classes: int,
    samples: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = write_cifar(tmp_path, kind, monkeypatch)
    config = DataConfig(
        dataset=name, root=tmp_path, num_classes=classes, batch_size=samples, val_batch_size=8
    )
    loaders = open_data(config)
    assert (loaders.train.samples, validation(loaders).samples) == (samples, 20)
    images, target = (torch.cat(parts) for parts in zip(*validation(loaders), strict=True))
    np.testing.assert_array_equal(target.numpy(), written["test_target"])
    np.testing.assert_allclose(pixels(images, loaders), written["test"], atol=1e-3)
    # Training: the same pixels as in the file, cropped and flipped.
    [(images, target)] = read(loaders.train, 5)
    order = epoch_order(samples, config.seed, 5).numpy()
    np.testing.assert_array_equal(target.numpy(), written["train_target"][order])
    actual = pixels(images, loaders)
    padded = np.pad(written["train"][order], ((0, 0), (0, 0), (4, 4), (4, 4)), mode="reflect")
    for image, wide in zip(actual, padded, strict=True):
        crops = np.lib.stride_tricks.sliding_window_view(wide, (3, 32, 32))[0].reshape(-1, 3, 32, 32)
        candidates = np.concatenate([crops, crops[..., ::-1]])
        assert np.abs(candidates - image).max(axis=(1, 2, 3)).min() < 1e-3


def test_cifar_is_resized_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_cifar(tmp_path, CIFAR10, monkeypatch)
    loaders = open_data(
        DataConfig(dataset="cifar10", root=tmp_path, input_size=48, batch_size=10, val_batch_size=20)
    )
    assert next(iter(loaders.train))[0].shape == (10, 3, 48, 48)
    [(images, _)] = validation(loaders)
    for before, after in zip(written["test"][0], pixels(images, loaders)[0], strict=True):
        expected = resized(before, (48, 48), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(after, expected, atol=1e-2)


def test_cifar_archive_that_was_put_into_the_root_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path / "elsewhere", CIFAR10, monkeypatch)
    root = tmp_path / "root"
    root.mkdir()
    archive = root / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "elsewhere" / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", (tmp_path / "no-such-server").as_uri())
    assert open_data(DataConfig(dataset="cifar10", root=root)).train.samples == 100


def test_cifar_that_cannot_be_downloaded_says_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CIFAR10, "url", (tmp_path / "no-such-server").as_uri())
    with pytest.raises(UserError) as caught:
        open_data(DataConfig(dataset="cifar10"))
    message = str(caught.value)
    for part in (
        "data/cifar-10-batches-py",
        "download failed",
        CIFAR10.url,
        "put it at data/cifar-10-python.tar.gz",
    ):
        assert part in message


PROCESS = """
import hashlib, sys
from pathlib import Path
from torchvision.datasets import CIFAR10
from utils.config.schema import DataConfig
from utils.data.sources import open_data

root = Path(sys.argv[1])
CIFAR10.train_list, CIFAR10.test_list, CIFAR10.meta = eval(sys.argv[2])
CIFAR10.tgz_md5 = hashlib.md5((root / CIFAR10.filename).read_bytes()).hexdigest()
print("ready", flush=True)
sys.stdin.readline()
print(open_data(DataConfig(dataset="cifar10", root=root)).train.samples)
"""


def test_cifar_is_unpacked_by_one_of_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interpreter: str
) -> None:
    """The others wait for it, and do not unpack it again."""
    write_cifar(tmp_path / "elsewhere", CIFAR10, monkeypatch)
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / CIFAR10.filename, "w:gz") as file:
        file.add(tmp_path / "elsewhere" / CIFAR10.base_folder, CIFAR10.base_folder)
    lists = repr((CIFAR10.train_list, CIFAR10.test_list, CIFAR10.meta))
    others = [
        subprocess.Popen(
            [interpreter, "-c", PROCESS, root, lists], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    for other in others:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
    folder = root / CIFAR10.base_folder
    lock = root / ".lock"
    handle = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as the one that unpacks
    for other in others:
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()
    deadline = time.monotonic() + 60
    while sum(f"{lock.stat().st_ino} " in line and "->" in line for line in locks()) < 2:
        assert all(other.poll() is None for other in others) and time.monotonic() < deadline
        time.sleep(0.02)
    assert not folder.exists()
    shutil.copytree(tmp_path / "elsewhere" / CIFAR10.base_folder, folder)
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (root / CIFAR10.filename).unlink()
    os.close(handle)
    for other in others:
        assert other.communicate(timeout=60) == ("100\n", "")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written


def locks() -> list[str]:
    """The locks of all processes; those that are waited for have an arrow."""
    return Path("/proc/locks").read_text().splitlines()


def test_a_server_that_is_silent_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.data.download.PATIENCE", 0.1)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.getsockname()[1]}/{CIFAR10.filename}")
        end = threading.Timer(60, server.close)  # should it be waited for after all
        end.start()
        with pytest.raises(UserError, match=r"the download failed: .*timed out"):
            open_data(DataConfig(dataset="cifar10", root=tmp_path))
        end.cancel()
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("archived", [False, True])
def test_cifar_with_a_cut_archive_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archived: bool
) -> None:
    """Whether its checksum shows it or, not known, unpacking does."""
    write_cifar(tmp_path / "elsewhere", CIFAR10, monkeypatch)
    archive = tmp_path / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / "elsewhere" / CIFAR10.base_folder, CIFAR10.base_folder)
    archive.write_bytes(archive.read_bytes()[:-5000])
    if archived:
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", (tmp_path / "no-such-server").as_uri())
    with pytest.raises(UserError, match=f"{archive} is damaged, and .* put it at {archive}"):
        open_data(DataConfig(dataset="cifar10", root=tmp_path))


@pytest.mark.parametrize("blocked", ["root", "folder"])
def test_a_place_that_cifar_cannot_use_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocked: str
) -> None:
    """Neither the archive nor a download is to blame. A file in the way stands for what may not be written."""
    write_cifar(tmp_path / "elsewhere", CIFAR10, monkeypatch)
    monkeypatch.chdir(tmp_path)
    place = Path("data")
    if blocked == "folder":
        place.mkdir()
        archive = place / CIFAR10.filename
        with tarfile.open(archive, "w:gz") as file:
            file.add(tmp_path / "elsewhere" / CIFAR10.base_folder, CIFAR10.base_folder)
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
        place /= CIFAR10.base_folder
    place.touch()
    with pytest.raises(UserError, match=f"^cannot use {place}.*: .*; check --root and its permissions$"):
        open_data(DataConfig(dataset="cifar10"))


def test_cifar_with_a_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, CIFAR10, monkeypatch)
    with (tmp_path / CIFAR10.base_folder / "data_batch_3").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"checksums differ.*remove that folder if .* download http"):
        open_data(DataConfig(dataset="cifar10", root=tmp_path))
    archive = tmp_path / CIFAR10.filename
    archive.touch()
    with pytest.raises(
        UserError, match=f"checksums differ.*remove that folder; the next start unpacks {archive}"
    ):
        open_data(DataConfig(dataset="cifar10", root=tmp_path))
