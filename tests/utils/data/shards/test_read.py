"""Shards of ours and of others, read by us and by others; and shards that are damaged."""

from __future__ import annotations

import functools
import http.server
import io
import json
import pickle
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tools
from tests.utils.data.helpers import read, same, validation
from tests.utils.data.shards.helpers import pairs, sample, tar_of
from utils.config.schema import DataConfig
from utils.data.shards.files import url_of
from utils.data.shards.images import cache_folder, is_shards, open_shards, part_of
from utils.data.shards.index import ENTRY, scan
from utils.data.sources import check_data, open_data
from utils.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copy(shards: DataConfig, tmp_path: Path) -> DataConfig:
    """Shards that a test may damage."""
    assert shards.root is not None
    return replace(shards, root=shutil.copytree(shards.root, tmp_path / "copy"))


def test_validation_is_that_of_the_folder(shards: DataConfig, imagenet: DataConfig) -> None:
    """Through DALI too, which finds out what the root is."""
    ours, folders = open_data(shards), open_data(imagenet)
    assert same(read(validation(ours)), read(validation(folders)))
    assert ours.classes == folders.classes and ours.resize_ratio == folders.resize_ratio
    assert same(read(open_data(replace(shards, dataset="imagenet")).train), read(ours.train))


def test_dali_decodes_shards(shards: DataConfig, dali: DataConfig) -> None:
    one, two = open_data(replace(shards, dataset="dali")), open_data(dali)
    assert same(read(validation(one)), read(validation(two)))
    classes = [target for _, target in read(one.train, 3)]
    assert all(map(torch.equal, classes, [target for _, target in read(open_data(shards).train, 3)]))


def test_worker_processes_read_the_same(shards: DataConfig) -> None:
    expected = read(open_data(shards).train, 2)
    assert same(read(open_data(replace(shards, workers=2)).train, 2), expected)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves files to the garbage collector
def test_webdataset_reads_our_shards(shards: DataConfig) -> None:
    wds = pytest.importorskip("webdataset")
    for part, images in open_shards(shards.root).items():
        urls = [str(shards.root / shard.file) for shard in images.shards]
        found = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))
        assert [entry["jpg"] for entry in found] == [images.read(i) for i in range(len(images))]
        assert [int(entry["cls"]) for entry in found] == images.target.tolist()
        assert [entry["__key__"] for entry in found] == [images.key(i) for i in range(len(images))], part


def test_dali_reads_our_shards_by_itself(shards: DataConfig, installed: None) -> None:
    from nvidia.dali import fn, pipeline_def

    images = open_shards(shards.root)["val"]

    @pipeline_def(batch_size=len(images), num_threads=1, device_id=None)
    def pipe():  # type: ignore[no-untyped-def]  # DALI asks for its graph
        paths = [str(shards.root / shard.file) for shard in images.shards]
        return tuple(
            fn.readers.webdataset(paths=paths, ext=["jpg", "cls"], missing_component_behavior="error")
        )

    built = pipe()
    built.build()
    files, classes = built.run()
    assert [bytes(np.array(files.at(i))) for i in range(len(images))] == [
        images.read(i) for i in range(len(images))
    ]
    assert [int(bytes(np.array(classes.at(i)))) for i in range(len(images))] == images.target.tolist()


def test_shards_of_others_are_indexed_once(tmp_path: Path, cache: Path) -> None:
    """Written by the webdataset library, with more members, in two forms of naming them."""
    wds = pytest.importorskip("webdataset")
    folder = tmp_path / "others"
    folder.mkdir()
    for part, count in (("train", 5), ("val", 3)):
        with wds.ShardWriter(str(folder / f"set-{part}-%04d.tar"), maxcount=2, verbose=0) as sink:
            for i in range(count):
                data = dict(sample(f"k{i}", i % 2, seed=i))[f"k{i}.jpg"]
                sink.write({"__key__": f"k{i}", "jpg": data, "cls": i % 2, "json": {"width": 40}})
    assert is_shards(folder)
    found = open_shards(folder)
    assert found["train"].target.tolist() == [0, 1, 0, 1, 0] and found["val"].classes == ("0", "1")
    assert [len(found["train"].read(i)) for i in range(5)] == [
        len(dict(sample("k", 0, seed=i))["k.jpg"]) for i in range(5)
    ]
    (one, two) = sorted(cache.rglob("*.npy"))
    times = [path.stat().st_mtime_ns for path in (one, two)]
    pattern = open_shards(f"{folder}/set-{{train-{{0000..0002}},val-{{0000..0001}}}}.tar")
    assert {part: pairs(images) for part, images in pattern.items()} == {
        part: pairs(images) for part, images in found.items()
    }
    assert [path.stat().st_mtime_ns for path in sorted(cache.rglob("*.npy"))] == times
    one.write_bytes(b"damaged")
    assert pairs(open_shards(folder)["train"]) == pairs(found["train"])
    (folder / "set-train-0000.tar").write_bytes(tar_of(sample("other", 1)))
    assert len(open_shards(folder)["train"]) == 4


