"""How many bits the integer sums of layers need, as a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from utils.text import counted, format_table, some_names

SHORT = 16  # bits of the shortest accumulators in use


@dataclass(frozen=True, kw_only=True)
class Accumulator:
    """The sums of products of codes, without the bias, of a convolution or linear layer.

    Attributes:
        name: of the layer.
        products: in a sum.
        lowest: the least sum that inputs of these codes can give, with the weights as they are; no partial sum is less.
        highest: likewise, the greatest.
        seen: the least and the greatest sum of real images; None where none were run.
    """

    name: str
    products: int
    lowest: int
    highest: int
    seen: tuple[int, int] | None = None

    @property
    def bits(self) -> int:
        """Bits of an accumulator in two's complement that no input makes overflow, whatever the order of the sum."""
        return sum_bits(self.lowest, self.highest)

    @property
    def seen_bits(self) -> int | None:
        """Bits that hold the sums of real images; their partial sums may need more."""
        return None if self.seen is None else sum_bits(*self.seen)


def sum_bits(lowest: int, highest: int) -> int:
    """Bits of the shortest integer in two's complement that holds both.

    Example:
        >>> from utils.report.accumulator_record import sum_bits
        >>> sum_bits(0, 0), sum_bits(-128, 127), sum_bits(-128, 128)
        (1, 8, 9)
    """
    return 1 + max(value.bit_length() if value >= 0 else (~value).bit_length() for value in (lowest, highest))


def accumulator_table(rows: Sequence[Accumulator]) -> str:
    """The layers as text, a line each."""
    head = ("integer sums of", "products", "lowest", "highest", "bits", "bits on images")
    cells = [
        (row.name, f"{row.products:,}", f"{row.lowest:,}", f"{row.highest:,}", str(row.bits), str(row.seen_bits or "-"))
        for row in rows
    ]  # fmt: skip
    return format_table(head, cells)


def accumulator_remark(rows: Sequence[Accumulator]) -> str:
    """A few words about the longest sums, and the layers with more than `SHORT` bits; empty where there are none."""
    if not rows:
        return ""
    longest = max(rows, key=lambda row: row.bits)
    seen = [row.seen_bits for row in rows if row.seen_bits is not None]
    images = f"; those of the images at most {max(seen)}" if seen else ""
    long = [row.name for row in rows if row.bits > SHORT]
    named = f"; above {SHORT} bits in {counted(len(long), 'layer')}: {some_names(long)}" if long else ""
    return f"at most {longest.bits} bits in {counted(len(rows), 'layer')}, the most in {longest.name}{images}{named}"
