"""The methods with the oracle's formula of each, cases of them, and how a quantizer is compared with it."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import model.quant  # noqa: F401  (registers the methods)
from model.quantizers.frame import Quantizer
from model.quantizers.registry import build_quantizer
from model.quantizers.site import LayerSite
from tests import oracle
from tests.model.quantizers import formulas
from tests.model.quantizers.formulas import Setting
from tests.oracle import Array, Groups, Result
from utils.config.schema import QuantizerConfig

LEVELS = (2, 3, 4, 8, 16, 256)
CHANNELS = 8
SHAPES = {"fm": (4, CHANNELS, 5, 5), "ot": (4, CHANNELS, 5, 5), "wt": (CHANNELS, 6, 3, 3)}
FAN = 54  # of the weight's shape


Expectation = Callable[[Setting, Array, Array], Result]


@dataclass(frozen=True, kw_only=True)
class Method:
    """All that the tests know of a method: a new one is tested by an entry in `METHODS`."""

    method: str
    tags: tuple[str, ...]
    expected: Expectation
    levels: tuple[int, ...] = LEVELS
    half_range: tuple[bool, ...] = (True, False)
    fields: Mapping[str, Any] = field(default_factory=dict)  # of its configuration
    state: tuple[str, ...] = ()  # names beside `iteration` and `level_num`, of 4 levels (3 where that is all)
    range_name: str = ""  # the state that is the clip value, where there is one
    per_channel: bool = False  # an activation's channels have values of their own, as a weight's
    calibrates: bool = False  # has a range that a warm-up sets
    idempotent: bool = True
    monotonic: bool = True
    spread: float = 1.0  # standard deviation of the tensors it is tested on
    even: bool = True  # levels up to a clip value are evenly spaced
    scaled: float = 0.0  # how far the gradient of 1 may be from 1 within the range


FM, WT = ("fm", "ot"), ("wt",)
FULL, HALF, POWERS = (False,), (True,), (2, 4, 8, 16, 256)
TANH: dict[str, Any] = {"expected": formulas.dorefa_weight, "half_range": FULL, "idempotent": False}
CLIP: dict[str, Any] = {"state": ("clip_val",), "range_name": "clip_val", "calibrates": True}
BINARY: dict[str, Any] = {"levels": (2,), "half_range": FULL}
RSIGN: dict[str, Any] = {"state": ("threshold",), "per_channel": True, "idempotent": False, **BINARY}
DELTA = 0.5  # large enough to see
LEAST_SLOPE = (1 - 0.21 * np.pi * np.sqrt(2)) / (1 + 0.21 * np.pi * np.sqrt(2))  # of StableQAT
METHODS = {
    "dorefa": Method(method="dorefa", tags=FM, expected=formulas.dorefa_activation, calibrates=True),
    "dorefa-wt": Method(method="dorefa", tags=WT, **TANH),
    "dorefa-bin": Method(
        method="dorefa",
        tags=WT,
        expected=formulas.binary_weight,
        fields={"binary_scale": True},
        idempotent=False,
        **BINARY,
    ),
    "pact": Method(method="pact", tags=FM, expected=formulas.pact, **CLIP),
    "pact-wt": Method(method="pact", tags=WT, **TANH),
    "lsq": Method(method="lsq", tags=(*FM, *WT), expected=formulas.lsq, **CLIP),
    "lsq-midtread": Method(
        method="lsq",
        tags=(*FM, *WT),
        expected=formulas.lsq_midtread,
        fields={"grid": "midtread"},
        levels=(3, 4, 8, 16, 256),
        half_range=FULL,
        **CLIP,
    ),
    "lsqplus": Method(
        method="lsqplus", tags=FM, expected=formulas.lsqplus, state=("clip_val", "offset"), calibrates=True
    ),
    "lsqplus-wt": Method(method="lsqplus", tags=WT, expected=formulas.lsq, **CLIP),
    "ewgs": Method(
        method="ewgs",
        tags=(*FM, *WT),
        expected=formulas.ewgs,
        fields={"grad_delta": DELTA},
        scaled=DELTA / 2,
        **CLIP,
    ),
    "stableqat": Method(
        method="stableqat",
        tags=(*FM, *WT),
        expected=formulas.stableqat,
        levels=LEVELS[:-1],  # of 256 levels, float32 knows the distance to a level to 1e-5 steps only
        scaled=1 - LEAST_SLOPE,
        **CLIP,
    ),
    "apot": Method(
        method="apot",
        tags=(*FM, *WT),
        expected=formulas.apot,
        levels=(2, 4, 8, 16, 64),
        half_range=HALF,
        even=False,
        **CLIP,
    ),
    "apot-signed": Method(
        method="apot",
        tags=(*FM, *WT),
        expected=formulas.apot,
        levels=(3, 4, 8, 16, 64),
        half_range=FULL,
        even=False,
        **CLIP,
    ),
    "n2uq": Method(
        method="n2uq",
        tags=FM,
        expected=formulas.n2uq,
        levels=(2, 3, 4, 8, 16),
        state=("clip_val", "start", "width0", "width1", "width2"),
        calibrates=True,
        idempotent=False,
    ),
    "n2uq-wt": Method(
        method="n2uq", tags=WT, expected=formulas.n2uq_weight, half_range=FULL, idempotent=False
    ),
    "lq": Method(
        method="lq", tags=FM, expected=formulas.lq, levels=POWERS, state=("basis",), calibrates=True
    ),
    "lq-wt": Method(
        method="lq",
        tags=WT,
        expected=formulas.lq,
        levels=POWERS,
        state=("basis",),
        calibrates=True,
        spread=0.15,
    ),
    "fatnn": Method(
        method="fatnn",
        tags=FM,
        expected=formulas.fatnn_half,
        levels=(2, 3, 4),
        half_range=HALF,
        state=("alpha0", "alpha1", "alpha2", "clip_val"),
        calibrates=True,
        idempotent=False,
    ),
    "fatnn-ternary": Method(
        method="fatnn",
        tags=FM,
        expected=formulas.fatnn_ternary,
        levels=(3,),
        half_range=FULL,
        state=("alpha0", "alpha1", "clip_val"),
        calibrates=True,
        idempotent=False,
    ),
    "fatnn-wt": Method(
        method="fatnn",
        tags=WT,
        expected=formulas.fatnn_ternary,
        levels=(3,),
        half_range=FULL,
        state=("alpha0", "alpha1"),
        calibrates=True,
        idempotent=False,
    ),
    "xnor": Method(method="xnor", tags=FM, expected=formulas.xnor_activation, levels=(2,)),
    "xnor-STE": Method(
        method="xnor", tags=FM, expected=formulas.xnor_activation, fields={"grad_type": "STE"}, **BINARY
    ),
    "xnor-Triangle": Method(
        method="xnor", tags=FM, expected=formulas.xnor_activation, fields={"grad_type": "Triangle"}, **BINARY
    ),
    "xnor-window": Method(
        method="xnor",
        tags=FM,
        expected=formulas.xnor_activation,
        fields={"grad_type": "Triangle", "grad_window": 1.5},
        **BINARY,
    ),
    "xnor-channel": Method(
        method="xnor",
        tags=FM,
        expected=formulas.xnor_activation,
        fields={"custom": "channel"},
        idempotent=False,
        monotonic=False,
        **BINARY,
    ),
    "xnor-resolution": Method(
        method="xnor",
        tags=FM,
        expected=formulas.xnor_activation,
        fields={"custom": "resolution", "grad_type": "STE"},
        idempotent=False,
        monotonic=False,
        **BINARY,
    ),
    "reactnet": Method(
        method="reactnet",
        tags=FM,
        expected=formulas.rsign,
        fields={"grad_type": "Triangle"},
        **RSIGN,
    ),
    "reactnet-window": Method(
        method="reactnet",
        tags=FM,
        expected=formulas.rsign,
        fields={"grad_type": "STE", "grad_window": 2.0},
        **RSIGN,
    ),
    "reactnet-wt": Method(
        method="reactnet", tags=WT, expected=formulas.xnor_weight, idempotent=False, **BINARY
    ),
    "xnor-wt": Method(method="xnor", tags=WT, expected=formulas.xnor_weight, idempotent=False, **BINARY),
    "xnor-wt-STE": Method(
        method="xnor",
        tags=WT,
        expected=formulas.xnor_weight,
        fields={"grad_type": "STE"},
        idempotent=False,
        **BINARY,
    ),
    "xnor-wt-window": Method(
        method="xnor",
        tags=WT,
        expected=formulas.xnor_weight,
        fields={"grad_type": "STE", "grad_window": 0.5},
        idempotent=False,
        **BINARY,
    ),
}


@dataclass(frozen=True)
class Case:
    """One quantizer to test; `fields` of its configuration come on top of the method's."""

    name: str
    tag: str
    levels: int
    half_range: bool
    quant_group: int | None = None
    fields: tuple[tuple[str, Any], ...] = ()

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    @property
    def site(self) -> LayerSite:
        dim = 0 if self.tag == "wt" else 1
        return LayerSite(name="conv1", channels=CHANNELS, channel_dim=dim, ndim=4, fan=FAN)

    @property
    def config(self) -> QuantizerConfig:
        base = QuantizerConfig(
            tag=self.tag,
            enable=True,
            method=self.method.method,
            levels=self.levels,
            half_range=self.half_range,
            quant_group=self.quant_group,
            scale=1.0 if self.method.method == "fatnn" else 0.5,
        )
        return dataclasses.replace(base, **{**self.method.fields, **dict(self.fields)})

    def with_fields(self, **fields: Any) -> Case:
        return dataclasses.replace(self, fields=(*self.fields, *fields.items()))

    def __str__(self) -> str:
        half = "half" if self.half_range else "full"
        extra = "".join(f"-{name}={value}" for name, value in self.fields)
        return f"{self.name}-{self.tag}-{self.levels}-{half}-g{self.quant_group}{extra}"


