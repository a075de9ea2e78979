"""Keywords: their record, the registry of all, and the resolution of a list into typed fields."""

from __future__ import annotations

import difflib
import os
import runpy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from utils.config.option import FOLDER
from utils.config.options import OPTIONS
from utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Keyword:
    """One word of `--keyword`.

    Example:
        >>> from utils.config.keyword import Keyword
        >>> Keyword(name="my-word", group="mine", help="narrower", sets={"extra.narrow": True}).rank
        0

    Attributes:
        name: as it is written, case matters.
        group: the heading it is listed under.
        help: one line.
        sets: dotted field -> value. Two words of equal rank that set a field to different values
            contradict each other.
        rank: 0 sets defaults, 1 refines them (`lsq` over `dorefa`), 2 refines one tag (`wt_lsq`).
        requires: groups of words; at least one word of each group must be given too.
        requires_method: a word of rank 0 that names a method of quantization must be given too.
        excludes: words that cannot be given with this one.
        families: families of networks it has an effect on, of `utils.config.resolve.families.FAMILIES`; empty: all.
        idle_with: a word beside which this one has no effect -> groups of words; with all words of a group
            given, it has an effect again.
    """

    name: str
    group: str
    help: str
    sets: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 0
    requires: tuple[tuple[str, ...], ...] = ()
    requires_method: bool = False
    excludes: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    idle_with: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)


PACKAGES = ("model", "utils", "launch")  # users' keyword files import from these
_REGISTRY: dict[str, Keyword] = {}
_LOADED: list[str] = []


def register(keyword: Keyword) -> None:
    """Declare a keyword; user files call this too.

    Raises:
        UserError: when the name is taken or is not one word.

    Example:
        >>> from utils.config.keyword import Keyword, register, registry
        >>> register(Keyword(name="my-word", group="mine", help="narrower", sets={"extra.narrow": True}))
        >>> registry()["my-word"].sets
        {'extra.narrow': True}
    """
    if keyword.name in _REGISTRY:
        raise UserError(f"the keyword {keyword.name!r} is declared already; choose another name")
    if keyword.name == FOLDER:
        raise UserError(f"{FOLDER!r} is a second name of the keyword imagenet; choose another name")
    if not keyword.name or any(c in keyword.name for c in ", \t\n"):
        raise UserError(f"{keyword.name!r} cannot be a keyword: no commas and no spaces")
    _REGISTRY[keyword.name] = keyword


def registry() -> dict[str, Keyword]:
    """Every keyword by name, in the order of declaration."""
    return dict(_REGISTRY)


def loaded_files() -> tuple[str, ...]:
    """The paths of users' files that were loaded."""
    return tuple(_LOADED)


def load_file(path: str) -> None:
    """Run a user's Python file that registers more keywords.

    Its keywords may set `extra.NAME`, which networks and quantizers find in their `extra`, and every
    field that an earlier keyword sets.

    Raises:
        UserError: when the file is missing or fails, or one of its keywords sets a field that nothing reads.
    """
    if not os.path.isfile(path):
        raise UserError(f"--keyword_file {path}: no such file; give the path of a Python file")
    before = registry()
    fields = {name for keyword in before.values() for name in keyword.sets}
    _LOADED.append(path)
    try:
        runpy.run_path(path)
    except UserError as error:
        raise UserError(f"--keyword_file {path}: {error}") from error
    except ImportError as error:
        hint = (
            "; CHANGELOG.md lists what has moved"
            if error.name and error.name.split(".")[0] in PACKAGES
            else ""
        )
        raise UserError(f"--keyword_file {path}: {type(error).__name__}: {error}{hint}") from error
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UserError(f"--keyword_file {path}: {type(error).__name__}: {error}") from error
    for keyword in _REGISTRY.keys() - before.keys():
        for name, value in _REGISTRY[keyword].sets.items():
            if name not in fields and not name.startswith("extra."):
                close = " or ".join(difflib.get_close_matches(name, fields, n=2)) or f"extra.{name}"
                raise UserError(
                    f"--keyword_file {path}: {keyword} sets {name}, which nothing reads; write {close}"
                )
            if not _is_plain(value):
                raise UserError(
                    f"--keyword_file {path}: {keyword} sets {name} to {value!r}, which cannot be saved with "
                    "a run; use numbers, texts, lists and dictionaries"
                )


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(item) for name, item in value.items())
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


