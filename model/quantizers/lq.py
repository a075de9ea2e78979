"""LQ-Nets: learned quantization (arXiv 1807.10029)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from model.quantizers.frame import Quantizer
from model.quantizers.gradient import apply
from model.quantizers.grid import inside, known
from model.quantizers.integers import QuantizedTensor
from model.quantizers.registry import register
from model.quantizers.site import LayerSite
from utils.config.schema import QuantizerConfig
from utils.errors import UserError

KEEP = 0.9  # share of the old basis in each update (paper, section 3.3)
SINGULAR = 1e-12  # smallest ratio of two pivots of a system that is solved
FEW = 16  # up to so many levels comparing with each threshold is faster than searching
REFINEMENTS = 20  # passes of initialise_from


class BelowTop(torch.autograd.Function):
    """The quantized value, with the gradient straight-through to x where x < top and zero elsewhere.

    `top` None passes the gradient everywhere (weights). `copy` makes a result that may be changed in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor, top: Tensor | None, copy: bool) -> Tensor:
        if top is not None:
            ctx.save_for_backward(x, top)
        return quantized.clone() if copy else quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.saved_tensors:
            return grad, None, None, None
        x, top = ctx.saved_tensors
        x, end = (x, top.item()) if known(top, x) else (x - top, 0.0)
        return inside(grad, x, -math.inf, end), None, None, None


