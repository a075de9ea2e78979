"""Quantizers of other libraries as methods of one's own: the keywords `brevitas`, `torchao` and `lsq-net`.

    python main.py --keyword_file benchmarks/peer_methods.py --keyword digits,origin,cbsa,brevitas ...

So the same network, start, batches, schedule and loop train with each. Weights have a learned scale per output channel,
activations one per tensor; with `--re_init` all start at the clip value of LSQ's formula, as ours. Brevitas and torchao
are those of requirement-peers.txt; `lsq-net` is LSQ's paper as zhutmost/lsq-net computes it: levels of two's
complement, and a straight-through gradient by autograd.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import TorchAORows
from model.quant import Grid, LayerSite, MethodRecord, Quantizer, QuantizerConfig, register
from model.quantizers.grid import ScaleGradient, initial_clip
from utils.config import keyword
from utils.errors import UserError

RECORD = MethodRecord(reads=frozenset({"re_init"}))


class Peer(Quantizer):
    """A quantizer of another library; a peer says in `build` what it is, and in `set_step` where its step lies."""

    def __init__(self, config: QuantizerConfig, site: LayerSite) -> None:
        super().__init__(config, site)
        self.bits = (config.levels - 1).bit_length()
        self.signed = config.tag == "wt"
        if self.top() < 1:
            raise UserError(
                f"{site.name}: {config.method} has no weights of 1 bit here: give --wt_bit 2 or more"
            )
        self.build()

    def zero_to_zero(self) -> bool:
        """See `Quantizer`: all have a level at zero, so that padding neither is quantized nor shifts the start."""
        return True

    def top(self) -> int:
        """The highest code."""
        return 2 ** (self.bits - self.signed) - 1

    def build(self) -> None:
        """Make the other library's module."""
        raise NotImplementedError

    def set_step(self, step: Tensor) -> None:
        """Take `step`, float32 of `range_shape`, as the distance of levels."""
        raise NotImplementedError

    def initialise_from(self, x: Tensor) -> None:
        """LSQ's first step for each group."""
        with torch.no_grad():
            mean = self.grouped(x.float().abs()).mean(1).reshape(self.range_shape())
            grid = Grid.of(self.levels, not self.signed, midtread=self.signed and self.levels > 2)
            self.set_step(initial_clip(mean, grid) / self.top())


class Brevitas(Peer):
    """The parts of which its `Int8WeightPerChannelFloat` and `Uint8ActPerTensorFloat` with learned scales consist.

    Its signed levels are symmetric, so that weights of 2 bits are ternary.
    """

    def build(self) -> None:
        """See `Peer`."""
        from brevitas.core.bit_width import BitWidthConst  # pyright: ignore[reportMissingImports]
        from brevitas.core.function_wrapper import Identity  # pyright: ignore[reportMissingImports]
        from brevitas.core.quant import IntQuant, RescalingIntQuant  # pyright: ignore[reportMissingImports]
        from brevitas.core.scaling import IntScaling, ParameterScaling  # pyright: ignore[reportMissingImports]
        from brevitas.core.zero_point import ZeroZeroPoint  # pyright: ignore[reportMissingImports]

        shape = self.range_shape() if self.signed else ()
        self.scaling = ParameterScaling(scaling_init=1.0, scaling_shape=shape or None, scaling_min_val=1e-6)
        self.inner: Any = RescalingIntQuant(
            int_quant=IntQuant(narrow_range=self.signed, signed=self.signed, input_view_impl=Identity()),
            scaling_impl=self.scaling,
            int_scaling_impl=IntScaling(signed=self.signed, narrow_range=self.signed),
            zero_point_impl=ZeroZeroPoint(),
            bit_width_impl=BitWidthConst(self.bits),
        )

    def set_step(self, step: Tensor) -> None:
        """See `Peer`; its parameter is the largest value."""
        self.scaling.value.data.copy_((step * self.top()).reshape(self.scaling.value.shape))

    def quantize(self, x: Tensor) -> Tensor:
        """Float32 of any shape to the nearest level."""
        return self.inner(x)[0]


class TorchAO(Peer):
    """Its range learning, see `TorchAORows`."""

    def build(self) -> None:
        """See `Peer`."""
        rows = self.site.channels if self.signed else 1
        self.inner = TorchAORows(torch.rand(rows, 8), rows, self.bits, signed=self.signed)

    def set_step(self, step: Tensor) -> None:
        """See `Peer`."""
        scale = self.inner.quantizer.scale
        scale.data.copy_(step.reshape(scale.shape))

    def quantize(self, x: Tensor) -> Tensor:
        """Float32 of any shape to the nearest level."""
        return self.inner(x)


class Round(torch.autograd.Function):
    """Rounding whose gradient is 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class LSQNet(Peer):
    """s * round(clamp(x / s, lowest, highest)), with the gradient of s times 1 / sqrt(elements * highest)."""

    def build(self) -> None:
        """See `Peer`."""
        self.step = nn.Parameter(torch.ones(self.range_shape()))

    def set_step(self, step: Tensor) -> None:
        """See `Peer`."""
        self.step.copy_(step)

    def quantize(self, x: Tensor) -> Tensor:
        """Float32 of any shape to the nearest level."""
        factor = 1 / math.sqrt(x.numel() * self.top())
        step = ScaleGradient.apply(self.step, factor)
        ratio = (x / step).clamp(-self.top() - 1 if self.signed else 0, self.top())
        return Round.apply(ratio) * step


for word, kind in (("brevitas", Brevitas), ("torchao", TorchAO), ("lsq-net", LSQNet)):
    register(word, "fm", "wt", record=RECORD)(kind)
    keyword.register(
        keyword.Keyword(
            name=word,
            group="quantizer",
            help=f"the quantizers of {word}",
            sets={f"quant.{tag}.method": word for tag in ("fm", "wt")},
        )
    )