def test_parts_by_name() -> None:
    names = (
        "train/0.tar",
        "imagenet-train-01.tar",
        "x_validation_3.tar",
        "test.tar",
        "latest.tar",
        "train-val.tar",
    )
    assert [part_of(name) for name in names] == ["train", "train", "val", "test", "", ""]


def test_an_index_of_a_million_samples(tmp_path: Path) -> None:
    """Opened without reading a shard, in a few dozen bytes a sample."""
    count, shards = 1_000_000, 500
    entries = np.zeros(count, ENTRY)
    entries["shard"] = np.arange(count) // 2000
    entries["offset"], entries["size"] = 512 + 1024 * (np.arange(count) % 2000), 100
    entries["label"], entries["kind"] = np.arange(count) % 1000, b"jpg"
    np.save(tmp_path / "train.index.npy", entries)
    listed = []
    for i in range(shards):
        listed.append({"file": f"train-{i:06}.tar", "samples": 2000, "bytes": 2048 * 1024, "sha256": ""})
        with (tmp_path / f"train-{i:06}.tar").open("wb") as file:
            file.truncate(2048 * 1024)
    manifest = {
        "version": 1,
        "classes": [str(i) for i in range(1000)],
        "max_side": 0,
        "quality": 0,
        "parts": {"train": listed},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    images = open_shards(tmp_path)["train"]
    assert len(images) == count and images.identity()["files"]
    assert (images._entries.nbytes + images.target.nbytes) / count < 100


# ---- damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def other(path: Path) -> None:
    """A file of the same size whose samples lie elsewhere."""
    path.write_bytes(bytes(512) + path.read_bytes()[:-512])


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("train-000001.tar", Path.unlink, r"the shard .*train-000001.tar cannot be read \(No such file"),
        ("train-000001.tar", truncate, r"the shard .*train-000001.tar is truncated: \d+ bytes instead of \d+"),
        ("val-000000.tar", lambda p: p.write_bytes(p.read_bytes() * 2), r"val-000000.tar has changed: \d+ bytes"),
        ("train.index.npy", Path.unlink, r"train.index.npy is missing: make the shards again"),
        ("train.index.npy", lambda p: p.write_bytes(b"x"), r"train.index.npy is damaged"),
        ("train.index.npy", lambda p: np.save(p, np.zeros(18, ENTRY)), r"is damaged or belongs to other shards"),
        ("train.index.npy", lambda p: np.save(p, np.zeros(18)), r"is damaged or belongs to other shards"),
        ("manifest.json", lambda p: p.write_text("{"), r"manifest.json is damaged: make the shards again"),
        ("manifest.json", lambda p: p.write_text("[]"), r"manifest.json is damaged"),
        ("manifest.json", lambda p: p.write_text('{"version": 1}'), r"manifest.json is damaged"),
        ("manifest.json", lambda p: p.write_text('{"version": 9}'), r"has version 9, and this program reads 1"),
        ("manifest.json", lambda p: p.write_text(p.read_text().replace("train-000000", "../000000")), r"is damaged"),
    ],
)  # fmt: skip
def test_damage_is_found_at_the_start(
    name: str, damage: Callable[[Path], object], reason: str, copy: DataConfig
) -> None:
    damage(copy.root / name)
    with pytest.raises(UserError, match=reason) as caught:
        check_data(copy)
    assert "\n" not in str(caught.value)


