"""Weights in MNN's files: a table of whole numbers, and for each weight its place there in as few bits as possible."""

from __future__ import annotations

import numpy as np

from model.deploy.codes import Array

MOST_SHORT = 2**16 - 1  # a longer side takes 32 bits
HALF_BYTES = 4  # bits at which MNN reads an even number of weights


def fits(codes: Array) -> bool:
    """Whether the codes are integers of 8 bits, which the table holds."""
    return bool(codes.min() >= -128 and codes.max() <= 127)


def table_of(codes: Array) -> Array:
    """The different codes in increasing order, int8.

    MNN 3.6 makes one weight more of an odd number of them with four bits each; a seventeenth entry avoids that.
    """
    table = np.unique(codes)
    if bits_of(table) == HALF_BYTES and codes.size % 2:
        free = np.setdiff1d(np.arange(-128, 128), table)
        table = np.union1d(table, free[: 2**HALF_BYTES + 1 - len(table)])
    return table.astype(np.int8)


def bits_of(table: Array) -> int:
    """The bits of a number, 1 to 8."""
    return max(1, (len(table) - 1).bit_length())


def encoded(codes: Array) -> tuple[Array, bool]:
    """Codes int32 [out, ...] as the bytes of a file, uint8, and whether their shape takes 32 bits for a side.

    The bytes are: 2, the sides [out, others], the number of entries of the table, the table, and the place of each
    code in it with the highest bit first.

    Example:
        >>> import numpy as np
        >>> from model.deploy.mnn.codes import encoded
        >>> encoded(np.array([[-3, 3, 1, -1]]))[0]  # of -3 -1 1 3 the numbers 0 3 2 1: 00 11 10 01
        array([  2,   1,   0,   4,   0,   4, 253, 255,   1,   3,  57], dtype=uint8)
    """
    table = table_of(codes)
    sides = (len(codes), codes[0].size)
    long = max(sides) > MOST_SHORT
    numbers = np.searchsorted(table, codes.reshape(-1)).astype(np.uint8)
    kept = (numbers[:, None] >> np.arange(bits_of(table))[::-1].astype(np.uint8)) & 1
    head = np.array(sides, "<u4" if long else "<u2").view(np.uint8)
    parts = ([2], head, [len(table) % 256], table.view(np.uint8), np.packbits(kept))
    return np.concatenate([np.asarray(part, np.uint8) for part in parts]), long


def decoded(data: Array, long: bool) -> Array:
    """The codes of such bytes, int32 [out, others].

    Raises:
        ValueError: the bytes are too few.
    """
    kind = np.dtype("<u4" if long else "<u2")
    start = 1 + 2 * kind.itemsize
    out, others = data[1:start].view(kind).tolist()
    count = int(data[start]) or 256
    table = data[start + 1 : start + 1 + count].view(np.int8)
    bits, size = bits_of(table), out * others
    kept = np.unpackbits(data[start + 1 + count :])[: size * bits].reshape(size, bits)
    numbers = kept.astype(np.int32) @ (1 << np.arange(bits)[::-1])
    return table[numbers].astype(np.int32).reshape(out, others)