class LQ(Quantizer):
    """The levels are all sums of a basis v with codes b: {0, 1} in half range, {-1, +1} in full range.

    x takes the level whose thresholds enclose it; thresholds lie between neighbouring sorted levels, at
    `scale` of the way up (0.5: midpoints, the nearest level). In training, after quantizing, the basis
    moves a tenth of the way to the least-squares one of the current codes, v* = (B^T B)^-1 B^T x
    (paper, equation 7 and algorithm 1); with `custom_update` it is the running mean of v*. A system that
    is singular or not finite keeps the basis it has.

    State:
        basis: float32 [bits, g] (buffer).
    """

    basis: Tensor
    codes: Tensor
    level_limit: ClassVar[int | None] = 256
    # Tables that published files hold beside the basis; here they are computed from the basis.
    obsolete: ClassVar[frozenset[str]] = frozenset(
        {"auxil", "codec_vector", "codec_index", "thrs_multiplier"}
    )

    def __init__(self, config: QuantizerConfig, site: LayerSite) -> None:
        super().__init__(config, site)
        self.bits = (self.levels - 1).bit_length()
        if self.levels != 2**self.bits:
            raise UserError(
                f"--{config.tag}_level {self.levels}: LQ-Nets' levels are the sums of a basis, "
                f"2^bits of them; give --{config.tag}_bit instead"
            )
        start = self.initial_scale() * 2.0 ** torch.arange(self.bits) / 2 ** (self.bits - 1)
        self.register_buffer("basis", start.unsqueeze(1).repeat(1, self.groups))
        numbers = torch.arange(2**self.bits).unsqueeze(1) >> torch.arange(self.bits) & 1
        codes = numbers.float() if config.half_range else 2.0 * numbers - 1.0
        self.register_buffer("codes", codes, persistent=False)  # [levels, bits]

    def learned(self) -> set[str]:
        """See `Quantizer`; the basis."""
        return super().learned() | {"basis"}

    def figures(self) -> dict[str, Tensor]:
        """The basis, mean over the groups."""
        return {"basis": self.basis.mean(dim=1)}

    def initial_scale(self) -> float:
        """The largest entry of the first basis."""
        raise NotImplementedError

    def check_levels(self, levels: int) -> None:
        """Refuse to change the number of levels: the basis has one vector for each bit."""
        if levels != self.levels:
            raise UserError(
                f"{self.site.name}: LQ-Nets' {self.levels} levels are fixed; start another run with --pretrained"
            )

    def adapted(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace a basis of another number of bits by the first basis of this one, scaled to the same top level."""
        basis = entries.get("basis")
        if basis is None or basis.ndim != 2 or basis.shape[1] != self.groups or len(basis) == self.bits:
            return super().adapted(entries)
        top = basis.to(self.basis).abs().sum(dim=0)
        start = 2.0 ** torch.arange(self.bits, device=top.device).unsqueeze(1)
        return super().adapted(entries) | {"basis": start * top / start.sum()}

    def sorted_levels(self) -> tuple[Tensor, Tensor]:
        """Levels [g, levels] in ascending order, and the number of the code of each, int64."""
        return torch.sort((self.codes.float() @ self.basis.float()).T.contiguous(), dim=1, stable=True)

    def thresholds(self, levels: Tensor) -> Tensor:
        """Thresholds between sorted levels [g, levels]: [g, levels - 1], ascending."""
        scale = self.config.scale
        return (levels[:, :-1] * (1 - scale) + levels[:, 1:] * scale).cummax(dim=1).values

    def assign(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Assign rows [g, n] to levels: the positions, int64 [g, n], the sorted levels and their codes."""
        levels, order = self.sorted_levels()
        thresholds = self.thresholds(levels).contiguous()
        return torch.searchsorted(thresholds, rows.contiguous(), right=True), levels, order

    def quantize(self, x: Tensor) -> Tensor:
        """Float32 of any shape to the levels of the basis."""
        fixed = x.detach()
        if self.levels <= FEW:
            levels, order = self.sorted_levels()
            quantized, found = self.compare(fixed, levels, self.training)
            equations = None if found is None else self.equations_of_levels(*found, order)
        else:
            rows = self.grouped(fixed)
            positions, levels, order = self.assign(rows)
            quantized = self.ungrouped(levels.gather(1, positions), x) + fixed.clamp(0, 0)  # NaN stays NaN
            equations = self.normal_equations(rows, order.gather(1, positions)) if self.training else None
        top = self.per_channel(levels[:, -1].reshape(self.range_shape())) if self.config.tag != "wt" else None
        if equations is not None:
            self._update(*equations)
        return apply(BelowTop, x, quantized, top, self.config.tag == "ot")

    def compare(self, x: Tensor, levels: Tensor, count: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Compare `x` with each threshold between the sorted levels [g, levels], in passes that a CPU vectorises.

        Returns:
            The level of each element, and with `count` the number and the sum of the elements at each level, both
            float64 [g, levels]; otherwise None.
        """

        def each(value: Tensor) -> Tensor:
            return self.per_channel(value.reshape(self.range_shape()))

        lowest = each(levels[:, 0])
        # NaN stays NaN, so that it is noticed. Clamping to a tensor is slow on a CPU.
        quantized = x.clamp(lowest.item(), lowest.item()) if known(lowest, x) else x.clamp(0, 0).add_(lowest)
        reached = torch.empty_like(x)  # 0 and 1
        counts: list[Tensor] = []  # at each level or above; Dynamo cannot trace `list[Tensor]()`
        sums: list[Tensor] = []
        if count:
            counts.append(levels.new_full((len(levels),), self.elements(x), dtype=torch.float64))
            sums.append(self.group_sums(x))
        for number, threshold in enumerate(self.thresholds(levels).unbind(1), 1):
            torch.ge(x, each(threshold), out=reached)
            quantized.lerp_(each(levels[:, number]), reached)  # exact at 0 and 1
            if count:
                counts.append(self.group_sums(reached, torch.float32))  # exact: whole numbers
                sums.append(self.group_sums(reached.mul_(x)))
        if not count:
            return quantized, None

        def parts(reaching: list[Tensor]) -> Tensor:
            """What is at each level, from what is at it or above."""
            return -torch.diff(torch.stack(reaching, 1), append=torch.zeros_like(reaching[0]).unsqueeze(1))

        return quantized, (parts(counts), parts(sums))

    def group_sums(self, x: Tensor, partial: torch.dtype = torch.float64) -> Tensor:
        """The sums of the groups, float64 [g]; in `partial` over a channel, or a sample where there is one group."""
        kept = 0 if self.groups == 1 else self.site.channel_dim % x.ndim
        others = [dim for dim in range(x.ndim) if dim != kept]
        parts = x.sum(dim=others, dtype=partial) if others else x
        return parts.double().reshape(self.groups, -1).sum(dim=1)

    def ungrouped(self, rows: Tensor, like: Tensor) -> Tensor:
        """Undo `grouped`: rows [g, n] as a tensor of the shape of `like`."""
        if self.groups == 1:
            return rows.reshape(like.shape)
        moved = like.movedim(self.site.channel_dim, 0)
        return rows.reshape(moved.shape).movedim(0, self.site.channel_dim)

    def gathers(self) -> bool:
        """True for the least squares and the range of a warm-up, which are those of all ranks."""
        return self.enabled or self.calibrating

    def _update(self, gram: Tensor, target: Tensor) -> None:
        """Move the basis towards the least-squares one, from the normal equations of this tensor."""
        with torch.no_grad():
            best = self.least_squares(gram, target)
            if self.config.custom_update:
                # The mean begins behind a warm-up, with the first basis that was found.
                moved = self.basis + (best - self.basis) / (self.iteration - self.stable).clamp_min(1)
            else:
                moved = self.basis * KEEP + best * (1 - KEEP)
            # A warm-up sets the range, and nothing is quantized yet.
            self.basis.copy_(torch.where(self.warming_up(), self.basis, moved) if self.calibrating else moved)

    def least_squares(self, gram: Tensor, target: Tensor) -> Tensor:
        """The basis [bits, g] that solves the normal equations B^T B [g, bits, bits] and B^T x [g, bits, 1].

        Solved in float64; groups whose system is singular keep their basis.
        """
        gram = self.over_ranks(gram, torch.distributed.ReduceOp.SUM)
        target = self.over_ranks(target, torch.distributed.ReduceOp.SUM)
        gram, target = self.regularised(gram, target)
        factors, rows_swapped, _ = torch.linalg.lu_factor_ex(gram)
        solution = torch.linalg.lu_solve(factors, rows_swapped, target)
        pivots = factors.diagonal(dim1=1, dim2=2).abs()
        regular = pivots.amin(dim=1) > SINGULAR * pivots.amax(dim=1)
        solution = solution.squeeze(2).T
        good = regular & solution.isfinite().all(dim=0)
        return torch.where(good, solution.float(), self.basis.float())

    def equations_of_levels(self, counts: Tensor, sums: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """`normal_equations` from the number and the sum of the elements at each level, float64 [g, levels].

        Args:
            counts: of elements.
            sums: of elements.
            order: the number of the code of each level, int64 [g, levels].
        """
        codes = self.codes.double()[order]  # [g, levels, bits]
        return (codes * counts.unsqueeze(2)).mT @ codes, codes.mT @ sums.unsqueeze(2)

    def normal_equations(self, rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """B^T B [g, bits, bits] and B^T x [g, bits, 1], float64, for codes B of these numbers.

        The entries of a code are the bits u of its number, or 2u - 1 in full range. Counts and sums for one bit at a
        time are therefore enough, and B [g, n, bits] is never built.
        """
        ones = [(numbers >> i & 1).bool() for i in range(self.bits)]
        pairs = [[(a & b).sum(dim=1) for b in ones] for a in ones]
        gram = torch.stack([torch.stack(row, dim=-1) for row in pairs], dim=-2).double()
        sums = [torch.where(one, rows, 0.0).sum(dim=1, dtype=torch.float64) for one in ones]
        target = torch.stack(sums, dim=-1).unsqueeze(2)
        if self.config.half_range:
            return gram, target
        count = gram.diagonal(dim1=1, dim2=2)
        gram = 4 * gram - 2 * count.unsqueeze(1) - 2 * count.unsqueeze(2) + numbers.shape[1]
        return gram, 2 * target - rows.sum(dim=1, dtype=torch.float64).reshape(-1, 1, 1)

    def regularised(self, gram: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """B^T B [g, bits, bits] and B^T x [g, bits, 1], so that the system can be solved."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> QuantizedTensor:
        """Codes as positions in the sorted levels, and the levels as the codebook."""
        positions, levels, _ = self.assign(self.grouped(x))
        rows = self.per_channel(torch.arange(self.groups, device=x.device).reshape(self.range_shape()))
        numbers = self.ungrouped(positions, x)
        return QuantizedTensor(
            codes=numbers.to(torch.int32),
            scale=None,
            numbers=numbers,
            codebook=levels,
            factor=x.new_ones(1),
            rows=rows,
        )

    def set_range(self, value: Tensor) -> None:
        """Scale the basis so that its top level is `value`."""
        first = 2.0 ** torch.arange(self.bits, device=value.device).unsqueeze(1).expand_as(self.basis)
        shape = torch.where(self.sorted_levels()[0][:, -1] > 0, self.basis, first)
        self.basis.copy_(shape * (value.reshape(-1) / (self.codes @ shape).amax(dim=0)))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest level."""
        levels, _ = self.sorted_levels()
        return levels[:, 0].reshape(self.range_shape()), levels[:, -1].reshape(self.range_shape())

    def current_range(self) -> Tensor:
        """The top level."""
        return self.sorted_levels()[0][:, -1].reshape(self.range_shape())

    def initialise_from(self, x: Tensor) -> None:
        """Alternate codes and least-squares basis on `x`, from a basis that covers it (algorithm 1)."""
        with torch.no_grad():
            rows = self.grouped(self.normalise(x.float()))
            spread = 3 * self.mean_over_ranks(rows.square().mean(dim=1)).sqrt()
            alive = spread > 0  # a group of zeros keeps its basis
            start = torch.where(alive, spread, self.current_range().reshape(-1))
            self.set_range(start.reshape(self.range_shape()))
            for _ in range(REFINEMENTS):
                positions, _, order = self.assign(rows)
                best = self.least_squares(*self.normal_equations(rows, order.gather(1, positions)))
                self.basis.copy_(torch.where(alive, best, self.basis))

    def safe_divisor(self, value: Tensor) -> Tensor:
        """A statistic plus 1e-5, as published; 1e-5 where that is zero, as with a mean of -1e-5."""
        divisor = value + 1e-5
        return torch.where(divisor == 0, 1e-5, divisor)


@register("lq", "fm", "ot")
class LQActivation(LQ):
    """LQ-Nets on activations; see `LQ`. Gradient: 1 below the top level, 0 at or above it."""

    def initial_scale(self) -> float:
        """0.6745 * 2: the quartile of a unit normal distribution."""
        return 0.6745 * 2

    def regularised(self, gram: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Replace a zero on the diagonal, from a code that no element has, by 1e-5."""
        diagonal = gram.diagonal(dim1=1, dim2=2)
        return gram + torch.diag_embed(torch.where(diagonal == 0, 1e-5, 0.0)), target


@register("lq", "wt")
class LQWeight(LQ):
    """LQ-Nets on weights; see `LQ`. Gradient: straight-through."""

    pure: ClassVar[bool] = True

    def initial_scale(self) -> float:
        """0.6745 * sqrt(2 / fan)."""
        return 0.6745 * (2 / self.site.fan) ** 0.5

    def regularised(self, gram: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Replace each diagonal entry d by (d + 1e-4) * 1.000001, and add 1e-4 * basis to B^T x."""
        diagonal = gram.diagonal(dim1=1, dim2=2)
        gram = gram + torch.diag_embed((diagonal + 1e-4) * 1.000001 - diagonal)
        return gram, target + 1e-4 * self.basis.T.double().unsqueeze(2)