def test_a_shard_that_changes_is_found_when_it_is_read(copy: DataConfig) -> None:
    other(copy.root / "val-000000.tar")
    with pytest.raises(
        UserError, match=r"cannot read the image .*val-000000.tar: .*val-000000.tar has changed since"
    ):
        read(validation(open_data(copy)))
    with pytest.raises(UserError, match=r"has changed since"):
        read(validation(open_data(replace(copy, workers=1))))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([*sample("a", 0), *sample("a", 1)], r"a has two members that are its image"),
        ([*sample("a", 0), *sample("b", 1), *sample("a", 1)], r"x.tar: a comes twice"),
        ([("a.jpg", b"x")], r"a has no .cls with the number of its class"),
        ([("a.cls", b"1")], r"a has no image"),
        (sample("a", 999_999_999), r"the class of a is '999999999', not a number below 1,000,000"),
        ([("a.jpg", b"x"), ("a.cls", b"bee")], r"the class of a is 'bee', not a number"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], r"the class of a is '-1'"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"1")], r"a has two members that are its image"),
        ([("a.jpg", b""), ("a.cls", b"1")], r"a.jpg has 0 bytes"),
        ([("a.txt", b"x")], r"has no samples"),
        ([("n01.tar", b"x")], r"make-shards reads other archives"),
    ],
)  # fmt: skip
def test_tar_files_that_are_no_shards(members: list[tuple[str, bytes]], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        scan(io.BytesIO(tar_of(members)), "x.tar")


TWO = tar_of([*sample("a", 0), *sample("b", 1)])
SECOND = TWO.index(b"b.jpg")  # where its header begins


@pytest.mark.parametrize(
    "data",
    [
        b"", b"no tar file" * 100, tar_of(sample("a", 0))[:1500],
        TWO[:SECOND], TWO[: SECOND + 100], TWO[: SECOND + 50] + b"\1" + TWO[SECOND + 51 :],
    ],
    ids=["empty", "text", "data", "member", "header", "checksum"],
)  # fmt: skip
def test_no_tar_file_or_a_part_of_one(data: bytes) -> None:
    """tarfile itself ends without a word where a header is damaged or the rest is missing."""
    assert len(scan(io.BytesIO(TWO), "x.tar")) == 2
    with pytest.raises(UserError, match=r"x.tar"):
        scan(io.BytesIO(data), "x.tar")


def test_roots_that_are_no_shards(imagenet: DataConfig, shards: DataConfig, tmp_path: Path) -> None:
    for root, reason in (
        (imagenet.root, r"has neither manifest.json nor tar files"),
        (tmp_path / "nowhere", r"No such file or directory: name a folder of shards"),
        (tmp_path / "train-{000..001}.tar", r"the shard .*train-000.tar cannot be read: No such file"),
        (tmp_path / "{train.tar", r"--root .*\{train.tar"),
        (Path("nothing://somewhere"), r"--root nothing://somewhere: "),
    ):
        with pytest.raises(UserError, match=reason):
            check_data(replace(shards, root=root))
    for dataset in ("shards", "imagenet", "dali"):
        with pytest.raises(UserError, match=r"--val_split 0.2: .* has shards for validation; leave it out"):
            check_data(replace(shards, dataset=dataset, val_split=0.2))
    with pytest.raises(
        UserError, match=r"--dataset shards needs --root: a folder that make-shards has written"
    ):
        check_data(replace(shards, root=None))
    (tmp_path / "0.tar").write_bytes(tar_of(sample("a", 0)))
    with pytest.raises(
        UserError, match=r"0.tar: for training or for validation\? train, val or test must be in"
    ):
        check_data(replace(shards, root=tmp_path))
    (tmp_path / "0.tar").rename(tmp_path / "train.tar")
    with pytest.raises(
        UserError,
        match=r"has no shards for val: --val_split 0.1 takes some of each class, --val_batch_size 0 ",
    ):
        check_data(replace(shards, root=tmp_path))
    with pytest.raises(UserError, match=r"has 1 classes, not 3: write --num_classes 1"):
        check_data(replace(shards, root=tmp_path, val_batch_size=0))


# ---- elsewhere


class Server(http.server.SimpleHTTPRequestHandler):
    """Answers parts of files, as object storage does."""

    asked: list[tuple[str, str | None]]
    parts = True  # whether it answers parts of files

    def do_GET(self) -> None:
        path, part = Path(self.translate_path(self.path)), self.headers.get("Range") if self.parts else None
        self.asked.append((path.name, part))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        if part is not None:
            first, _, last = part.removeprefix("bytes=").partition("-")
            data = data[int(first) : int(last) + 1 if last else None]
        self.send_response(200 if part is None else 206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def served(copy: DataConfig) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    pytest.importorskip("aiohttp")
    asked: list[tuple[str, str | None]] = []
    handler = functools.partial(type("Handler", (Server,), {"asked": asked}), directory=str(copy.root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def test_shards_behind_a_url(
    served: tuple[str, list[tuple[str, str | None]]], shards: DataConfig, copy: DataConfig
) -> None:
    """The same batches, of which each process asks for its own samples alone."""
    url, asked = served
    remote = replace(shards, root=Path(url), workers=1)  # a path keeps one slash of two
    assert same(read(open_data(remote).train), read(open_data(shards).train))
    names = {name for name, part in asked if part == "bytes=0-"}  # read as a whole
    assert names == {"manifest.json", "train.index.npy", "val.index.npy"}
    images = open_shards(url)["train"]
    asked.clear()
    half = open_data(replace(remote, rank=0, world_size=2, workers=0))
    read(half.train)
    assert len([part for _, part in asked if part not in ("bytes=0-", "bytes=0-511")]) == sum(
        len(t) for _, t in read(half.train)
    )
    assert pickle.loads(pickle.dumps(images)).read(0) == images.read(0)
    (copy.root / "train-000000.tar").unlink()
    with pytest.raises(UserError, match=r"train-000000.tar: FileNotFoundError|train-000000.tar: http"):
        read(half.train)
    with pytest.raises(UserError, match=r"there is no manifest.json, which make-shards writes"):
        open_shards(f"{url}/nowhere")


def test_a_pattern_behind_a_url(served: tuple[str, list[tuple[str, str | None]]], shards: DataConfig) -> None:
    url, _ = served
    found = open_shards(f"{url}/train-{{000000..000002}}.tar")
    assert [data for data, _ in pairs(found["train"])] == [
        data for data, _ in pairs(open_shards(shards.root)["train"])
    ]
    folder = cache_folder()
    assert folder is not None and folder.is_dir()


def test_one_process_of_a_machine_reads_the_headers(
    served: tuple[str, list[tuple[str, str | None]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The others wait and take its index; a file system that refuses the cache costs time alone."""
    url, asked = served
    pattern = f"{url}/train-{{000000..000002}}.tar"

    def parts_of_files() -> dict[str, int]:
        return Counter(name for name, part in asked if part is not None)

    images = open_shards(pattern)["train"]
    alone = parts_of_files()
    assert len(alone) == 3
    asked.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    start = threading.Barrier(4)

    def open_together(_: int) -> list[int]:
        start.wait()
        return open_shards(pattern)["train"].target.tolist()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(open_together, range(4))) == [images.target.tolist()] * 4
    assert parts_of_files() == alone
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_shards(pattern)["train"].target.tolist() == images.target.tolist()


def test_changed_shards_are_listed(copy: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert tools.main(["--keyword", "verify-data", "--root", str(copy.root)]) == 0
    assert capsys.readouterr().out == "5 shards: nothing found\n"
    path = copy.root / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    assert tools.main(["--keyword", "verify-data", "--root", str(copy.root)]) == 1
    assert capsys.readouterr().out == (
        f"{path}: changed: its SHA-256 is not that of the manifest\n5 shards: 1 changed\n"
    )


def test_servers_that_cannot_serve_shards(
    served: tuple[str, list[tuple[str, str | None]]], shards: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = served
    remote = replace(shards, root=Path(url), workers=1)
    for root, reason in (
        (f"{url}/train-{{000..001}}.tar", r"the shard http://.*/train-000.tar cannot be read: "),
        ("http://127.0.0.1:1/shards", r"--root http://127.0.0.1:1/shards cannot be read: "),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            check_data(replace(remote, root=Path(root)))
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(Server, "parts", False)
    with pytest.raises(UserError, match="the server sends a whole file when it is asked for a part"):
        read(open_data(remote).train)


def test_long_names_stay_apart(tmp_path: Path) -> None:
    """Their headers have only a part of the name."""
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for i in range(3):
                for name, data in sample(f"{'x' * 150}{i}", i, seed=i):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        (tmp_path / "train.tar").write_bytes(file.getvalue())
        images = open_shards(tmp_path)["train"]
        assert len({images.name(i) for i in range(3)}) == 3 and images.target.tolist() == [0, 1, 2]
        assert [images.read(i) for i in range(3)] == [dict(sample("k", 0, seed=i))["k.jpg"] for i in range(3)]


def test_tar_files_in_folders_of_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hidden files that systems leave, and for a user without a home."""
    for part in ("train", "val", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "0.tar").write_bytes(tar_of(sample("a", 0)))
    (tmp_path / "train" / "._0.tar").write_bytes(b"x")
    with pytest.raises(UserError, match="has images for val and for test"):
        open_shards(tmp_path)
    (tmp_path / "val" / "0.tar").unlink()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert is_shards(tmp_path) and {part: len(images) for part, images in open_shards(tmp_path).items()} == {
        "train": 1, "val": 1,
    }  # fmt: skip


def test_a_tar_file_beside_folders_is_none_of_the_set(
    folder: Path, imagenet: DataConfig, tmp_path: Path
) -> None:
    root = shutil.copytree(folder, tmp_path / "photos")
    (root / "train-backup.tar").write_bytes(b"x")
    assert not is_shards(root)
    assert len(check_data(replace(imagenet, root=root))["train"]) == 18


def test_urls() -> None:
    for text in ("https://a/b", "s3://a/b", "file:///a/b"):
        assert url_of(text) == url_of(Path(text)) == text
    assert url_of("/a/b") is url_of("a:/b") is url_of("a") is None


def test_shards_without_checksums_are_said_to_be_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train-0.tar").write_bytes(tar_of(sample("a", 0)))
    assert tools.main(["--keyword", "verify-data", "--root", f"{tmp_path}/train-{{0..0}}.tar"]) == 0
    assert capsys.readouterr().out == (
        "1 shard: nothing found; 1 without a checksum, of which only headers and classes were read\n"
    )
