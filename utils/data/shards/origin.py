"""What `make-shards` reads from, found out by looking at it."""

from __future__ import annotations

from pathlib import Path

from utils.data.image_folder import check_folders
from utils.data.images import Images
from utils.data.shards.archives import archives_in, open_archives
from utils.data.shards.files import is_pattern, url_of
from utils.data.shards.images import is_shards, open_shards
from utils.data.shards.tables import open_csv, open_parquet
from utils.data.split import split_folder, split_shards
from utils.errors import UserError

FORMS = (
    "a folder with train/ and val/, ImageNet's archives with the devkit, Parquet files, a CSV file beside its images, "
    "or shards"
)
# Forms that say themselves which images are for validation, as messages call them.
DIVIDED = {"table": "a table", "tables": "a folder of tables", "archives": "a folder of ImageNet's archives"}


def open_origin(place: Path | str, val_split: float | None = None) -> dict[str, Images]:
    """The parts of a set of images, `train`, `val` or both, wherever they lie.

    Args:
        place: folder, file, URL, or the names of tar files with `{000..127}` in them.
        val_split: the share of each class that becomes `val`, of a folder or shards without; see `split_folder`.

    Raises:
        UserError: it is none of the forms that are known, or a faulty one.
    """
    path = Path(place)
    form = "shards" if url_of(place) or is_pattern(place) else _form_of(path)
    if val_split is not None:
        if form in DIVIDED:
            raise UserError(
                f"--val_split {val_split:g}: {place} is {DIVIDED[form]}: leave it out, or split what they hold yourself"
            )
        return dict(
            split_shards(place, val_split) if form == "shards" else split_folder(path, "folder", val_split)
        )
    if form == "archives":
        return open_archives(archives_in(path), path)
    if form == "tables":
        return open_parquet(sorted(path.glob("*.parquet")))
    if form == "table":
        return open_csv(path) if path.suffix.lower() == ".csv" else open_parquet([path])
    if form == "folders":
        return dict(
            check_folders(path, "imagenet", **{name: (path / name).is_dir() for name in ("train", "val")})
        )
    if form == "shards":
        return dict(open_shards(place))
    if not path.is_dir():
        raise UserError(f"--from {path}: no such folder or file; it may be {FORMS}")
    raise UserError(
        f"--from {path}: no images are found so; it may be {FORMS}; class folders alone need --val_split 0.1"
    )


def _form_of(path: Path) -> str:
    """What a path is or holds: `table`, `tables`, `archives`, `shards` or `folders`; empty: nothing known."""
    if path.suffix.lower() in (".csv", ".parquet") and path.is_file():
        return "table"
    if not path.is_dir():
        return ""
    if any(path.glob("*.parquet")):
        return "tables"
    if archives_in(path):
        return "archives"
    if is_shards(path):
        return "shards"
    return "folders" if (path / "train").is_dir() or (path / "val").is_dir() else ""
