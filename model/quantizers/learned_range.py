"""The learned clip value, for PACT and LSQ."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model.quantizers.frame import Quantizer
from model.quantizers.gradient import apply
from model.quantizers.grid import ClipSTE, Grid, PositiveClip, ScaleGradient, encode_on_grid, initial_clip
from model.quantizers.integers import QuantizedTensor
from model.quantizers.sign import mean_magnitude
from model.quantizers.site import LayerSite
from utils.config.schema import QuantizerConfig


class LearnedRange(Quantizer):
    """The base of methods with a learned clip value c = |clip_val|; a method adds its `quantize`.

    State:
        clip_val: float32, `range_shape`; starts at `boundary`.

    Example:
        >>> import torch
        >>> from model.quant import ClipSTE, LayerSite, LearnedRange, QuantizerConfig
        >>> class Uniform(LearnedRange):
        ...     def quantize(self, x):
        ...         return ClipSTE.apply(x, self.clip(x), self.grid())
        >>> config = QuantizerConfig(tag="fm", enable=True, levels=4, method="uniform", half_range=True, boundary=3.0)
        >>> quantizer = Uniform(config, LayerSite(name="fc", channels=2, channel_dim=-1, ndim=2, fan=2))
        >>> output = quantizer(torch.tensor([[1.2, 5.0]]))
        >>> output.detach(), quantizer.integers(torch.tensor([[1.2, 5.0]])).codes
        (tensor([[1., 3.]]), tensor([[1, 3]], dtype=torch.int32))
        >>> output.sum().backward()
        >>> quantizer.clip_val.grad  # -0.0667 inside the range, 1 outside
        tensor([0.9333])
    """

    def __init__(self, config: QuantizerConfig, site: LayerSite) -> None:
        super().__init__(config, site)
        self.clip_val = nn.Parameter(torch.full(self.range_shape(), config.boundary))

    def zero_to_zero(self) -> bool:
        """See `Quantizer`; false too where a factor of the gradients counts elements, which padding would change."""
        config = self.config
        return (
            config.half_range
            and config.adaptive == "none"
            and config.grad_type != "STE-scale"
            and config.grad_scale not in ("element-scale", "scale-element", "paper")
        )

    def grid(self) -> Grid:
        """The levels."""
        return Grid.of(self.levels, self.config.half_range)

    def half_range_changes(self) -> bool:
        """See `Quantizer`; a mid-tread grid has a full range only."""
        return self.config.grid != "midtread"

    def search_grid(self) -> Grid:
        """See `Quantizer`."""
        return self.grid()

    def range_error(self, x: Tensor) -> Tensor | None:
        """See `Quantizer`; None for normalised values, since their clip value has another scale."""
        if self.config.adaptive != "none":
            return None
        return (ClipSTE.apply(x, self.clip(x), self.grid()) - x).square().sum()

    def clip(self, x: Tensor) -> Tensor:
        """The clip value, float32 > 0, broadcastable to x."""
        clip = self.per_channel(apply(PositiveClip, self.clip_val))
        if self.config.grad_scale == "none":
            return clip
        return apply(ScaleGradient, clip, self.gradient_factor(x, self.grid().qp))

    def gradient_factor(self, x: Tensor, qp: float) -> float:
        """The factor on the gradient of the learned clip value c (`xx_grad_scale`).

        `paper` moves the step s = c / Qp as arXiv 1902.08153, section 2.2, does. The paper multiplies the gradient
        of s by 1 / sqrt(N * Qp), with N elements of a weight or of the activation of one sample. dL/dc is dL/ds / Qp,
        and a change of c changes s by 1 / Qp of it; the factor for c is hence Qp^2 / sqrt(N * Qp).
        """
        kind, scale = self.config.grad_scale, self.config.scale
        if kind == "none":
            return 1.0
        if kind == "paper":
            samples = 1 if self.config.tag == "wt" else x.shape[0]
            return qp**2 / math.sqrt(max(self.elements(x) / samples, 1.0) * qp)
        count = self.site.fan if "fan" in kind else self.elements(x)
        return math.sqrt(count) * scale if kind.endswith("-scale") else scale / math.sqrt(count)

    def on_grid(self, x: Tensor) -> tuple[Tensor, Tensor, Grid]:
        """See `Quantizer`."""
        return x, self.clip(x), self.grid()

    def encode(self, x: Tensor) -> QuantizedTensor:
        """Codes and scale of `x`; mid-rise grids have odd codes."""
        return encode_on_grid(*self.on_grid(x))

    def set_range(self, value: Tensor) -> None:
        """Set the clip value."""
        self.clip_val.copy_(value)

    def rescale(self, levels: int) -> tuple[nn.Parameter, ...]:
        """Multiply the clip value by (levels - 1) / (levels now - 1), on a mid-tread grid by the ratio of the Qp."""
        before, self.levels = self.grid().qp, levels
        with torch.no_grad():
            self.clip_val.mul_(self.grid().qp / before)
        return (self.clip_val,)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The ends of the grid."""
        clip, grid = self.clip_val.detach().abs(), self.grid()
        return clip * (grid.bottom / grid.top), clip

    def current_range(self) -> Tensor:
        """The clip value."""
        return self.clip_val.detach()

    def initialise_from(self, x: Tensor) -> None:
        """Set the clip value of LSQ's initial step 2 * mean|x| / sqrt(Qp) per group; a group of zeros keeps its own."""
        with torch.no_grad():
            rows = self.grouped(self.normalise(x.float()))
            mean = self.mean_over_ranks(mean_magnitude(rows, 1))
            found = initial_clip(mean, self.grid()).reshape(self.range_shape())
            self.set_range(torch.where(found > 0, found, self.clip_val))
