"""torchvision's Swin attention as one that calls its layers; imported once torchvision's is."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from model.layers.matmul import TakesMatmuls
from model.layers.quantized import QuantLinear


class CalledWindowAttention(TakesMatmuls, ShiftedWindowAttention):
    """`ShiftedWindowAttention` that calls `qkv` and `proj`; results differ by rounding alone.

    Windows of an image [N, H, W, C] attend to themselves. In every other block the image is rolled by half a window
    before, and positions that come together from opposite edges do not see each other (arXiv 2103.14030, section 3.2).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Input and output float [N, H, W, C]."""
        height, width = x.shape[1:3]
        rows, columns = self.window_size
        x = functional.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        padded = x.shape[1:3]
        shift = [  # one window alone has no neighbours
            0 if window >= side else by
            for window, side, by in zip(self.window_size, padded, self.shift_size, strict=True)
        ]
        x = x.roll((-shift[0], -shift[1]), (1, 2))
        grid = (padded[0] // rows, padded[1] // columns)
        x = x.unflatten(2, (grid[1], columns)).unflatten(1, (grid[0], rows)).transpose(2, 3)
        x = x.flatten(3, 4).flatten(0, 2)  # [N * windows, positions, C]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self._scores(q, k) + self.get_relative_position_bias()
        if any(shift):
            apart = _apart(padded, self.window_size, shift, x)
            scores = (scores.unflatten(0, (-1, len(apart))) + apart[:, None]).flatten(0, 1)
        drop, matmuls = self.attention_dropout if self.training else 0.0, self.own_matmuls()
        if matmuls is None:
            x = functional.dropout(scores.softmax(-1), drop) @ v
        else:
            x = matmuls.weights_value(scores.softmax(-1), v, drop)
        x = functional.dropout(self.proj(x.transpose(1, 2).flatten(2)), self.dropout, self.training)
        x = x.unflatten(1, (rows, columns)).unflatten(0, (-1, *grid)).transpose(2, 3)
        x = x.flatten(3, 4).flatten(1, 2)
        return x.roll((shift[0], shift[1]), (1, 2))[:, :height, :width].contiguous()

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """The products of query and key [N * windows, heads, positions, positions]."""
        scale, matmuls = q.shape[-1] ** -0.5, self.own_matmuls()
        return (q * scale) @ k.mT if matmuls is None else matmuls.query_key(q, k.mT, scale=scale)


class CalledWindowAttentionV2(CalledWindowAttention, ShiftedWindowAttentionV2):
    """The same of Swin V2, which compares directions, with a learned scale of at most 100 (arXiv 2111.09883)."""

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        scale = self.logit_scale.clamp(max=math.log(100)).exp()
        q, k, matmuls = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1), self.own_matmuls()
        return (q @ k.mT if matmuls is None else matmuls.query_key(q, k.mT)) * scale


class NoKeyBias(nn.Linear):
    """`qkv` of Swin V2: the third of its bias that is the key's counts as zero, whatever it holds."""

    @property
    def bias(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The parameter `bias` with zeros in its middle third, float32 [out]."""
        whole = self._parameters["bias"]
        if whole is None:
            return None
        query, key, value = whole.chunk(3)
        return torch.cat([query, torch.zeros_like(key), value])


class QuantNoKeyBias(QuantLinear, NoKeyBias):
    """`NoKeyBias` with quantizers."""


FORMS = {NoKeyBias: QuantNoKeyBias}


def call_window_layers(attention: nn.Module) -> None:
    """Let torchvision's attention call its layers; one of a subclass stays as it is."""
    if type(attention) is ShiftedWindowAttention:
        attention.__class__ = CalledWindowAttention
    elif type(attention) is ShiftedWindowAttentionV2:
        attention.__class__ = CalledWindowAttentionV2  # pyright: ignore[reportAttributeAccessIssue]
        if type(attention.qkv) is nn.Linear:
            attention.qkv.__class__ = NoKeyBias


def _apart(sides: tuple[int, ...], windows: list[int], shift: list[int], like: Tensor) -> Tensor:
    """-100 where two positions of a window of the rolled image come from different edges, else 0.

    Returns:
        [windows, positions, positions], of the type of `like`.
    """
    regions = []
    for side, window, by in zip(sides, windows, shift, strict=True):
        place = torch.arange(side, device=like.device)
        # The last window is cut in two where the image was rolled.
        region = (place >= side - window).int() + (place >= side - by).int() * bool(by)
        regions.append(region.unflatten(0, (-1, window)))
    rows, columns = regions
    region = (rows[:, None, :, None] * 3 + columns[None, :, None, :]).flatten(2).flatten(0, 1)
    return (region[:, :, None] != region[:, None]).to(like.dtype) * -100
