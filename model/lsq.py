"""LSQ: learned step size quantization (arXiv 1902.08153), in the clip-value form of arXiv 1912.10207."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.quant import Integers, Quantizer, TensorSite, register
from model.uniform import Grid, LearnedClip, PositiveClip, ScaleGradient, initial_clip, integers
from utils.config import QuantizerConfig
from utils.errors import UserError


@register("lsq", "fm", "wt", "ot")
class LSQ(Quantizer):
    """Uniform levels up to a learned clip value c = |clip_val|.

    Half range: c * round(n * clamp(x / c, 0, 1)) / n.
    Full range: c * (2 * round(n * (clamp(x / c, -1, 1) + 1) / 2) / n - 1), n = levels - 1.
    Full range, mid-tread: s * round(clamp(x / s, -levels / 2, Qp)), s = c / Qp, Qp = levels / 2 - 1.

    Gradient: straight-through to x inside the range; to c, q / c - x / c inside and the end level
    outside, times `grad_scale`'s factor. `STE-scale` changes nothing here: the value that is
    rounded has been clamped, so that all elements are inside.

    State:
        clip_val: float32, `range_shape`; starts at `boundary`.
    """

    def __init__(self, config: QuantizerConfig, site: TensorSite) -> None:
        super().__init__(config, site)
        if config.grid == "midtread" and config.levels < 3:
            raise UserError(f"--{config.tag}_grid midtread has no level above zero at {config.levels} levels")
        self.clip_val = nn.Parameter(torch.full(self.range_shape(), config.boundary))
        self.zero_to_zero = (
            config.half_range
            and config.adaptive == "none"
            and config.grad_scale not in ("element-scale", "scale-element", "paper")
        )

    def grid(self) -> Grid:
        """The levels."""
        return Grid.of(self.levels, self.config.half_range, midtread=self.config.grid == "midtread")

    def clip(self, x: Tensor) -> Tensor:
        """The clip value, float32 > 0, broadcastable to x."""
        clip = self.per_channel(PositiveClip.apply(self.clip_val))
        if self.config.grad_scale == "none":
            return clip
        return ScaleGradient.apply(clip, self.gradient_factor(x, self.grid().qp))

    def quantize(self, x: Tensor) -> Tensor:
        """Float32 of any shape to the nearest level."""
        return LearnedClip.apply(x, self.clip(x), self.grid())

    def encode(self, x: Tensor) -> Integers:
        """Codes and scale of `x`; mid-rise grids have odd codes."""
        return integers(x, self.clip(x), self.grid())

    def set_range(self, value: Tensor) -> None:
        """Take `value` as the clip value."""
        self.clip_val.copy_(value)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The ends of the grid."""
        clip, grid = self.clip_val.detach().abs(), self.grid()
        return clip * (grid.bottom / grid.top), clip

    def current_range(self) -> Tensor:
        """The clip value."""
        return self.clip_val.detach()

    def initialise_from(self, x: Tensor) -> None:
        """The paper's initial step 2 * mean|x| / sqrt(Qp) per group, Qp the highest level in steps."""
        with torch.no_grad():
            rows = self.grouped(self.normalise(x.float()))
            self.set_range(initial_clip(rows, self.grid()).reshape(self.range_shape()))
