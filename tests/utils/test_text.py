"""Text for people: tables."""

from __future__ import annotations

from utils.text import format_table


def test_columns_are_aligned() -> None:
    text = format_table(("name", "count"), [("a", "1,000"), ("longer", "7")])
    assert text.splitlines() == ["name    count", "------  -----", "a       1,000", "longer      7"]


def test_table_without_rows() -> None:
    assert format_table(("name", "count"), []).splitlines() == ["name  count", "----  -----"]
