"""What `make-shards` reads from, found out by looking at it."""

from __future__ import annotations

from pathlib import Path

from utils.data.image_folder import check_folders
from utils.data.images import Images
from utils.data.shards.archives import archives_in, open_archives
from utils.data.shards.files import url_of
from utils.data.shards.images import is_pattern, is_shards, open_shards
from utils.data.shards.tables import open_csv, open_parquet
from utils.data.split import split_folder, split_shards
from utils.errors import UserError

FORMS = (
    "a folder with train/ and val/, ImageNet's archives with the devkit, Parquet files, a CSV file beside its images, "
    "or shards"
)


def open_origin(place: Path | str, val_split: float | None = None) -> dict[str, Images]:
    """The parts of a set of images, `train`, `val` or both, wherever they lie.

    Args:
        place: folder, file, URL, or the names of tar files with `{000..127}` in them.
        val_split: the share of each class that becomes `val`, of a folder or shards without; see `split_folder`.

    Raises:
        UserError: it is none of the forms that are known, or a faulty one.
    """
    if val_split is not None and (kind := _with_parts_of_its_own(Path(place))):
        raise UserError(
            f"--val_split {val_split:g}: {place} is {kind}: leave it out, or split what they hold yourself"
        )
    if val_split is not None and is_shards(Path(place)):
        return dict(split_shards(place, val_split))
    if val_split is not None:
        return dict(split_folder(Path(place), "folder", val_split))
    if url_of(place) or is_pattern(place):
        return dict(open_shards(place))
    path = Path(place)
    if path.suffix.lower() == ".csv" and path.is_file():
        return open_csv(path)
    if path.suffix.lower() == ".parquet" and path.is_file():
        return open_parquet([path])
    if not path.is_dir():
        raise UserError(f"--from {path}: no such folder or file; it may be {FORMS}")
    if tables := sorted(path.glob("*.parquet")):
        return open_parquet(tables)
    if found := archives_in(path):
        return open_archives(found, path)
    if is_shards(path):
        return dict(open_shards(path))
    if (path / "train").is_dir() or (path / "val").is_dir():
        parts = {name: (path / name).is_dir() for name in ("train", "val")}
        return dict(check_folders(path, "imagenet", **parts))
    raise UserError(
        f"--from {path}: no images are found so; it may be {FORMS}; class folders alone need --val_split 0.1"
    )


def _with_parts_of_its_own(place: Path) -> str:
    """What a place is that says itself which images are for validation; empty for all others."""
    if place.suffix.lower() in (".csv", ".parquet") and place.is_file():
        return "a table"
    if place.is_dir() and any(place.glob("*.parquet")):
        return "a folder of tables"
    return "a folder of ImageNet's archives" if place.is_dir() and archives_in(place) else ""
