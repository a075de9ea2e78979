"""Comparing the processes of a run at its start: processes that differ would wait for each other or train nonsense."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.config import keyword
from utils.config.recorded import to_dict
from utils.config.schema import Config
from utils.errors import UserError
from utils.processes import distributed
from utils.processes.interrupt import ends_at_once
from utils.text import printable, some_names

# Fields of the configuration that may differ: places, the paths of files, how fast images are read, what is shown. What
# the paths lead to is compared where every process reads it.
MAY_DIFFER = (
    "data.class_weight_values", "data.class_weights", "data.rank", "data.root", "data.workers",
    "devices.distributed", "devices.ids", "devices.rank", "devices.world_size", "loss.distill.pretrained",
    "run.keyword_file", "run.log_dir", "run.pretrained", "run.reference", "run.resume_file", "run.verbose",
    "run.weights_dir", "keywords", "origins", "warnings",
)  # fmt: skip
PACKAGES = ("torch", "torchvision", "timm")  # they compute, draw numbers and define networks
_SHOWN = 3  # fields in the message
_WIDTH = 60  # characters of a value in the message
_MISSING = "nothing"


def check_agreement(make: Callable[[], Mapping[str, str]]) -> None:
    """Compare the fields that `make` returns in every process; a run of one process does not call it.

    Raises:
        UserError: in all processes, when a field differs; names the fields, the values and the processes.
    """
    if distributed.alone():
        return
    fields = dict(make())
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    with ends_at_once():  # another process may take long, to list its images for example
        if len(set(distributed.gathered(digest))) == 1:
            return
        everyone = distributed.gathered(fields)
    names = [name for name in dict.fromkeys(name for each in everyone for name in each)]
    found = [
        f"{name} ({differing_values([each.get(name, _MISSING) for each in everyone])})"
        for name in names
        if len({each.get(name) for each in everyone}) > 1
    ]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise UserError(
        f"the processes differ in {', '.join(found[:_SHOWN])}{more}: start all of them with the same options, program "
        "and files"
    )


def run_fields(config: Config, device: str) -> dict[str, str]:
    """The program, the versions of its libraries and the configuration, to be compared.

    Args:
        config: the run's.
        device: kind of this process's device, such as `cuda`.
    """
    root = Path(__file__).resolve().parents[2]
    own = ", ".join(map(file_digest, keyword.loaded_files()))
    return {
        **code_digests(root),
        "--keyword_file": own or _MISSING,
        **_versions(),
        "device": device,
        **_flat(to_dict(config)),
    }


def code_digests(root: Path) -> dict[str, str]:
    """The files of the program below a folder, each with its digest."""
    paths = [root / "main.py", *sorted(root.glob("utils/**/*.py")), *sorted(root.glob("model/**/*.py"))]
    return {str(path.relative_to(root)): file_digest(path) for path in paths if path.is_file()}


def file_digest(path: str | os.PathLike[str] | None) -> str:
    """The beginning of a file's SHA-256; that there is none for None."""
    if path is None:
        return _MISSING
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[f"version of {package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[f"version of {package}"] = _MISSING
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names and the texts of their values, without those that may differ."""
    found: dict[str, str] = {}
    for name, value in values.items():
        field = prefix + name
        if field in MAY_DIFFER:
            continue
        if isinstance(value, dict):
            found |= _flat(value, f"{field}.")
        else:
            found[field] = str(value)
    return found


def differing_values(values: list[str]) -> str:
    """Each value with the processes that have it; of long ones, the part where they begin to differ."""
    columns = zip(*values, strict=False)
    same = next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, values)))
    start = max(0, same - _WIDTH // 2) if max(map(len, values)) > _WIDTH else 0
    parts = []
    for value in dict.fromkeys(values):
        ranks = [str(rank) for rank, other in enumerate(values) if other == value]
        text = printable(value[start : start + _WIDTH])
        shown = f"{'...' * (start > 0)}{text}{'...' * (len(value) > start + _WIDTH)}"
        parts.append(f"{shown or 'empty'} in process{'es' * (len(ranks) > 1)} {some_names(ranks)}")
    return "; ".join(parts)
