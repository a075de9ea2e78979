"""The place of a quantizer in its network, and the number of groups of its channels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerSite:
    """The place of a quantizer: the facts that it needs about its layer.

    Attributes:
        name: the layer's name in the network, for messages.
        channels: size of the channel dimension of the quantized tensor.
        channel_dim: that dimension: 0 for weights, 1 for a convolution's activations, -1 for a
            linear layer's.
        ndim: dimensions of the quantized tensor that parameters broadcast against
            (4 for a convolution's input and weight, 2 for a linear layer's).
        fan: inputs of one output value, in * kh * kw.

    Example:
        >>> from model.quant import LayerSite, QuantizerConfig, methods
        >>> config = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
        >>> site = LayerSite(name="conv1", channels=8, channel_dim=0, ndim=4, fan=27)  # nn.Conv2d(3, 8, 3)
        >>> methods()["lsq", "wt"](config, site).range_shape()  # a clip value for each output channel
        (8, 1, 1, 1)
    """

    name: str
    channels: int
    channel_dim: int
    ndim: int
    fan: int


def group_count(requested: int, channels: int) -> int | None:
    """The number of groups of `channels`: `requested`, or as many as have -`requested` channels each.

    None where the channels cannot be divided so.
    """
    size = -requested if requested < 0 else requested
    if size == 0 or channels % size:
        return None
    return channels // size if requested < 0 else requested


def undivided(tag: str, requested: int, channels: int) -> str:
    """The message for a `group_count` that is None."""
    meaning = f"groups of {-requested}" if requested < 0 else f"{requested} groups"
    return (
        f"--{tag}_quant_group {requested} ({meaning}) does not divide its {channels} channels; "
        f"use a divisor of {channels}"
    )
