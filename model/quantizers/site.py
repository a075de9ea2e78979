"""Where a quantizer sits, and into how many groups its channels fall."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerSite:
    """Where a quantizer sits: what it needs to know of its layer.

    Attributes:
        name: the layer's name in the network, for messages.
        channels: size of the channel dimension of the quantized tensor.
        channel_dim: that dimension: 0 for weights, 1 for a convolution's activations, -1 for a
            linear layer's.
        ndim: dimensions of the quantized tensor that parameters broadcast against
            (4 for a convolution's input and weight, 2 for a linear layer's).
        fan: inputs of one output value, in * kh * kw.
    """

    name: str
    channels: int
    channel_dim: int
    ndim: int
    fan: int


def group_count(requested: int, channels: int) -> int | None:
    """How many groups `channels` fall into: `requested`, or groups of -`requested`; None where it does not divide."""
    size = -requested if requested < 0 else requested
    if size == 0 or channels % size:
        return None
    return channels // size if requested < 0 else requested


def undivided(tag: str, requested: int, channels: int) -> str:
    """What to say when `group_count` is None."""
    meaning = f"groups of {-requested}" if requested < 0 else f"{requested} groups"
    return (
        f"--{tag}_quant_group {requested} ({meaning}) does not divide its {channels} channels; "
        f"use a divisor of {channels}"
    )
