"""The frame that every quantizer shares: precision, warm-up, groups, normalisation, learned scale.

Formulas of the methods and of the options: docs/quantizers.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model.quantizers import adaptive
from model.quantizers.grid import Grid
from model.quantizers.integers import QuantizedTensor
from model.quantizers.site import LayerSite, group_count, undivided
from utils.config.schema import QuantizerConfig
from utils.errors import UserError


# Named after the module: the repository and the installed package may be imported in one process.
@torch.library.custom_op(f"lowbit::snapshot_{__name__.replace('.', '_')}", mutates_args=())
def snapshot(value: Tensor) -> Tensor:
    """A copy that a compiled graph keeps for its backward pass.

    From a buffer, the compiler would compute the value anew there, when forward has already changed it.
    """
    return value.clone()


@snapshot.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


class Quantizer(nn.Module):
    """The frame around a method: precision, warm-up, groups, normalisation and learned scale.

    `forward` takes a tensor of any floating dtype, computes in float32 whatever autocast says, and
    returns the input's dtype and shape. Subclasses implement `quantize` on float32 tensors.

    State:
        iteration: int64 [1], training forwards so far (buffer).
        level_num: int64 [1], number of levels (buffer; mirrors the attribute `levels`).
        range_mean: float32, `range_shape`, the calibrated range; only with a warm-up (buffer).
        gamma: float32, learned scale per group; only when asked for.

    Raises:
        UserError: when the number of groups does not divide the channels.
    """

    iteration: Tensor
    level_num: Tensor
    range_mean: Tensor
    level_limit: ClassVar[int | None] = None  # the most levels the method is defined for
    published: ClassVar[Mapping[str, str]] = {}  # names in published files -> names of the state
    obsolete: ClassVar[frozenset[str]] = frozenset()  # names in published files that are not needed
    keeps_float32: ClassVar[bool] = True  # also in a network that is made half, see utils.step.precision

    def __init__(self, config: QuantizerConfig, site: LayerSite) -> None:
        super().__init__()
        self.config = config
        self.site = site
        self.levels = config.levels
        self.enabled = True  # a policy may let the input pass
        self.groups = self._resolve_groups(config.quant_group)
        self.register_buffer("iteration", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("level_num", torch.full((1,), self.levels, dtype=torch.int64))
        self.stable = config.stable  # training forwards of the warm-up; `set_stable` knows the epochs' length
        self.calibrates = config.stable > 0 or config.stable_epoch > 0
        if self.calibrates:
            self.register_buffer("range_mean", torch.zeros(self.range_shape()))
        if config.gamma:
            self.gamma = nn.Parameter(torch.ones(self.range_shape()))

    # What others ask a method ----------------------------------------------------------------

    # Methods, not properties: in a graph of `torch.compile`, `super().some_property` is the property itself, which
    # is true whatever its value is.
    def zero_to_zero(self) -> bool:
        """Whether 0 becomes exactly 0, so that padding may come before or after."""
        return False

    def output_is_sign(self) -> bool:
        """Whether an output tells no more of an input than its sign, which must then go below zero sometimes."""
        return False

    def half_range_changes(self) -> bool:
        """Whether a policy may turn levels in [0, c] into levels in [-c, c], or back, while the network is trained.

        A method says so whose `quantize` asks `config.half_range` each time.
        """
        return False

    def search_grid(self) -> Grid | None:
        """The levels over the clip value that a search may find (`--re_init_range`); None: there is none to find."""
        return None

    def range_error(self, x: Tensor) -> Tensor | None:
        """The sum of (q - x)^2 with a gradient to the clip value that is learned; None where none is.

        Args:
            x: float32, any shape, without gradient.

        Returns:
            float32 [].
        """
        return None

    def figures(self) -> dict[str, Tensor]:
        """What this method alone has to show of its state in reports: vectors by name."""
        return {}

    # What a method implements ------------------------------------------------------------------

    def quantize(self, x: Tensor) -> Tensor:
        """Fake-quantize a float32 tensor; differentiable."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> QuantizedTensor:
        """The integer codes of a float32 tensor whose dequantized values equal `quantize(x)` exactly."""
        raise NotImplementedError

    def set_range(self, value: Tensor) -> None:
        """Take `value` (float32, `range_shape`) as the clip value; methods without one ignore it."""

    def initialise_from(self, x: Tensor) -> None:
        """Initialise the parameters from a full-precision tensor (`--re_init`); default: none."""

    # The frame ---------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Quantize `x`; any floating dtype and shape in, the same dtype and shape out.

        Raises:
            ValueError: for an empty tensor, which has no range and no statistics.
        """
        if x.numel() == 0:
            raise ValueError(f"{self.site.name}: cannot quantize an empty tensor of shape {tuple(x.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            full = x.float()
            if self.training:
                self.iteration.add_(1)
                if self.calibrates:
                    self._collect_range(full)
            if not self.enabled:
                return x
            result = self._transform(full)
            if self.calibrates:
                result = torch.where(self.warming_up(), full, result)
            return result.to(x.dtype)

    def integers(self, x: Tensor) -> QuantizedTensor:
        """The integer codes of `x` (any floating dtype) as this quantizer stands; changes nothing.

        Dequantizing gives exactly the float32 tensor that `forward` gives in evaluation mode after the
        warm-up.
        """
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            normed, taken = self._normalised(x.float())
            extra: dict[str, Tensor] = {}
            if self.config.adaptive_restore and taken is not None:
                extra = {"mean": taken.mean, "deviation": taken.deviation}
            if self.config.gamma:
                extra["gamma"] = self.per_channel(self.gamma.float())
            return dataclasses.replace(self.encode(normed), **extra)

    def _transform(self, x: Tensor) -> Tensor:
        normed, taken = self._normalised(x)
        result = self.quantize(normed)
        if self.config.adaptive_restore and taken is not None:
            result = adaptive.restored(result, taken)
        if self.training and self.config.proxquant_step > 0:
            blended = snapshot(self.iteration) - self.stable
            share = (1 - blended / self.config.proxquant_step).clamp(0, 1)
            result = share * (x if self.config.adaptive_restore else normed) + (1 - share) * result
        return result * self.per_channel(self.gamma.float()) if self.config.gamma else result

    def normalise(self, x: Tensor) -> Tensor:
        """Float32 `x` as the method sees it, after `adaptive`."""
        return self._normalised(x)[0]

    def _normalised(self, x: Tensor) -> tuple[Tensor, adaptive.Moments | None]:
        """The tensor as the method sees it, and what was taken out."""
        if self.config.adaptive == "none":
            return x, None
        taken = adaptive.Moments(*self._statistics(x))
        # The gradient of a learned value is itself that of the restored tensor times the deviation.
        learned = [name for name, _ in self.named_parameters(recurse=False) if name != "gamma"]
        if self.config.adaptive_restore and not learned:
            taken = taken._replace(unit=adaptive.gradient_unit(taken.deviation))
        return adaptive.normalised(x, taken), taken

    def warming_up(self) -> Tensor:
        """Bool [1]: the quantizer still passes its input through (`--stable`)."""
        return self.iteration <= self.stable if self.training else ~self.warmed_up()

    def warmed_up(self) -> Tensor:
        """Bool [1]: the next forward pass comes after the warm-up, between the passes of training too."""
        return self.iteration >= self.stable

    def set_stable(self, steps_per_epoch: int) -> None:
        """Fix the length of the warm-up: the longer of `stable` and `stable_epoch` epochs."""
        self.stable = max(self.config.stable, self.config.stable_epoch * steps_per_epoch)

    def set_levels(self, levels: int, *, keep_step: bool = False) -> tuple[nn.Parameter, ...]:
        """Change the number of levels; the range stays.

        Args:
            levels: the new number.
            keep_step: where the method learns a clip value, move it instead, so that neighbouring levels stay
                as far apart as they are (`progressive`).

        Returns:
            The parameters that were changed; an optimizer's momentum of them is out of date.

        Raises:
            UserError: the method does not take this number.
        """
        self.check_levels(levels)
        changed = self.rescale(levels) if keep_step and levels != self.levels else ()
        self.levels = levels
        self.level_num.fill_(levels)
        return changed

    def check_levels(self, levels: int) -> None:
        """Refuse, with a `UserError`, a number of levels that the method does not take."""
        if levels < 2:
            raise UserError(f"{self.site.name}: a quantizer needs at least 2 levels, not {levels}")
        if self.level_limit is not None and levels > self.level_limit:
            raise UserError(
                f"{self.site.name}: {self.config.method} takes at most {self.level_limit} levels, not {levels}"
            )

    def rescale(self, levels: int) -> tuple[nn.Parameter, ...]:
        """Change the range so that `levels` levels are as far apart as now; default: no parameter does that."""
        return ()

    def adapted(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """The entries of this quantizer in a checkpoint of another number of levels, as they fit this one."""
        return entries | {"level_num": self.level_num.clone()}

    def learned(self) -> set[str]:
        """The names in its state that training gives values to, without which it cannot be evaluated.

        The parameters, and behind a warm-up the count that says that it is over.
        """
        return {name for name, _ in self.named_parameters()} | ({"iteration"} if self.calibrates else set())

    def weights_loaded(self) -> None:
        """Take over what `utils.checkpoint.weights` has copied into the state: the number of levels.

        Raises:
            ValueError: it is none.
        """
        found = float(self.level_num)
        if not 2 <= found <= 2**16:
            raise ValueError(f"a level_num is {self.level_num.tolist()}")
        self.set_levels(int(found))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.levels = int(self.level_num)

    # Groups ------------------------------------------------------------------------------------

    def _resolve_groups(self, requested: int | None) -> int:
        channels = self.site.channels
        weight = self.config.tag == "wt"
        if requested is None:
            return channels if weight else 1
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
        """A value per group (`range_shape`) as one per channel, broadcastable to the tensor."""
        if self.groups in (1, self.site.channels):
            return value
        return value.repeat_interleave(self.site.channels // self.groups, dim=self.site.channel_dim)

    def grouped(self, x: Tensor) -> Tensor:
        """The elements of each group as a row: [g, elements per group]."""
        if self.groups == 1:
            return x.reshape(1, -1)
        return x.movedim(self.site.channel_dim, 0).reshape(self.groups, -1)

    def levels_per_sample(self) -> bool:
        """The levels of a tensor's samples differ: normalised per sample and restored."""
        return self.config.tag != "wt" and self.config.adaptive != "none" and self.config.adaptive_restore

    def level_rows(self, output: Tensor) -> Tensor:
        """A quantized tensor's values as rows that share their levels: [rows, values]."""
        if not self.levels_per_sample():
            return self.grouped(output)
        channels = output.movedim(self.site.channel_dim, 1)
        return channels.reshape(output.shape[0] * self.groups, -1)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What to subtract and to divide by: of each weight group, or of each sample; no gradient.

        `var-mean` and `mean-var` subtract the mean and divide by the standard deviation (unbiased); `var`
        divides by the deviation alone, `mean` by the mean alone. A group with zero variance is divided by
        a small number instead of zero, which keeps its (x - mean) / deviation = 0 finite.
        """
        x = x.detach()
        weight = self.config.tag == "wt"
        rows = self.grouped(x) if weight else x.flatten(1)
        shape = self.range_shape() if weight else (-1,) + (1,) * (x.ndim - 1)
        mean, spread = (value.reshape(shape) for value in adaptive.moments(rows))
        deviation = self.safe_divisor(spread)
        if weight:
            mean, deviation = self.per_channel(mean), self.per_channel(deviation)
        kind = self.config.adaptive
        if kind == "mean":
            return torch.zeros_like(mean), self.safe_divisor(mean)
        return (mean if "mean" in kind else torch.zeros_like(mean)), deviation

    def safe_divisor(self, value: Tensor) -> Tensor:
        """A statistic as a divisor, away from zero."""
        return torch.where(value.abs() < MIN_DIVISOR, MIN_DIVISOR, value)

    # Calibration -------------------------------------------------------------------------------

    def _collect_range(self, x: Tensor) -> None:
        """Running mean of the groups' max |x| over the first `stable` training iterations."""
        with torch.no_grad():
            largest = self.grouped(self.normalise(x.detach())).abs().amax(dim=1).reshape(self.range_shape())
            largest = self.over_ranks(largest, torch.distributed.ReduceOp.MAX)
            mean = self.range_mean + (largest - self.range_mean) / self.iteration
            collecting = self.iteration <= self.stable
            self.range_mean.copy_(torch.where(collecting, mean, self.range_mean))
            factor = self.config.correlate if self.config.correlate > 0 else 1.0
            # Setting a range may change what it is made of, so everything is put back after the warm-up.
            tensors = (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False))
            floats = [tensor for _, tensor in tensors if tensor.is_floating_point()]
            before = [tensor.clone() for tensor in floats]
            self.set_range((self.range_mean * factor).clamp_max(torch.finfo(torch.float32).max))
            for tensor, old in zip(floats, before, strict=True):
                tensor.copy_(torch.where(collecting, tensor, old))

    def gathers(self) -> bool:
        """Whether a training forward reduces statistics over all ranks, which wait for each other there."""
        return self.calibrates

    def mean_over_ranks(self, statistic: Tensor) -> Tensor:
        """The mean over all ranks of a statistic of their tensors, which are of one size; see `over_ranks`."""
        total = self.over_ranks(
            torch.stack([statistic, torch.ones_like(statistic)]), torch.distributed.ReduceOp.SUM
        )
        return total[0] / total[1]

    def over_ranks(self, statistic: Tensor, operation: torch.distributed.ReduceOp.RedOpType) -> Tensor:
        """A statistic of this rank's tensor reduced over all ranks; weights are the same on each already."""
        if (
            self.config.tag != "wt"
            and torch.distributed.is_available()
            and torch.distributed.is_initialized()
        ):
            statistic = statistic.contiguous()
            torch.distributed.all_reduce(statistic, op=operation)
        return statistic

    def bounds(self) -> tuple[Tensor, Tensor] | None:
        """The lowest and the highest value that is not clipped (`range_shape`), in units of `normalise`.

        None for methods whose levels do not depend on a range.
        """
        return None

    def current_range(self) -> Tensor:
        """The clip value now (`range_shape`); the configured boundary where there is none."""
        return torch.full(self.range_shape(), self.config.boundary, device=self.iteration.device)

    def elements(self, x: Tensor) -> float:
        """Elements of `x` in one group."""
        return x.numel() / self.groups

    def gradient_factor(self, x: Tensor, qp: float) -> float:
        """The factor on the gradient of the learned clip value c (`xx_grad_scale`).

        `paper` moves the step s = c / Qp as arXiv 1902.08153, section 2.2, does, which multiplies its
        gradient by 1 / sqrt(N * Qp), N elements of a weight or of one sample's activation: a gradient
        step of c moves s by 1 / Qp of it and dL/dc is dL/ds / Qp, hence Qp^2 / sqrt(N * Qp) for c.
        """
        kind, scale = self.config.grad_scale, self.config.scale
        if kind == "none":
            return 1.0
        if kind == "paper":
            samples = 1 if self.config.tag == "wt" else x.shape[0]
            return qp**2 / math.sqrt(max(self.elements(x) / samples, 1.0) * qp)
        count = self.site.fan if "fan" in kind else self.elements(x)
        return math.sqrt(count) * scale if kind.endswith("-scale") else scale / math.sqrt(count)

    def extra_repr(self) -> str:
        """What `print(model)` shows of a quantizer."""
        return f"{self.config.tag}, {self.config.method}, levels={self.levels}, groups={self.groups}"


MIN_DIVISOR = 1e-5