def cases(
    *,
    levels: Sequence[int] = (4, 3, 2),
    groups: Sequence[int | None] = (None,),
    tags: Sequence[str] = ("fm", "wt"),
    where: Callable[[Method], bool] = bool,
) -> list[Case]:
    """Every method with each range and group, and the first of `levels` that it takes.

    Outputs are quantized by the classes of the activations: `ot` only where it is asked for.
    """
    return [
        Case(name, tag, next(count for count in levels if count in method.levels), half, group)
        for name, method in METHODS.items()
        if where(method)
        for tag in method.tags
        if tag in tags
        for half in method.half_range
        for group in groups
    ]


def each_level(found: Sequence[Case]) -> list[Case]:
    """The cases with each of their method's levels."""
    return [dataclasses.replace(case, levels=levels) for case in found for levels in case.method.levels]


def over(found: Sequence[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", found, ids=str)


def generator(*words: object) -> np.random.Generator:
    """Random numbers that depend on what they are for alone."""
    return np.random.default_rng(zlib.crc32(" ".join(map(str, words)).encode()))


def make(case: Case, *, randomised: bool = True) -> Quantizer:
    """The quantizer of a case; learned values random, every second one negative (magnitude counts)."""
    quantizer = build_quantizer(case.config, case.site)
    assert isinstance(quantizer, Quantizer)
    if randomised:
        rng = generator("learned", case)
        with torch.no_grad():
            for parameter in quantizer.parameters():
                value = rng.uniform(0.6, 1.4, parameter.shape).astype(np.float32).reshape(-1)
                value[1::2] *= -1
                parameter.copy_(torch.from_numpy(value).reshape(parameter.shape))
    return quantizer


def setting(case: Case, quantizer: Quantizer) -> Setting:
    state = {
        name: value.detach().double().numpy() if name == "basis" else value.detach().double().numpy().ravel()
        for name, value in quantizer.state_dict().items()
    }
    config = case.config
    default = CHANNELS if case.tag == "wt" or case.method.per_channel else 1
    count = default if config.quant_group is None else config.quant_group
    elements = np.prod(SHAPES[case.tag]) / count
    factor = oracle.gradient_factor(config.grad_scale, config.scale, fan=FAN, elements=elements)
    return Setting(config, Groups(count, case.site.channel_dim), state, factor)


def expectation(case: Case, quantizer: Quantizer) -> Callable[[Array, Array], Result]:
    """The oracle for this quantizer as it stands: method, normalisation, learned scale."""
    given = setting(case, quantizer)
    config, weight = given.config, given.weight

    def method(x: Array, gy: Array) -> Result:
        return case.method.expected(given, x, gy)

    def normalised(x: Array, gy: Array) -> Result:
        if config.adaptive == "none":
            return method(x, gy)
        epsilon = 1e-5 if config.method == "lq" else 0.0
        return oracle.adaptive(
            method, x, gy, config.adaptive,
            weight=weight, restore=config.adaptive_restore, groups=given.groups, epsilon=epsilon,
        )  # fmt: skip

    def scaled(x: Array, gy: Array) -> Result:
        if not config.gamma:
            return normalised(x, gy)
        return oracle.scaled(normalised, x, gy, gamma=given.state["gamma"], groups=given.groups)

    return scaled


def sample(case: Case, *words: object) -> np.ndarray:
    """A normal float32 tensor of the case's shape."""
    x = generator("x", case, *words).standard_normal(SHAPES[case.tag]) * case.method.spread
    return x.astype(np.float32)


def tensor(case: Case, *words: object) -> Tensor:
    return torch.from_numpy(sample(case, *words))


def away_from_jumps(x: np.ndarray, expected: Callable[[Array, Array], Result]) -> np.ndarray:
    """x with every element moved that rounding errors of float32 could take across a jump."""
    for _ in range(100):
        near = expected(x.astype(np.float64), np.zeros(x.shape)).distance < 1e-5
        if not near.any():
            return x
        x = np.where(near, x * np.float32(1.003) + np.float32(1e-4), x).astype(np.float32)
    raise AssertionError("no tensor away from the jumps found")


def assert_close(actual: Tensor | None, expected: Array, what: str, terms: float = 0.0) -> None:
    """Equal to 1e-5 of the largest magnitude; `terms` is the usual size of the sums that may cancel."""
    assert actual is not None, what
    assert actual.dtype == torch.float32
    limit = 1e-5 * np.abs(expected).max(initial=0.0) + 1e-6 * terms
    difference = np.abs(actual.detach().double().numpy().reshape(expected.shape) - expected)
    assert difference.max(initial=0.0) <= limit, what


def backward(
    quantizer: Callable[[Tensor], Tensor], x: Tensor, gy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and gradient to x of one forward and backward pass."""
    x = x.detach().clone().requires_grad_()
    y = quantizer(x)
    y.backward(torch.ones_like(y) if gy is None else gy)
    assert x.grad is not None
    return y.detach(), x.grad


def compare(case: Case) -> None:
    """One training forward and backward of the case against the oracle."""
    quantizer = make(case)
    expected = expectation(case, quantizer)
    x = away_from_jumps(sample(case), expected)
    gy = generator("gy", case).standard_normal(x.shape).astype(np.float32)
    result = expected(x.astype(np.float64), gy.astype(np.float64))
    y, gx = backward(quantizer, torch.from_numpy(x), torch.from_numpy(gy))
    assert_close(y, result.y, "output")
    assert_close(gx, result.gx, "gradient to x")
    learned = dict(quantizer.named_parameters())
    assert learned.keys() == result.grads.keys()
    terms = setting(case, quantizer).factor * float(np.linalg.norm(gy))
    for name, parameter in learned.items():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        assert_close(
            parameter.grad, result.grads[name].reshape(parameter.shape), f"gradient to {name}", terms
        )


def row_counts(quantizer: Quantizer, y: Tensor) -> list[int]:
    """The number of distinct values in each row that shares its levels."""
    return [len(row.unique()) for row in quantizer.level_rows(y)]


def learns(quantizer: Quantizer) -> bool:
    """It has a learned value within the normalisation."""
    return any(name != "gamma" for name, _ in quantizer.named_parameters())
