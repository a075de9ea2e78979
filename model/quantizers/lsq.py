"""LSQ: learned step size quantization (arXiv 1902.08153), in the clip-value form of arXiv 1912.10207."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from model.quantizers.gradient import apply
from model.quantizers.grid import ClipSTE, Grid
from model.quantizers.learned_range import LearnedRange
from model.quantizers.registry import register
from model.quantizers.site import LayerSite
from utils.config.schema import QuantizerConfig
from utils.errors import UserError


@register("lsq", "fm", "wt", "ot")
class LSQ(LearnedRange):
    """Uniform levels up to a learned clip value c = |clip_val|.

    Half range: c * round(n * clamp(x / c, 0, 1)) / n.
    Full range: c * (2 * round(n * (clamp(x / c, -1, 1) + 1) / 2) / n - 1), n = levels - 1.
    Full range, mid-tread: s * round(clamp(x / s, -levels / 2, Qp)), s = c / Qp, Qp = levels / 2 - 1.

    Gradient: straight-through to x inside the range; to c, q / c - x / c inside and the end level outside, times
    the factor of `grad_scale`. `STE-scale` changes nothing here: values are clamped before they are rounded, so that
    all elements are inside.

    State:
        clip_val: float32, `range_shape`; starts at `boundary`.
    """

    pure: ClassVar[bool] = True

    def __init__(self, config: QuantizerConfig, site: LayerSite) -> None:
        super().__init__(config, site)
        if config.grid == "midtread" and config.levels < 3:
            raise UserError(f"--{config.tag}_grid midtread has no level above zero at {config.levels} levels")

    def check_levels(self, levels: int) -> None:
        """Refuse a mid-tread grid without a level above zero."""
        super().check_levels(levels)
        if self.config.grid == "midtread" and levels < 3:
            raise UserError(f"{self.site.name}: a mid-tread grid needs at least 3 levels, not {levels}")

    def grid(self) -> Grid:
        """The levels."""
        return Grid.of(self.levels, self.config.half_range, midtread=self.config.grid == "midtread")

    def quantize(self, x: Tensor) -> Tensor:
        """Float32 of any shape to the nearest level."""
        return apply(ClipSTE, *self.on_grid(x), False, self.keeps_output)
