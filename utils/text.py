"""Text for people: escaping for terminals and logs, close matches of a word, tables; and for programs, by line."""

from __future__ import annotations

import csv
import difflib
import io
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SHOWN = 5  # names listed in a message before "..."


def printable(text: str) -> str:
    """Escape line breaks, control characters and invalid UTF-8 in a file's text or name, for a terminal or a log."""
    breaking = ("Cc", "Cs", "Zl", "Zp")  # control characters, bytes that are not UTF-8, ends of lines
    return "".join(ascii(char)[1:-1] if unicodedata.category(char) in breaking else char for char in text)


def some_names(names: Iterable[str]) -> str:
    """The first names of a list for a message, printable, with dots where there are more."""
    names = list(map(printable, names))
    return ", ".join([*names[:SHOWN], *(["..."] if len(names) > SHOWN else [])])


def counted(number: int, word: str) -> str:
    """A number and what it counts: `1 epoch`, `1,500 steps`."""
    return f"{number:,} {word}{'s' * (number != 1)}"


def epochs_done(epochs: int, part: str = "") -> str:
    """How far a run is: `1 epoch is done`; `part` says more that is done."""
    return f"{counted(epochs, 'epoch')}{part} {'is' if epochs == 1 and not part else 'are'} done"


def closest(word: object, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Suggest the known words closest to `word`, as the end of a message; empty when none is close.

    Args:
        word: the word.
        known: the words that may have been meant.
        cutoff: least similarity, from 0 to 1, as difflib measures it.
    """
    names = sorted(known)
    close = [name for name in names if name.lower() == str(word).lower()]
    close = close or difflib.get_close_matches(str(word), names, n=3, cutoff=cutoff)
    return f"; did you mean {', '.join(close)}?" if close else ""


def format_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A text table with aligned columns, numbers to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    right = [bool(rows) and all(row[i][:1].isdigit() for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in [head, *rows]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def csv_text(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A CSV file with a first line of names."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return file.getvalue()


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """A JSON object in each line."""
    return "".join(f"{json.dumps(row, allow_nan=False)}\n" for row in rows)
