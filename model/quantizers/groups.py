"""The groups of channels that share a learned value."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from model.quantizers.site import LayerSite, group_count, undivided
from utils.config.schema import QuantizerConfig
from utils.errors import UserError


class Grouped(nn.Module):
    """The base of `Quantizer`: its groups of channels, and tensors by groups."""

    config: QuantizerConfig
    site: LayerSite
    groups: int
    # By default each channel of an activation is a group, as of a weight.
    per_channel_inputs: ClassVar[bool] = False

    def _resolve_groups(self, requested: int | None) -> int:
        channels = self.site.channels
        weight = self.config.tag == "wt"
        if requested is None:
            return channels if weight or self.per_channel_inputs else 1
        groups = group_count(requested, channels)
        if groups is None:
            raise UserError(f"{self.site.name}: {undivided(self.config.tag, requested, channels)}")
        return groups

    def range_shape(self) -> tuple[int, ...]:
        """Shape of a learned value per group: [g, 1, ...] weights; [1] or [1, g, 1, ...] others."""
        if self.config.tag == "wt":
            return (self.groups,) + (1,) * (self.site.ndim - 1)
        if self.groups == 1:
            return (1,)
        shape = [1] * self.site.ndim
        shape[self.site.channel_dim] = self.groups
        return tuple(shape)

    def per_channel(self, value: Tensor) -> Tensor:
        """Repeat a value per group (`range_shape`) for each channel; the result broadcasts to the tensor."""
        if self.groups in (1, self.site.channels):
            return value
        return value.repeat_interleave(self.site.channels // self.groups, dim=self.site.channel_dim)

    def grouped(self, x: Tensor) -> Tensor:
        """The elements of each group as a row: [g, elements per group]."""
        if self.groups == 1:
            return x.reshape(1, -1)
        return x.movedim(self.site.channel_dim, 0).reshape(self.groups, -1)

    def elements(self, x: Tensor) -> float:
        """The number of elements of `x` in one group."""
        return x.numel() / self.groups

    def levels_per_sample(self) -> bool:
        """Whether each sample of a tensor has its own levels: it is normalised by sample and restored."""
        return self.config.tag != "wt" and self.config.adaptive != "none" and self.config.adaptive_restore

    def level_rows(self, output: Tensor) -> Tensor:
        """The values of a quantized tensor as rows, each of which shares its levels: [rows, values]."""
        if not self.levels_per_sample():
            return self.grouped(output)
        channels = output.movedim(self.site.channel_dim, 1)
        return channels.reshape(output.shape[0] * self.groups, -1)