@dataclass(frozen=True)
class Resolution:
    """A resolved list of keywords.

    Attributes:
        fields: dotted field -> value.
        origins: dotted field -> the keyword that set it.
        warnings: keywords that have no effect on the chosen network.
    """

    fields: dict[str, Any]
    origins: dict[str, str]
    warnings: tuple[str, ...]


def resolve(words: Iterable[str], family: str) -> Resolution:
    """The fields that `words` set, for a network of `family`.

    Raises:
        UserError: naming every unknown word (with close names), contradiction and missing requirement.
    """
    words = tuple(dict.fromkeys(words))
    known = [_REGISTRY[word] for word in words if word in _REGISTRY]
    problems = [_unknown(word) for word in words if word not in _REGISTRY]
    problems += _contradictions(known)
    for keyword in known:
        for group in requirements(keyword):
            if not set(group) & set(words):
                problems.append(f"{keyword.name} needs {' or '.join(group)}")
    if problems:
        raise UserError("--keyword: " + "; ".join(problems))

    fields: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for keyword in sorted(known, key=lambda k: k.rank):
        fields.update(keyword.sets)
        origins.update(dict.fromkeys(keyword.sets, keyword.name))
    warnings = tuple(
        f"the keyword {k.name} has no effect on this network" for k in known if not _acts(k, family)
    )
    warnings += tuple(
        f"the keyword {k.name} has no effect: it sets nothing" for k in known if not (k.sets or k.families)
    )
    warnings += tuple(
        f"the keyword {k.name} has no effect beside {other}"
        for k in known
        for other, rescues in k.idle_with.items()
        if other in words and not any(set(group) <= set(words) for group in rescues) and _acts(k, family)
    )
    return Resolution(fields, origins, warnings)


def requirements(keyword: Keyword) -> tuple[tuple[str, ...], ...]:
    """The groups of words that a keyword requires: at least one word of each."""
    if not keyword.requires_method:
        return keyword.requires
    naming = (k for k in _REGISTRY.values() if k.rank == 0 and any(f.endswith(".method") for f in k.sets))
    return (*keyword.requires, tuple(k.name for k in naming))


def _acts(keyword: Keyword, family: str) -> bool:
    """Whether the keyword acts on networks of `family`; it may act on a user's own network."""
    return not keyword.families or family in (*keyword.families, "own")


def _unknown(word: str) -> str:
    if word.replace("-", "_") in OPTIONS:
        return f"unknown keyword {word!r}, which is an option: write --{word}"
    folded = {name.lower(): name for name in _REGISTRY}
    close = [folded[name] for name in difflib.get_close_matches(word.lower(), folded, n=3)]
    return f"unknown keyword {word!r}" + (f", did you mean {' or '.join(close)}?" if close else
                                          ", see --list_keywords")  # fmt: skip


def _contradictions(keywords: list[Keyword]) -> list[str]:
    found = []
    for i, first in enumerate(keywords):
        for second in keywords[i + 1 :]:
            excluded = second.name in first.excludes or first.name in second.excludes
            clash = first.rank == second.rank and any(
                name in second.sets and second.sets[name] != value for name, value in first.sets.items()
            )
            if excluded or clash:
                found.append(f"{first.name} contradicts {second.name}, keep one of them")
    return found


def table() -> str:
    """The registry as plain text, a group at a time."""
    width = max(len(name) for name in _REGISTRY)
    lines: list[str] = []
    for group in dict.fromkeys(k.group for k in _REGISTRY.values()):
        lines.append(f"{group}:")
        for k in (k for k in _REGISTRY.values() if k.group == group):
            lines.append(f"  {k.name:<{width}}  {k.help}{relations(k)}")
    return "\n".join(lines)


def relations(keyword: Keyword) -> str:
    """A keyword's requirements and exclusions, for a list of keywords; empty without any."""
    notes = [f"needs {' or '.join(group)}" for group in requirements(keyword)]
    notes += [f"not with {', '.join(keyword.excludes)}"] if keyword.excludes else []
    idle: dict[str, list[str]] = {}
    for other, rescues in keyword.idle_with.items():
        unless = " or ".join(" and ".join(word for word in group if word != other) for group in rescues)
        idle.setdefault(f" without {unless}" if unless else "", []).append(other)
    notes += [f"no effect beside {' or '.join(others)}{unless}" for unless, others in idle.items()]
    return f" ({'; '.join(notes)})" if notes else ""
