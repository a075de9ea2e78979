"""Numbers of few bits as a stream of bits, the lowest bit of the first number first."""

from __future__ import annotations

import numpy as np

from model.deploy.codes import Array


def bit_stream(numbers: Array, bits: int) -> Array:
    """Integers from 0 to 2**bits - 1, in the order of C, as bytes; uint8.

    Example:
        >>> import numpy as np
        >>> from model.deploy.bits import bit_stream, from_bit_stream
        >>> [f"{byte:08b}" for byte in bit_stream(np.array([0, 3, 2, 1, 3]), 2)]
        ['01101100', '00000011']
        >>> from_bit_stream(bit_stream(np.array([1, 2, 3, 7]), 3), 3, 4)
        array([1, 2, 3, 7], dtype=uint16)
    """
    digits = numbers.reshape(-1, 1) >> np.arange(bits, dtype=numbers.dtype) & 1
    return np.packbits(digits.astype(np.uint8), bitorder="little")


def from_bit_stream(stream: Array, bits: int, count: int) -> Array:
    """The `count` numbers of at most 16 bits that `bit_stream` has put into a stream, uint16 [count]."""
    digits = np.unpackbits(stream, count=count * bits, bitorder="little").reshape(count, bits)
    return (digits.astype(np.uint16) << np.arange(bits, dtype=np.uint16)).sum(1, dtype=np.uint16)
