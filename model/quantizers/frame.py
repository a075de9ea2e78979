"""The frame that every quantizer shares: precision, warm-up, groups, normalisation, learned scale.

Formulas of the methods and of the options: docs/quantizers.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from model.quantizers import adaptive
from model.quantizers.autocast import autocasts, without_autocast
from model.quantizers.grid import Grid
from model.quantizers.groups import Grouped
from model.quantizers.integers import QuantizedTensor
from model.quantizers.kept import KeptWeight
from model.quantizers.kernels import generated, in_processes, kernels_fit
from model.quantizers.site import LayerSite
from model.quantizers.snapshot import snapshot
from utils.config.schema import QuantizerConfig
from utils.errors import UserError


class Quantizer(Grouped):
    """The frame around a method: precision, warm-up, groups, normalisation and learned scale.

    `forward` takes a tensor of any floating dtype, computes in float32 whatever autocast says, and returns the
    dtype and shape of its input. A method is a subclass that implements `quantize` on float32 tensors; `encode` gives
    the integers to the audit and to engines; `model.quant.register` gives the method its name.

    Args:
        config: the options of its tag.
        site: its place in the network.

    State:
        iteration: int64 [1], training forwards so far (buffer).
        level_num: int64 [1], number of levels (buffer; mirrors the attribute `levels`).
        range_mean: float32, `range_shape`, the calibrated range; only with a warm-up (buffer).
        gamma: float32, learned scale per group; only when asked for.

    Raises:
        UserError: the number of groups does not divide the channels.

    Example:
        >>> import torch
        >>> from model.quant import LayerSite, Quantizer, QuantizerConfig
        >>> class Ternary(Quantizer):
        ...     def quantize(self, x):
        ...         return x + (x.clamp(-1, 1).round() - x).detach()  # straight-through
        >>> config = QuantizerConfig(tag="wt", enable=True, method="ternary", levels=3, gamma=True)
        >>> quantizer = Ternary(config, LayerSite(name="fc", channels=2, channel_dim=0, ndim=2, fan=2))
        >>> quantizer.gamma.shape, quantizer(torch.tensor([[0.4, 0.6], [-3.0, 0.9]])).detach()
        (torch.Size([2, 1]), tensor([[ 0.,  1.],
                [-1.,  1.]]))
    """

    iteration: Tensor
    level_num: Tensor
    range_mean: Tensor
    level_limit: ClassVar[int | None] = None  # the most levels the method is defined for
    published: ClassVar[Mapping[str, str]] = {}  # names in published files -> names of the state
    obsolete: ClassVar[frozenset[str]] = frozenset()  # names in published files that are not needed
    keeps_output: bool = False  # whether `quantize` may keep its result for the backward pass, without a copy
    # Evaluated, it depends on input, parameters, buffers and attributes of this object alone; not inherited, see
    # `KeptWeight`.
    pure: ClassVar[bool] = False
    generated: bool = False  # whether kernels that `torch.compile` generates compute it, see `--kernels`
    keeps_float32: ClassVar[bool] = True  # also in a network that is made half, see utils.step.precision

    def __init__(self, config: QuantizerConfig, site: LayerSite) -> None:
        super().__init__()
        self.config = config
        self.site = site
        self.levels = config.levels
        self.kept = KeptWeight()
        self.enabled = True  # a policy may let the input pass; `keep_full_precision` says that this is wanted
        self.groups = self._resolve_groups(config.quant_group)
        self.register_buffer("iteration", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("level_num", torch.full((1,), self.levels, dtype=torch.int64))
        self.stable = config.stable  # training forwards of the warm-up; `set_stable` knows the epochs' length
        self.calibrates = config.stable > 0 or config.stable_epoch > 0
        # False when they are over, see `settle`.
        self.calibrating, self.blending = self.calibrates, config.proxquant_step > 0
        if self.calibrates:
            self.register_buffer("range_mean", torch.zeros(self.range_shape()))
        if config.gamma:
            self.gamma = nn.Parameter(torch.ones(self.range_shape()))

    # Questions that other code asks a method ---------------------------------------------------

    # Methods, not properties: in a graph of `torch.compile`, `super().some_property` is the property object, which
    # is always true.
    def zero_to_zero(self) -> bool:
        """Whether 0 becomes exactly 0, so that padding before and after quantizing is the same."""
        return False

    def sign_threshold(self) -> Tensor | None:
        """What an input is above or below, where the output says that alone; it must then be below it sometimes.

        Returns:
            float32, broadcastable to the input; None where an output says more.
        """
        return None

    def half_range_changes(self) -> bool:
        """Whether a policy may turn levels in [0, c] into levels in [-c, c], or back, while the network is trained.

        A method may return True when its `quantize` reads `config.half_range` each time.
        """
        return False

    def search_grid(self) -> Grid | None:
        """The levels in units of the clip value, for a search for it (`--re_init_range`); None: no clip value."""
        return None

    def range_error(self, x: Tensor) -> Tensor | None:
        """The sum of (q - x)^2 with a gradient to the learned clip value; None where no clip value is learned.

        Args:
            x: float32, any shape, without gradient.

        Returns:
            float32 [].
        """
        return None

    def figures(self) -> dict[str, Tensor]:
        """Parts of the state that only this method has and that reports show: name -> vector."""
        return {}

    # The parts that a method implements --------------------------------------------------------

    def quantize(self, x: Tensor) -> Tensor:
        """Fake-quantize a float32 tensor; differentiable."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> QuantizedTensor:
        """The integer codes of a float32 tensor whose dequantized values equal `quantize(x)` exactly."""
        raise NotImplementedError

    def on_grid(self, x: Tensor) -> tuple[Tensor, Tensor, Grid] | None:
        """The arguments of `encode_on_grid` with which `encode` calls it, if it does."""
        return None

    def set_range(self, value: Tensor) -> None:
        """Take `value` (float32, `range_shape`) as the clip value; methods without one ignore it."""

    def initialise_from(self, x: Tensor) -> None:
        """Initialise the parameters from a full-precision tensor (`--re_init`); default: none."""

    # The frame ---------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Quantize `x`; any floating dtype and shape in, the same dtype and shape out.

        Raises:
            ValueError: the tensor is empty, and has no range and no statistics.
            RuntimeError: `torch.utils.checkpoint` computes the pass again, and the first one has changed the state.
        """
        if x.numel() == 0:
            raise ValueError(f"{self.site.name}: cannot quantize an empty tensor of shape {tuple(x.shape)}")
        compiling = torch.compiler.is_compiling()
        if not compiling and self.enabled and KeptWeight.fits(self, x):
            return self.kept.of(self, x, lambda: self._chosen(x, False, compiling))
        counts = self.training and not self._repeats()
        if counts and self.iteration.device.type == "cpu" and not compiling:
            self.settle()
        return self._chosen(x, counts, compiling)

    def _chosen(self, x: Tensor, counts: bool, compiling: bool) -> Tensor:
        """`_compute`, in generated kernels where they are wanted and fit."""
        if torch.is_grad_enabled():
            # A layer keeps its input and weight, but in half precision a copy; an output may be changed in place.
            mixed = x.dtype != torch.float32 or autocasts(x)
            self.keeps_output = self.config.tag != "ot" and not mixed and not self.generated
        kernels = self.generated and not compiling and kernels_fit(gathers=self.gathers())
        return (generated(Quantizer._compute) if kernels else Quantizer._compute)(self, x, counts)

    def _compute(self, x: Tensor, counts: bool) -> Tensor:
        """`forward` of a tensor that is not empty; `counts`: it is a training pass."""
        with without_autocast(x):
            return self._computed(x, counts)

    def _computed(self, x: Tensor, counts: bool) -> Tensor:
        full = x.float()
        if counts:
            self.iteration.add_(1)
            if self.calibrating:
                self._collect_range(full)
        if not self.enabled:
            return x
        result = self._transform(full)
        if self.calibrating:
            result = torch.where(self.warming_up(), full, result)
        return result.to(x.dtype)

    def train(self, mode: bool = True) -> Self:
        """See `nn.Module`; then `settle`, since nothing waits for the counter in a pass."""
        self.settle()
        if mode:
            self.kept.clear()
        return super().train(mode)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a pickle or a copy; those of modules that an earlier version pickled lack some."""
        super().__setstate__(state)
        later = {
            "kept": KeptWeight(),
            "calibrating": self.calibrates,
            "blending": self.config.proxquant_step > 0,
        }
        vars(self).update(later | vars(self))

    def settle(self) -> None:
        """Note whether warm-up and blending are over, after which they cost nothing; waits for the device.

        On a CPU each training pass does it, elsewhere and in a compiled graph each call of `train` and `eval`. Until
        then they are computed and have no effect. A counter without a value (torch's fake tensors) changes nothing.
        """
        steps = self.config.proxquant_step
        if not (self.calibrates or steps) or type(self.iteration) is not Tensor:
            return
        if self.iteration.device.type != "meta":
            count = int(self.iteration)
            self.calibrating = self.calibrates and count < self.stable
            self.blending = steps > 0 and count < self.stable + steps

    def _repeats(self) -> bool:
        """Whether a backward pass is running, in which `torch.utils.checkpoint` calls a forward pass again."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return False
        if not self.repeats():
            raise RuntimeError(
                f"{self.site.name}: {self.config.method} with these options changes with each training pass, so that "
                "torch.utils.checkpoint would compute another one; leave this layer out of what it recomputes"
            )
        return True

    def repeats(self) -> bool:
        """Whether a training pass, computed again, gives the same: it depends on no pass before it."""
        return not (self.gathers() or self.blending)

    def integers(self, x: Tensor) -> QuantizedTensor:
        """The integer codes of `x` (any floating dtype) in the present state, which does not change.

        Dequantizing gives exactly the float32 tensor that `forward` returns in evaluation mode after the warm-up.
        """
        with torch.no_grad(), without_autocast(x):
            normed, taken = self.normalised(x.float())
            extra: dict[str, Tensor] = {}
            if self.config.adaptive_restore and taken is not None:
                extra = {"mean": taken.mean, "deviation": taken.deviation}
            if self.config.gamma:
                extra["gamma"] = self.per_channel(self.gamma.float())
            return dataclasses.replace(self.encode(normed), **extra)

    def _transform(self, x: Tensor) -> Tensor:
        normed, taken = self.normalised(x)
        result = self.quantize(normed)
        if self.config.adaptive_restore and taken is not None:
            result = adaptive.restored(result, taken)
        if self.training and self.blending:
            blended = snapshot(self.iteration) - self.stable
            share = (1 - blended / self.config.proxquant_step).clamp(0, 1)
            result = share * (x if self.config.adaptive_restore else normed) + (1 - share) * result
        return result * self.per_channel(self.gamma.float()) if self.config.gamma else result

    def normalise(self, x: Tensor) -> Tensor:
        """Float32 `x` normalised by `adaptive`, as `quantize` gets it."""
        return self.normalised(x)[0]

    def normalised(self, x: Tensor) -> tuple[Tensor, adaptive.Moments | None]:
        """The normalised tensor, and its moments where it was normalised."""
        if self.config.adaptive == "none":
            return x, None
        taken = adaptive.Moments(*self._statistics(x))
        # The gradient of a learned value is the gradient of the restored tensor times the deviation, without a unit.
        learned = [name for name, _ in self.named_parameters(recurse=False) if name != "gamma"]
        if self.config.adaptive_restore and not learned:
            taken = taken._replace(unit=adaptive.gradient_unit(taken.deviation))
        return adaptive.normalised(x, taken), taken

    def warming_up(self) -> Tensor:
        """Bool [1]: the quantizer still passes its input through (`--stable`)."""
        return self.iteration <= self.stable if self.training else ~self.warmed_up()

    def warmed_up(self) -> Tensor:
        """Bool [1]: the next forward pass comes after the warm-up; this holds between training passes too."""
        return self.iteration >= self.stable

    def set_stable(self, steps_per_epoch: int) -> None:
        """Fix the length of the warm-up: the longer of `stable` and `stable_epoch` epochs."""
        self.stable = max(self.config.stable, self.config.stable_epoch * steps_per_epoch)
        self.settle()

    def set_levels(self, levels: int, *, keep_step: bool = False) -> tuple[nn.Parameter, ...]:
        """Change the number of levels; the range stays.

        Args:
            levels: the new number.
            keep_step: where the method learns a clip value, change it so that the distance between neighbouring
                levels stays (`progressive`).

        Returns:
            The parameters that were changed; the momentum that an optimizer has for them is out of date.

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
        """Change the range so that `levels` levels have the present distance; default: there is no such parameter."""
        return ()

    def of_another_method(self, held: Collection[str]) -> bool:
        """Whether the names of the state that a checkpoint holds show another method, which means others by them."""
        return False

    def adapted(self, entries: dict[str, Tensor]) -> dict[str, Tensor]:
        """Entries of a checkpoint with other levels, or `of_another_method`, changed so that they fit this one."""
        return entries | {"level_num": self.level_num.clone()}

    def learned(self) -> set[str]:
        """The names of the state that training sets, without which the quantizer cannot be evaluated.

        These are the parameters and, with a warm-up, the count that says that it is over.
        """
        return {name for name, _ in self.named_parameters()} | ({"iteration"} if self.calibrates else set())

    def weights_loaded(self) -> None:
        """Take over the number of levels that `utils.checkpoint.weights` has copied into the state.

        Raises:
            ValueError: the value is no number of levels.
        """
        found = float(self.level_num)
        if not 2 <= found <= 2**16:
            raise ValueError(f"a level_num is {self.level_num.tolist()}")
        self.set_levels(int(found))
        self.settle()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.levels = int(self.level_num)
        self.settle()

    # Normalisation -----------------------------------------------------------------------------

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The subtrahend and the divisor for each weight group, or for each sample; without gradient.

        `var-mean` and `mean-var` subtract the mean and divide by the standard deviation (unbiased). `var` only
        divides by the deviation, `mean` only by the mean. The divisor of a group with zero variance is a small
        number instead of zero, so that (x - mean) / deviation = 0 is finite.
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
        """A statistic as a divisor that is not near zero."""
        return torch.where(value.abs() < adaptive.MIN_DIVISOR, adaptive.MIN_DIVISOR, value)

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
            # `set_range` may change any part of the state. After the warm-up each part gets its earlier value back.
            tensors = (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False))
            floats = [tensor for _, tensor in tensors if tensor.is_floating_point()]
            before = [tensor.clone() for tensor in floats]
            self.set_range((self.range_mean * factor).clamp_max(torch.finfo(torch.float32).max))
            for tensor, old in zip(floats, before, strict=True):
                tensor.copy_(torch.where(collecting, tensor, old))

    def gathers(self) -> bool:
        """Whether a training forward reduces statistics over all ranks, so that these wait for each other."""
        return self.calibrating

    def mean_over_ranks(self, statistic: Tensor) -> Tensor:
        """The mean of a statistic over all ranks, whose tensors have the same size; see `over_ranks`."""
        both = torch.stack([statistic, torch.ones_like(statistic)])
        total = self.over_ranks(both, torch.distributed.ReduceOp.SUM)
        return total[0] / total[1]

    def over_ranks(self, statistic: Tensor, operation: torch.distributed.ReduceOp.RedOpType) -> Tensor:
        """A statistic of a tensor, reduced over all ranks; weights are the same on each rank, so theirs is returned."""
        if self.config.tag != "wt" and in_processes():
            statistic = statistic.contiguous()
            torch.distributed.all_reduce(statistic, op=operation)
        return statistic

    def bounds(self) -> tuple[Tensor, Tensor] | None:
        """The lowest and the highest value that is not clipped (`range_shape`), on the normalised scale.

        None for methods whose levels do not depend on a range.
        """
        return None

    def current_range(self) -> Tensor:
        """The present clip value (`range_shape`); the configured boundary where the method has none."""
        return torch.full(self.range_shape(), self.config.boundary, device=self.iteration.device)

    def extra_repr(self) -> str:
        """The text in the brackets when a network is printed."""
        return f"{self.config.tag}, {self.config.method}, levels={self.levels}, groups={self.groups}"
