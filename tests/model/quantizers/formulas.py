"""What each method should give, by the oracles, for the cases of `tests.model.quantizers.cases`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests import oracle, uneven
from tests.oracle import Array, Groups, Result
from utils.config.schema import QuantizerConfig


@dataclass(frozen=True)
class Setting:
    """What an expectation is computed from."""

    config: QuantizerConfig
    groups: Groups
    state: Mapping[str, Array]  # the module's state; learned values as vectors [g]
    factor: float  # of the clip value's gradient

    @property
    def ste_scale(self) -> bool:
        return self.config.grad_type == "STE-scale"

    @property
    def weight(self) -> bool:
        return self.config.tag == "wt"

    @property
    def alphas(self) -> list[Array]:
        return [value for name, value in sorted(self.state.items()) if name.startswith("alpha")]


def dorefa_activation(s: Setting, x: Array, gy: Array) -> Result:
    return oracle.dorefa_activation(
        x,
        gy,
        clip=s.config.boundary,
        levels=s.config.levels,
        half_range=s.config.half_range,
        ste_scale=s.ste_scale,
    )


def dorefa_weight(s: Setting, x: Array, gy: Array) -> Result:
    return oracle.dorefa_weight(x, gy, levels=s.config.levels)


def binary_weight(s: Setting, x: Array, gy: Array) -> Result:
    return oracle.binary_weight(x, gy)


def pact(s: Setting, x: Array, gy: Array) -> Result:
    return oracle.pact(
        x, gy, clip_val=s.state["clip_val"], levels=s.config.levels, half_range=s.config.half_range,
        groups=s.groups, factor=s.factor, ste_scale=s.ste_scale,
    )  # fmt: skip


def lsq(s: Setting, x: Array, gy: Array) -> Result:
    return oracle.lsq(
        x, gy, clip_val=s.state["clip_val"], levels=s.config.levels, half_range=s.config.half_range,
        groups=s.groups, factor=s.factor,
    )  # fmt: skip


def lsq_midtread(s: Setting, x: Array, gy: Array) -> Result:
    return oracle.lsq_midtread(
        x, gy, clip_val=s.state["clip_val"], levels=s.config.levels, groups=s.groups, factor=s.factor
    )


def lsqplus(s: Setting, x: Array, gy: Array) -> Result:
    return oracle.lsqplus(
        x, gy, clip_val=s.state["clip_val"], offset=s.state["offset"], levels=s.config.levels, groups=s.groups,
        factor=s.factor,
    )  # fmt: skip


def ewgs(s: Setting, x: Array, gy: Array) -> Result:
    return oracle.ewgs(
        x, gy, clip_val=s.state["clip_val"], levels=s.config.levels, half_range=s.config.half_range,
        delta=s.config.grad_delta, groups=s.groups, factor=s.factor,
    )  # fmt: skip


def stableqat(s: Setting, x: Array, gy: Array) -> Result:
    return oracle.stableqat(
        x, gy, clip_val=s.state["clip_val"], levels=s.config.levels, half_range=s.config.half_range,
        groups=s.groups, factor=s.factor,
    )  # fmt: skip


def apot(s: Setting, x: Array, gy: Array) -> Result:
    return uneven.apot(
        x, gy, clip_val=s.state["clip_val"], levels=s.config.levels, half_range=s.config.half_range,
        groups=s.groups, factor=s.factor,
    )  # fmt: skip


def n2uq(s: Setting, x: Array, gy: Array) -> Result:
    return uneven.n2uq(
        x, gy, clip_val=s.state["clip_val"], start=s.state["start"],
        widths=[s.state[f"width{i}"] for i in range(s.config.levels - 1)], half_range=s.config.half_range,
        groups=s.groups, factor=s.factor,
    )  # fmt: skip


def n2uq_weight(s: Setting, x: Array, gy: Array) -> Result:
    return uneven.n2uq_weight(x, gy, levels=s.config.levels, groups=s.groups)


def lq(s: Setting, x: Array, gy: Array) -> Result:
    return uneven.lq(
        x,
        gy,
        basis=s.state["basis"],
        half_range=s.config.half_range,
        groups=s.groups,
        activation=not s.weight,
    )


def fatnn_half(s: Setting, x: Array, gy: Array) -> Result:
    return uneven.fatnn_half(x, gy, alphas=s.alphas, groups=s.groups)


def fatnn_ternary(s: Setting, x: Array, gy: Array) -> Result:
    return uneven.fatnn_ternary(x, gy, alphas=s.alphas, groups=s.groups)


def mask_of(s: Setting) -> oracle.Mask:
    return oracle.Mask(s.config.grad_type, s.config.grad_window)


def xnor_activation(s: Setting, x: Array, gy: Array) -> Result:
    return oracle.xnor_activation(x, gy, mask=mask_of(s), custom=s.config.custom)


def rsign(s: Setting, x: Array, gy: Array) -> Result:
    return oracle.rsign(x, gy, threshold=s.state["threshold"], mask=mask_of(s), groups=s.groups)


def xnor_weight(s: Setting, x: Array, gy: Array) -> Result:
    return oracle.xnor_weight(x, gy, mask=mask_of(s), groups=s.groups)
