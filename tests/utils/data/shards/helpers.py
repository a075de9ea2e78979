"""Small sets of images as people have them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from utils.data.images import Images
from utils.data.shards.index import Manifest
from utils.data.shards.origin import open_origin
from utils.data.shards.write import Reduction, write_set

WNIDS = ("n01", "n02", "n03")
TRUTH = (3, 1, 2, 2, 1, 3)  # the challenge's numbers of classes, of its validation images


def picture(seed: int, size: tuple[int, int] = (40, 30), form: str = "JPEG", mode: str = "RGB") -> bytes:
    """An image file of coarse blocks."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).convert(mode).save(file, form)
    return file.getvalue()


def tar_of(members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], mode: str = "w") -> bytes:
    """A tar file with these members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items() if isinstance(members, Mapping) else members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def sample(key: str, label: int, seed: int = 0) -> list[tuple[str, bytes]]:
    """The two members of a sample."""
    return [(f"{key}.jpg", picture(seed)), (f"{key}.cls", str(label).encode())]


def devkit(truth: Sequence[int] = TRUTH, wnids: Sequence[str] = WNIDS) -> bytes:
    """A devkit of the challenge's structure; classes are numbered against the order of their names, with a parent."""
    names = [*reversed(wnids), "n00"]
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "f8")]
    synsets = np.zeros((len(names), 1), kinds)
    for i, name in enumerate(names):
        synsets[i, 0] = (i + 1, name, "", "", 3 if name == "n00" else 0)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    base = "ILSVRC2012_devkit_t12/data"
    lines = "".join(f"{number}\n" for number in truth)
    return tar_of(
        {
            f"{base}/meta.mat": meta.getvalue(),
            f"{base}/ILSVRC2012_validation_ground_truth.txt": lines.encode(),
        },
        "w:gz",
    )


def write_challenge(folder: Path, *, images: int = len(TRUTH), kit: bytes | None = None) -> None:
    """Archives of the challenge's structure: four training images of each class, and validation images."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = {
        f"{name}.tar": tar_of({f"{name}_{i}.JPEG": picture(10 * n + i) for i in range(4)})
        for n, name in enumerate(WNIDS)
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(classes))
    val = {f"ILSVRC2012_val_{i:08}.JPEG": picture(100 + i) for i in range(1, images + 1)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(val))
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit() if kit is None else kit)


def make(
    source: Path | str,
    folder: Path,
    *,
    per_shard: int = 7,
    reduction: Reduction | None = None,
    force: bool = False,
) -> Manifest:
    """Write shards of a source."""
    return write_set(
        open_origin(source), folder, per_shard=per_shard, reduction=reduction, threads=2, force=force
    )


def pairs(images: Images) -> list[tuple[bytes, str]]:
    """Files and classes' names of a set, sorted."""
    return sorted((images.read(i), images.classes[images.target[i]]) for i in range(len(images)))
