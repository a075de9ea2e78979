"""The words of tools.py about folders of images: verify-image, verify-data, make-fake-imagenet."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from utils.errors import UserError
from utils.text import counted, printable
from utils.tools.options import Options, given_path

# Pillow, torch and tqdm are imported where they are used, so that `--help` and mistakes answer at once.

T = TypeVar("T")


def verify_image(options: Options) -> int:
    """Decode every image below --root and list the bad ones."""
    from utils.tools import image_findings  # imports Pillow

    images, bad = 0, 0
    for path, reason in _each_image(options, image_findings.image_error):
        images += 1
        if reason is not None:
            bad += 1
            _tell(path, reason)
    print(f"{images} images, {bad} bad")
    return 1 if bad else 0


def verify_data(options: Options) -> int:
    """Decode every image below --root; list bad ones, odd ones and wrong class folders."""
    remarks = {
        "CMYK",
        "EXIF rotation",
        "alpha",
        "16-bit",
        "not for dali",
        "hidden",
    }  # training does right by them
    try:
        import pyvips  # noqa: F401
    except (ImportError, OSError) as error:
        raise UserError(
            f"verify-data needs pyvips ({error}): pip install pyvips pyvips-binary; verify-image does without"
        ) from error
    from utils.data.shards.images import is_shards
    from utils.tools import image_findings  # imports Pillow

    counts: Counter[str] = Counter()
    images = 0
    root = given_path(options.root)
    if is_shards(root):
        return _verify_shards(root)
    for path, findings in _each_image(options, image_findings.image_findings):
        images += 1
        if path.parent in (root / "train", root / "val"):
            findings.append(("without class", "training passes over images beside the class folders"))
        for kind, reason in findings:
            counts[kind] += 1
            _tell(path, f"{kind}: {reason}")
    for path, what in image_findings.hidden_images(root):
        counts["hidden"] += 1
        _tell(path, f"hidden: {what}, left out of training")
    for path in sorted(image_findings.other_files(root)):
        if form := image_findings.format_of(path):
            counts["mislabelled"] += 1
            _tell(path, f"mislabelled: the file is {form}, training passes over files with this ending")
    if (root / "train").is_dir() or (root / "val").is_dir():
        from utils.data.image_folder import check_folders  # imports torch

        try:
            # An evaluation needs val/ alone.
            check_folders(root, "imagenet", val=True, train=not (root / "val").is_dir())
        except UserError as error:
            counts["class folders"] += 1
            _tell(root, f"class folders: {error}")
    print(f"{images} images: {', '.join(f'{n} {kind}' for kind, n in counts.items()) or 'nothing found'}")
    return 1 if counts.keys() - remarks else 0


def _verify_shards(root: Path) -> int:
    """Compare each shard with its checksum, where its manifest has one."""
    from tqdm import tqdm

    from utils.data.shards.images import open_shards

    shards = [(images.files, shard) for images in open_shards(root).values() for shard in images.shards]
    bad, unknown = 0, sum(not shard.sha256 for _, shard in shards)
    for files, shard in tqdm(shards, unit="shard", disable=None):
        try:
            with files.open(shard.file) as file:
                whole = not shard.sha256 or hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
        except OSError as error:
            raise UserError(f"{files.path(shard.file)} cannot be read: {error.strerror or error}") from error
        if not whole:
            bad += 1
            _tell(Path(files.path(shard.file)), "changed: its SHA-256 is not that of the manifest")
    more = f"; {unknown} without a checksum, of which only headers and classes were read" if unknown else ""
    print(f"{counted(len(shards), 'shard')}: {f'{bad} changed' if bad else 'nothing found'}{more}")
    return 1 if bad else 0


def _tell(path: Path, text: str) -> None:
    """Print a line about a path above the progress bar."""
    from tqdm import tqdm

    tqdm.write(printable(f"{path}: {text}"), file=sys.stdout)


def _each_image(options: Options, look: Callable[[Path], T]) -> Iterator[tuple[Path, T]]:
    """Yield every image below --root and its result of `look`, in --workers processes, with a progress bar."""
    from concurrent.futures.process import BrokenProcessPool

    from tqdm import tqdm

    from utils.data import workers
    from utils.tools import image_findings

    root = given_path(options.root)
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder")
    images = sorted(image_findings.image_files(root))
    if not images:
        raise UserError(
            f"--root {root}: no image below it (files that end in {' '.join(image_findings.IMAGE_ENDINGS)})"
        )
    if options.workers is not None:
        workers.check_workers(options.workers)
    count = min(options.workers or os.cpu_count() or 1, len(images))
    try:
        with workers.pool(count, preload=image_findings.__name__) as pool:
            found = pool.map(look, images, chunksize=min(64, -(-len(images) // count)))
            # disable=None: a bar on a terminal only
            progress = tqdm(found, total=len(images), unit="image", disable=None)
            yield from zip(images, progress, strict=True)
    except BrokenProcessPool as error:
        raise UserError("a decoding process died, out of memory perhaps; try fewer --workers") from error


def make_fake_imagenet(options: Options) -> int:
    """Write a folder of computed JPEG files in ImageNet's layout, the same every time."""
    from tqdm import tqdm

    from utils.data.fake import write_folder  # imports torch

    root, classes, samples = given_path(options.root), options.num_classes or 10, options.fake_size or 400
    width, height = options.image_size or (500, 375)
    if samples < classes:
        raise UserError(f"--fake_size {samples}: {classes} classes need at least {classes} training images")
    for part in (root / "train", root / "val"):
        if os.path.lexists(part):
            raise UserError(f"{part} exists; name another --root, or remove it")
    files = write_folder(root, samples, classes, width, height)
    total = samples + max(classes, samples // 4)
    written = sum(1 for _ in tqdm(files, total=total, unit="image", disable=None))
    print(f"{root}: {written} images of {classes} classes, {width}x{height} pixels")
    return 0
