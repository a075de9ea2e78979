"""Names of a state dict's entries: mapping files of old and new names, and renaming by them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.text import closest

if TYPE_CHECKING:
    from torch import Tensor


def read_names(path: Path) -> list[tuple[int, list[str]]]:
    """The lines of a mapping file that hold names: the line's number and its names, braces expanded in order.

    `layer1.{conv1,bn1}.weight` stands for two names; several brace lists in a line give every combination,
    the last one varying fastest. Blank lines and text after a `#` are ignored. Raises UserError when the file
    cannot be read or a brace has no partner.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file; a mapping file has one name per line") from error
    lines: list[tuple[int, list[str]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        parts = re.split(r"\{([^{}]*)\}", content)  # outside, inside, outside, ...
        if any(brace in part for part in parts[::2] for brace in "{}"):
            raise UserError(f"{path}, line {number}: a brace without its partner, or one inside another")
        choices = [[part] for part in parts]
        choices[1::2] = [[choice.strip() for choice in part.split(",")] for part in parts[1::2]]
        lines.append((number, ["".join(combination) for combination in itertools.product(*choices)]))
    return lines


def read_pairs(source: Path, target: Path) -> list[tuple[str, str]]:
    """The (old, new) names of two mapping files, paired line by line.

    Raises UserError when a line has no partner or another number of names than its partner, or when a
    name is listed twice in the same file.
    """
    old, new = read_names(source), read_names(target)
    if len(old) != len(new):
        raise UserError(
            f"{source} has {len(old)} lines of names, {target} {len(new)}; they pair line by line"
        )
    pairs: list[tuple[str, str]] = []
    for (old_line, old_names), (new_line, new_names) in zip(old, new, strict=True):
        if len(old_names) != len(new_names):
            raise UserError(
                f"{source}, line {old_line} has {len(old_names)} names, "
                f"{target}, line {new_line} has {len(new_names)}; they pair line by line"
            )
        pairs += zip(old_names, new_names, strict=True)
    if not pairs:
        raise UserError(f"{source}: no names; a mapping file has one name per line")
    for path, column in ((source, [name for name, _ in pairs]), (target, [name for _, name in pairs])):
        seen: set[str] = set()
        for name in column:
            if name in seen:
                raise UserError(f"{path}: {name!r} is listed twice")
            seen.add(name)
    return pairs


def rename(state: dict[str, Tensor], pairs: list[tuple[str, str]], source: str) -> dict[str, Tensor]:
    """Rename the entries of `state` by (old, new) pairs, all at once, keeping the order and all other names.

    Raises UserError for an old name that is not in `state` and for a new name that another entry has.
    """
    new_names = dict(pairs)
    for old in new_names:
        if old not in state:
            raise UserError(f"{old!r} is not in {source}{closest(old, set(state))}")
    renamed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, value in state.items():
        new = new_names.get(name, name)
        if new in renamed:
            raise UserError(f"both {origin[new]!r} and {name!r} would be named {new!r} in the new file")
        renamed[new] = value
        origin[new] = name
    return renamed


def natural_order(name: str) -> list[tuple[int, int | str]]:
    """A sorting key that puts layer2 before layer10: runs of digits compare as numbers, before letters."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]
