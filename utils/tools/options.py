"""The command line of tools.py as one record, and checks that its words share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line; None or False where an option was not given."""

    old: Path | None = None
    new: Path | None = None
    mf: Path | None = None
    mt: Path | None = None
    new_mf: Path | None = None
    new_mt: Path | None = None
    root: Path | None = None
    verbose_list: str | None = None
    workers: int | None = None
    threads: int | None = None
    runs: tuple[Path, ...] | None = None
    images: tuple[Path, ...] | None = None
    files: tuple[Path, ...] | None = None
    source: str | None = None
    to: str | None = None
    max_side: int | None = None
    val_split: float | None = None
    quality: int | None = None
    shard_size: int | None = None
    topk: int | None = None
    reference: Path | None = None
    batch_size: int | None = None
    keyword_file: str | None = None
    ema_weights: bool = False
    uint8_input: bool = False
    int8_sums: bool = False
    int8_weights: bool = False
    bits: tuple[int, ...] | None = None
    samples: int | None = None
    budget_size: str | None = None
    budget_bops: str | None = None
    engine: str | None = None
    output: Path | None = None
    num_classes: int | None = None
    fake_size: int | None = None
    image_size: tuple[int, int] | None = None
    force: bool = False
    raw: bool = False
    earlier_names: bool = False


def given_path(path: Path | None) -> Path:
    """The path of an option that the word needs; `parse` has checked that it is given."""
    if path is None:
        raise TypeError("an option that the word needs is not declared in tools.WORDS")
    return path


def refuse_pipes(*paths: Path | None) -> None:
    """Refuse a path that is neither file nor folder: reading a pipe might never end."""
    for path in paths:
        if path is not None and path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is a pipe or a device: name a file")


def refuse_existing(options: Options, *paths: Path | None) -> None:
    """Refuse, before any work, to write over an existing file without --force."""
    for path in paths:
        if path is not None and os.path.lexists(path) and not options.force:
            raise UserError(f"{path} exists; --force writes over it")


def check_json_output(options: Options) -> None:
    """Refuse, before any work, an --output that is no new .json file in a folder that exists."""
    path = options.output
    if path is not None:
        if path.suffix != ".json" or not path.parent.is_dir():
            raise UserError(f"--output {path}: name a .json file in a folder that exists")
        refuse_existing(options, path)
