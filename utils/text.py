"""Text for people: what may be printed, tables, and what may have been meant by a word."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


def printable(text: str) -> str:
    """Text from a file, or a file's name, for a terminal or a log: what breaks a line or is not UTF-8 is escaped."""
    breaking = ("Cc", "Cs", "Zl", "Zp")  # control characters, bytes that are not UTF-8, ends of lines
    return "".join(ascii(char)[1:-1] if unicodedata.category(char) in breaking else char for char in text)


def closest(word: object, known: Iterable[str]) -> str:
    """Known words that are like a word, as the end of a message; empty where none is."""
    close = difflib.get_close_matches(str(word), sorted(known), n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""


def format_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns aligned, numbers to the right."""
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
