"""The quantizers against the oracle, the frame around them, and the quantized layers."""

from __future__ import annotations

import copy
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional

import model.quant  # noqa: F401  (registers the methods)
from model.layers.quantized import QuantConv2d, QuantLinear, quantizers
from model.networks import build
from model.quantizers.frame import Quantizer
from model.quantizers.lq import LQ
from model.quantizers.pact import PACT
from model.quantizers.registry import build_quantizer, methods, register
from model.quantizers.site import LayerSite
from tests import oracle
from tests.conformance import options
from tests.oracle import Array, Groups, Result
from utils.config.resolve import read
from utils.config.schema import QuantConfig, QuantizerConfig
from utils.errors import UserError

LEVELS = (2, 3, 4, 8, 16, 256)
CHANNELS = 8
SHAPES = {"fm": (4, CHANNELS, 5, 5), "ot": (4, CHANNELS, 5, 5), "wt": (CHANNELS, 6, 3, 3)}
FAN = 54  # of the weight's shape


# The methods ---------------------------------------------------------------------------------------


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
    calibrates: bool = False  # has a range that a warm-up sets
    idempotent: bool = True
    monotonic: bool = True
    spread: float = 1.0  # standard deviation of the tensors it is tested on


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


def lq(s: Setting, x: Array, gy: Array) -> Result:
    return oracle.lq(
        x,
        gy,
        basis=s.state["basis"],
        half_range=s.config.half_range,
        groups=s.groups,
        activation=not s.weight,
    )


def fatnn_half(s: Setting, x: Array, gy: Array) -> Result:
    return oracle.fatnn_half(x, gy, alphas=s.alphas, groups=s.groups)


def fatnn_ternary(s: Setting, x: Array, gy: Array) -> Result:
    return oracle.fatnn_ternary(x, gy, alphas=s.alphas, groups=s.groups)


def xnor_activation(s: Setting, x: Array, gy: Array) -> Result:
    return oracle.xnor_activation(x, gy, grad_type=s.config.grad_type, custom=s.config.custom)


def xnor_weight(s: Setting, x: Array, gy: Array) -> Result:
    return oracle.xnor_weight(x, gy, grad_type=s.config.grad_type, groups=s.groups)


FM, WT = ("fm", "ot"), ("wt",)
FULL, HALF, POWERS = (False,), (True,), (2, 4, 8, 16, 256)
TANH: dict[str, Any] = {"expected": dorefa_weight, "half_range": FULL, "idempotent": False}
CLIP: dict[str, Any] = {"state": ("clip_val",), "range_name": "clip_val", "calibrates": True}
BINARY: dict[str, Any] = {"levels": (2,), "half_range": FULL}
METHODS = {
    "dorefa": Method(method="dorefa", tags=FM, expected=dorefa_activation, calibrates=True),
    "dorefa-wt": Method(method="dorefa", tags=WT, **TANH),
    "dorefa-bin": Method(
        method="dorefa",
        tags=WT,
        expected=binary_weight,
        fields={"binary_scale": True},
        idempotent=False,
        **BINARY,
    ),
    "pact": Method(method="pact", tags=FM, expected=pact, **CLIP),
    "pact-wt": Method(method="pact", tags=WT, **TANH),
    "lsq": Method(method="lsq", tags=(*FM, *WT), expected=lsq, **CLIP),
    "lsq-midtread": Method(
        method="lsq",
        tags=(*FM, *WT),
        expected=lsq_midtread,
        fields={"grid": "midtread"},
        levels=(3, 4, 8, 16, 256),
        half_range=FULL,
        **CLIP,
    ),
    "lq": Method(method="lq", tags=FM, expected=lq, levels=POWERS, state=("basis",), calibrates=True),
    "lq-wt": Method(
        method="lq", tags=WT, expected=lq, levels=POWERS, state=("basis",), calibrates=True, spread=0.15
    ),
    "fatnn": Method(
        method="fatnn",
        tags=FM,
        expected=fatnn_half,
        levels=(2, 3, 4),
        half_range=HALF,
        state=("alpha0", "alpha1", "alpha2", "clip_val"),
        calibrates=True,
        idempotent=False,
    ),
    "fatnn-ternary": Method(
        method="fatnn",
        tags=FM,
        expected=fatnn_ternary,
        levels=(3,),
        half_range=FULL,
        state=("alpha0", "alpha1", "clip_val"),
        calibrates=True,
        idempotent=False,
    ),
    "fatnn-wt": Method(
        method="fatnn",
        tags=WT,
        expected=fatnn_ternary,
        levels=(3,),
        half_range=FULL,
        state=("alpha0", "alpha1"),
        calibrates=True,
        idempotent=False,
    ),
    "xnor": Method(method="xnor", tags=FM, expected=xnor_activation, levels=(2,)),
    "xnor-STE": Method(
        method="xnor", tags=FM, expected=xnor_activation, fields={"grad_type": "STE"}, **BINARY
    ),
    "xnor-Triangle": Method(
        method="xnor", tags=FM, expected=xnor_activation, fields={"grad_type": "Triangle"}, **BINARY
    ),
    "xnor-channel": Method(
        method="xnor",
        tags=FM,
        expected=xnor_activation,
        fields={"custom": "channel"},
        idempotent=False,
        monotonic=False,
        **BINARY,
    ),
    "xnor-resolution": Method(
        method="xnor",
        tags=FM,
        expected=xnor_activation,
        fields={"custom": "resolution", "grad_type": "STE"},
        idempotent=False,
        monotonic=False,
        **BINARY,
    ),
    "xnor-wt": Method(method="xnor", tags=WT, expected=xnor_weight, idempotent=False, **BINARY),
    "xnor-wt-STE": Method(
        method="xnor", tags=WT, expected=xnor_weight, fields={"grad_type": "STE"}, idempotent=False, **BINARY
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
    default = CHANNELS if case.tag == "wt" else 1
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


# Against the oracle --------------------------------------------------------------------------------


def test_every_registered_method_is_in_the_table() -> None:
    assert {(method.method, tag) for method in METHODS.values() for tag in method.tags} == methods().keys()


@over(each_level(cases(groups=(None, 1, 2, CHANNELS), tags=("fm", "wt", "ot"))))
def test_output_and_gradients_match_the_oracle(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("kind", ["fan-scale", "scale-fan", "element-scale", "scale-element"])
@over(cases(groups=(None, 2), where=lambda method: method.range_name == "clip_val"))
def test_gradient_scale(case: Case, kind: str) -> None:
    compare(case.with_fields(grad_scale=kind, scale=0.7))


@over(cases(where=lambda method: method.expected in (dorefa_activation, pact)))
def test_ste_scale_makes_up_for_the_clipped_elements(case: Case) -> None:
    compare(case.with_fields(grad_type="STE-scale"))


@over(cases(where=lambda method: method.expected in (dorefa_activation, pact)))
def test_ste_scale_with_every_element_clipped(case: Case) -> None:
    _, gx = backward(make(case.with_fields(grad_type="STE-scale")), torch.full(SHAPES[case.tag], 100.0))
    assert torch.equal(gx, torch.zeros_like(gx))


@over(cases(groups=(None, 1, 2), where=lambda method: not method.fields))
def test_gamma(case: Case) -> None:
    compare(case.with_fields(gamma=True))


@pytest.mark.parametrize("restore", [False, True], ids=["kept", "restored"])
@pytest.mark.parametrize("kind", ["mean", "var", "mean-var", "var-mean"])
@over(cases(groups=(2,), where=lambda method: method.monotonic and method.expected is not fatnn_half))
def test_adaptive(case: Case, kind: str, restore: bool) -> None:
    compare(case.with_fields(adaptive=kind, adaptive_restore=restore))


@pytest.mark.parametrize("levels", [2, 4, 16])
def test_dorefa_weight_gradient_is_that_of_the_smooth_part(levels: int) -> None:
    case = Case("dorefa-wt", "wt", levels, half_range=False)
    w = sample(case).astype(np.float64)[:2, :2]
    gy = generator("gy").standard_normal(w.shape)
    step = 1e-6
    numeric = np.empty_like(w)
    for index in np.ndindex(w.shape):
        delta = np.zeros_like(w)
        delta[index] = step
        difference = oracle.tanh_normalised(w + delta) - oracle.tanh_normalised(w - delta)
        numeric[index] = (gy * difference).sum() / (2 * step)
    _, gx = backward(make(case), torch.from_numpy(w).float(), torch.from_numpy(gy).float())
    np.testing.assert_allclose(gx.numpy(), numeric, atol=1e-5 * np.abs(numeric).max(), rtol=0)


@pytest.mark.parametrize("unit", [1e-11, 1e-20, 1e-29])
@pytest.mark.parametrize("levels", [2, 3, 4, 16])
def test_dorefa_weights_of_any_size_follow_the_formula(levels: int, unit: float) -> None:
    """Only the ratio of the weights counts where tanh is linear."""
    case = Case("dorefa-wt", "wt", levels, half_range=False)
    w = away_from_jumps(sample(case) * np.float32(1e-6), expectation(case, make(case)))
    gy = generator("gy").standard_normal(w.shape).astype(np.float32)
    w = (w * np.float32(1e6) * unit).astype(np.float64)
    expected = oracle.dorefa_weight(w, gy.astype(np.float64), levels=levels)
    y, gx = backward(make(case), torch.from_numpy(w).float(), torch.from_numpy(gy))
    assert_close(y, expected.y, "output")
    assert_close(gx, expected.gx, "gradient to x")


@over(cases(groups=(None, 1), where=lambda method: method.range_name == "clip_val"))
def test_outside_the_range_the_gradient_to_the_clip_value_is_the_slope_of_the_output(case: Case) -> None:
    """Where all is clipped the output is smooth in the clip value, for LSQ below the range too."""
    signs = [1.0] if case.method.expected is pact else [1.0, -1.0]
    for sign in signs:
        quantizer = make(case)
        x = torch.full(SHAPES[case.tag], 100.0 * sign)
        clip = quantizer.get_parameter("clip_val")
        before = quantizer(x)
        before.sum().backward()
        assert clip.grad is not None
        moved = clip.grad.clone()
        with torch.no_grad():
            delta = clip.clone()
            clip.add_(delta)
            change = quantizer.grouped(quantizer(x) - before).sum(dim=1).reshape(clip.shape)
        torch.testing.assert_close(moved, change / delta)


@pytest.mark.parametrize("tag", ["fm", "wt"])
def test_paper_gradient_scale_moves_the_step_as_the_paper_does(tag: str) -> None:
    """One step of c moves s = c / Qp by rate * dL/ds / sqrt(N * Qp), N elements of a weight or sample."""
    case = Case("lsq-midtread", tag, 16, half_range=False, quant_group=1, fields=(("grad_scale", "paper"),))
    plain = dataclasses.replace(case, fields=())
    quantizer, high, rate = make(case), 7, 0.01
    x = sample(case).astype(np.float64)
    given = setting(plain, quantizer)
    gradient = lsq_midtread(given, x, np.ones_like(x)).grads["clip_val"] * high
    count = x.size if tag == "wt" else x[0].size
    clip = quantizer.get_parameter("clip_val")
    before = clip.detach().clone()
    quantizer(torch.from_numpy(x).float()).sum().backward()
    torch.optim.SGD([clip], lr=rate).step()
    moved = (clip.detach() - before).double().numpy().ravel() / high
    np.testing.assert_allclose(moved, -rate * gradient / np.sqrt(count * high), rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "levels", "half_range", "boundary", "x", "y"),
    [
        ("lsq", 3, True, 2.0, [0.5, 1.5, -1.0, 2.0, 3.0], [0.0, 2.0, 0.0, 2.0, 2.0]),
        ("lsq", 5, True, 4.0, [0.5, 1.5, 2.5, 3.5], [0.0, 2.0, 2.0, 4.0]),
        ("lsq", 4, False, 3.0, [-4.0, -2.0, 0.0, 2.0, 2.5], [-3.0, -3.0, 1.0, 1.0, 3.0]),
        ("lsq", 2, False, 1.0, [-1e-3, 0.0, 1e-3], [-1.0, -1.0, 1.0]),
        ("lsq", 3, False, 1.0, [-0.5, 0.0, 0.5, 0.6], [-1.0, 0.0, 1.0, 1.0]),
        ("lsq-midtread", 4, False, 1.0, [-3.0, -1.5, -0.5, 0.0, 0.5, 3.0], [-2.0, -2.0, 0.0, 0.0, 0.0, 1.0]),
        ("lsq-midtread", 8, False, 3.0, [-9.0, -2.5, -1.5, 2.5, 3.5], [-4.0, -2.0, -2.0, 2.0, 3.0]),
        ("pact", 5, True, 4.0, [0.5, 1.5, 2.5, 3.5], [0.0, 2.0, 2.0, 4.0]),
        ("dorefa", 5, True, 4.0, [0.5, 1.5, 2.5, 3.5], [0.0, 2.0, 2.0, 4.0]),
        ("xnor", 2, False, 1.0, [-2.0, -0.0, 0.0, 1e-30], [-1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_ties_go_to_the_even_level_number(
    name: str, levels: int, half_range: bool, boundary: float, x: list[float], y: list[float]
) -> None:
    case = Case(name, "fm", levels, half_range, fields=(("boundary", boundary),))
    assert make(case, randomised=False)(torch.tensor(x)).tolist() == pytest.approx(y, abs=1e-6)


@pytest.mark.parametrize("levels", [2, 3, 8, 11, 64, 100, 256, 4096])
@pytest.mark.parametrize("name", ["pact", "lsq"])
def test_an_element_at_the_clip_value(name: str, levels: int) -> None:
    """x = c takes the top level c; PACT's clip value gets its gradient whatever c / (c / n) rounds to."""
    for boundary in np.linspace(0.3, 7.0, 25, dtype=np.float32):
        case = Case(name, "fm", levels, half_range=True, fields=(("boundary", float(boundary)),))
        quantizer = make(case, randomised=False)
        y, gx = backward(quantizer, torch.full((3,), float(boundary)))
        torch.testing.assert_close(y, torch.full((3,), float(boundary)), rtol=3e-7, atol=0)
        clip_grad = quantizer.get_parameter("clip_val").grad
        assert clip_grad is not None
        if name == "pact":
            assert (gx.tolist(), clip_grad.tolist()) == ([0.0] * 3, [3.0])


@over(cases(levels=(16, 4), groups=(None, 2), where=lambda method: method.method == "lq"))
def test_lq_basis_follows_least_squares(case: Case) -> None:
    quantizer = make(case)
    given = setting(case, quantizer)
    basis, activation = given.state["basis"], not given.weight
    fan = None if activation else FAN
    initial = oracle.lq_initial_basis(len(basis), given.groups.count, fan=fan)
    np.testing.assert_allclose(basis, initial, rtol=1e-6)
    for step in range(3):
        x = sample(case, step)
        new = oracle.lq_least_squares(
            x.astype(np.float64),
            basis=basis,
            half_range=case.half_range,
            groups=given.groups,
            activation=activation,
        )
        basis = oracle.lq_blend(basis, new)
        quantizer(torch.from_numpy(x))
        np.testing.assert_allclose(quantizer.get_buffer("basis").numpy(), basis, rtol=1e-4, atol=1e-6)
        basis = quantizer.get_buffer("basis").double().numpy()
    quantizer.eval()
    quantizer(torch.from_numpy(x))
    assert torch.equal(quantizer.get_buffer("basis"), torch.from_numpy(basis).float())


@over(cases(where=lambda method: method.method == "lq"))
def test_lq_custom_update_is_a_running_mean(case: Case) -> None:
    case = case.with_fields(custom_update=True)
    quantizer = make(case)
    given = setting(case, quantizer)
    basis = given.state["basis"]
    for iteration in (1, 2, 3):
        x = sample(case, iteration)
        new = oracle.lq_least_squares(
            x.astype(np.float64), basis=basis, half_range=case.half_range, groups=given.groups,
            activation=not given.weight,
        )  # fmt: skip
        basis = oracle.lq_running_mean(basis, new, iteration)
        quantizer(torch.from_numpy(x))
        np.testing.assert_allclose(quantizer.get_buffer("basis").numpy(), basis, rtol=1e-4, atol=1e-6)
        basis = quantizer.get_buffer("basis").double().numpy()


@over(cases(where=lambda method: method.method == "lq"))
def test_lq_survives_tensors_without_information(case: Case) -> None:
    """Zeros and constants leave codes unused; the least-squares system must stay solvable."""
    quantizer = make(case)
    for value in (0.0, 1.0, -1.0, 1e-40, 1e30):
        for _ in range(3):
            assert quantizer(torch.full(SHAPES[case.tag], value)).isfinite().all()
            assert quantizer.get_buffer("basis").isfinite().all()


def test_fatnn_closed_form_scales_the_integers() -> None:
    case = Case("fatnn", "fm", 4, half_range=True, quant_group=2, fields=(("closed_form", True),))
    quantizer, plain = make(case), make(dataclasses.replace(case, fields=()))
    plain.load_state_dict({k: v for k, v in quantizer.state_dict().items() if k != "output_scale"})
    groups, scale = Groups(2, 1), np.ones(2)
    for step in range(3):
        x = sample(case, step).astype(np.float64)
        codes = plain(torch.from_numpy(x).float()).detach().double().numpy()
        scale = 0.9 * scale + 0.1 * groups.sum(codes * x) / groups.sum(codes**2)
        y = quantizer(torch.from_numpy(x).float()).detach()
        np.testing.assert_allclose(quantizer.get_buffer("output_scale").numpy().ravel(), scale, rtol=1e-5)
        np.testing.assert_allclose(y.numpy(), codes * groups.spread(scale, x), rtol=1e-5)


@pytest.mark.parametrize(
    ("tag", "line", "advice"),
    [
        ("fm", "--fm_bit 2 --fm_half_range", " or, where it is written, leave --fm_half_range out"),
        ("ot", "--ot_bit 2", " or --ot_half_range for levels from zero"),
        ("wt", "--wt_bit 2", ""),
    ],
)
def test_four_levels_of_fatnn_on_both_sides_of_zero(tag: str, line: str, advice: str) -> None:
    config = options({"argv": f"--keyword dorefa,non-uniform --{tag}_enable {line}".split()})[2]
    with pytest.raises(UserError, match=f"; give --{tag}_level 3{advice}$"):
        build_quantizer(getattr(config, tag), Case("fatnn", tag, 4, half_range=False).site)


@pytest.mark.parametrize("closed_form", [False, True])
@pytest.mark.parametrize("tag", ["fm", "wt", "ot"])
def test_fatnn_for_one_tag_by_its_keyword(tag: str, closed_form: bool) -> None:
    """Three levels: integers, or with the keyword `closed_form` their multiples."""
    words = f"dorefa,{tag}_non-uniform" + (",closed_form" if closed_form else "")
    argv = ["--keyword", words, f"--{tag}_enable", f"--{tag}_level", "3"]
    layer = QuantLinear(64, 64)
    layer.build_quantizers(options({"argv": argv})[2], "layer")
    ((_, quantizer),) = layer.quantizers()
    assert quantizer.config.method == "fatnn" and quantizer.config.tag == tag
    x = generator("x", words).standard_normal((64, 64)).astype(np.float32)
    y = quantizer(torch.from_numpy(x))
    integral = torch.equal(y, y.round())
    assert integral != closed_form
    assert [len(row.unique()) for row in quantizer.level_rows(y)] == [3] * quantizer.groups


# The frame -----------------------------------------------------------------------------------------


@over(each_level(cases(groups=(None, 2))))
def test_at_most_the_allowed_levels_in_training_and_evaluation(case: Case) -> None:
    quantizer = make(case)
    for mode in (True, False):
        counts = row_counts(quantizer.train(mode), quantizer(tensor(case)).detach())
        assert 1 < max(counts) <= case.levels


@pytest.mark.parametrize("levels", LEVELS)
@over(cases())
def test_any_level_count_is_honoured_or_refused(case: Case, levels: int) -> None:
    case = dataclasses.replace(case, levels=levels)
    try:
        quantizer = make(case)
    except UserError as error:
        assert str(levels) in str(error)
        assert levels not in case.method.levels
        return
    assert max(row_counts(quantizer, quantizer(tensor(case)).detach())) <= levels


@over(cases(levels=(256, 4, 3, 2), groups=(None, 2), where=lambda method: method.idempotent))
def test_idempotent(case: Case) -> None:
    quantizer = make(case).eval()
    once = quantizer(tensor(case))
    assert torch.equal(quantizer(once), once)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@over(cases(levels=(16, 4, 3, 2)))
def test_other_dtypes_compute_in_float32(case: Case, dtype: torch.dtype) -> None:
    quantizer = make(case)
    reference = copy.deepcopy(quantizer)
    x = tensor(case).to(dtype)
    y, gx = backward(quantizer, x)
    full_y, full_gx = backward(reference, x.float())
    assert (y.dtype, gx.dtype) == (dtype, dtype)
    assert torch.equal(y, full_y.to(dtype))
    assert torch.equal(gx, full_gx.to(dtype))
    for mine, other in zip(quantizer.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@over(cases(levels=(16, 4, 3, 2)))
def test_autocast_changes_nothing(case: Case, dtype: torch.dtype) -> None:
    quantizer = make(case)
    reference = copy.deepcopy(quantizer)
    x = tensor(case).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quantizer(x)
    assert y.dtype == dtype
    assert torch.equal(y, reference(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@over(cases(levels=(256, 4, 3, 2)))
def test_parameters_in_half_precision_compute_in_float32(case: Case, dtype: torch.dtype) -> None:
    """A network converted as a whole: its values are rounded once, the arithmetic stays float32."""
    halved = make(case).to(dtype)
    full = copy.deepcopy(halved).float()
    x = tensor(case).to(dtype)
    y, gx = backward(halved, x)
    full_y, full_gx = backward(full, x.float())
    assert (y.dtype, gx.dtype) == (dtype, dtype)
    assert torch.equal(y, full_y.to(dtype))
    assert torch.equal(gx, full_gx.to(dtype))


EXTREMES = {
    "zeros": [0.0, -0.0],
    "a constant": [0.3],
    "denormals": [1e-40, -1e-40, 1e-45],
    "tiny": [2e-38, -1.2e-38],
    "huge": [1e38, -1e38],
    "mixed": [0.0, 1e-40, -1e-20, 0.5, -3.0, 1e38, -1e38],
}
ADAPTIVES = [(), (("adaptive", "var-mean"),), (("adaptive", "var-mean"), ("adaptive_restore", True))]


@pytest.mark.parametrize("values", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("fields", ADAPTIVES, ids=["plain", "adaptive", "restored"])
@over(cases(levels=(256, 4, 3, 2)))
def test_extreme_values_stay_finite(
    case: Case, fields: tuple[tuple[str, Any], ...], values: list[float]
) -> None:
    quantizer = make(dataclasses.replace(case, fields=fields))
    count = int(np.prod(SHAPES[case.tag]))
    x = torch.tensor((values * count)[:count]).reshape(SHAPES[case.tag])
    if quantizer.config.adaptive_restore and learns(quantizer):
        x = x.clamp(-1e30, 1e30)  # a learned value's gradient is the arriving one times the deviation
    gy = torch.from_numpy(generator("gy").standard_normal(x.shape)).float()
    y, gx = backward(quantizer, x, gy)
    assert y.isfinite().all()
    assert gx.isfinite().all()
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def learns(quantizer: Quantizer) -> bool:
    """It has a learned value within the normalisation."""
    return any(name != "gamma" for name, _ in quantizer.named_parameters())


@pytest.mark.parametrize("kind", ["mean", "var", "var-mean"])
@over(cases(levels=(4, 3, 2), where=lambda method: not {"clip_val", "alpha0"} & set(method.state)))
def test_a_gradient_does_not_overflow_where_normalisation_is_undone(case: Case, kind: str) -> None:
    """Multiplied by the deviation and divided by it again, it is that of the same tensor in another unit."""
    quantizer = make(case.with_fields(adaptive=kind, adaptive_restore=True))
    assert not learns(quantizer)
    x, gy = tensor(case).clamp(-3, 3) + 0.5, 100 * tensor(case, "gy")
    y, gx = backward(copy.deepcopy(quantizer), x, gy)
    huge_y, huge_gx = backward(quantizer, x * 2.0**126, gy)
    torch.testing.assert_close(huge_y * 2.0**-126, y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(huge_gx, gx, rtol=1e-4, atol=1e-4 * float(gx.abs().max()))


LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("kind", ["mean", "mean-var"])
@pytest.mark.parametrize("values", [[1e38, -1e38, 2e38], [LARGEST, -LARGEST], [LARGEST], [LARGEST, 0.0, 1.0]])
@over(cases(levels=(4, 3, 2)))
def test_normalised_sums_do_not_overflow(case: Case, values: list[float], kind: str, restore: bool) -> None:
    quantizer = make(case.with_fields(adaptive=kind, adaptive_restore=restore))
    count = int(np.prod(SHAPES[case.tag]))
    x = torch.tensor((values * count)[:count]).reshape(SHAPES[case.tag])
    y, gx = backward(quantizer, x, torch.full_like(x, 1e-6))  # times the deviation where it is undone
    assert y.isfinite().all()
    assert gx.isfinite().all()
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())
    assert torch.equal(quantizer.eval().integers(x).dequantize(), quantizer(x))


def test_huge_values_are_normalised_as_small_ones() -> None:
    """1e38 times a tensor, whose sums are no float32: the same levels."""
    quantizer = make(Case("lsq", "wt", 4, half_range=False, fields=(("adaptive", "var-mean"),)))
    x = torch.from_numpy(generator("x").standard_normal(SHAPES["wt"])).float().clamp(-3, 3)
    assert torch.equal(quantizer(x * 2.0**126), quantizer(x))


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("kind", ["mean", "var-mean"])
@pytest.mark.parametrize("size", [1, 9])
@over(cases(levels=(4, 3, 2), where=lambda method: "wt" in method.tags))
def test_adaptive_groups_without_variance(case: Case, size: int, kind: str, restore: bool) -> None:
    """One element per group, as a depth-wise 1x1 convolution has, and groups of equal elements."""
    quantizer = make(dataclasses.replace(case, tag="wt").with_fields(adaptive=kind, adaptive_restore=restore))
    x = torch.linspace(-1, 1, CHANNELS).reshape(CHANNELS, 1, 1, 1).repeat(1, size, 1, 1)
    y, gx = backward(quantizer, x)
    assert y.isfinite().all()
    assert gx.isfinite().all()


@over(cases(where=lambda method: method.method == "lq"))
def test_a_mean_that_cancels_the_epsilon_stays_finite(case: Case) -> None:
    quantizer = make(case.with_fields(adaptive="mean", adaptive_restore=True))
    y, gx = backward(quantizer, torch.full(SHAPES[case.tag], -1e-5))
    assert y.isfinite().all()
    assert gx.isfinite().all()


@pytest.mark.parametrize("adaptive", ["none", "var-mean"])
@over(cases(groups=(None, 1)))
def test_a_tensor_of_zeros_keeps_the_size_of_its_gradient(case: Case, adaptive: str) -> None:
    """Zero-initialised weights must not get a gradient that ends the training in the first step."""
    _, gx = backward(make(case.with_fields(adaptive=adaptive)), torch.zeros(SHAPES[case.tag]))
    assert gx.abs().max() <= 1e6


def test_adaptive_undone_gives_back_the_mean_of_a_constant_group() -> None:
    fields = (("adaptive", "var-mean"), ("adaptive_restore", True))
    quantizer = make(Case("lsq", "wt", 4, half_range=False, fields=fields))
    x = torch.linspace(-1, 1, CHANNELS).reshape(CHANNELS, 1, 1, 1).repeat(1, 6, 3, 3)
    torch.testing.assert_close(quantizer(x), x)


@over(cases(where=lambda method: method.monotonic))
def test_an_empty_tensor_is_refused_by_name(case: Case) -> None:
    shape = (0, *SHAPES[case.tag][1:])
    with pytest.raises(ValueError, match=r"conv1: cannot quantize an empty tensor of shape \(0, "):
        make(case)(torch.empty(shape))


@pytest.mark.parametrize("start", [-0.1, 0.0, -1e-12])
@over(cases(where=lambda method: method.range_name == "clip_val"))
def test_a_clip_value_at_or_below_zero_recovers(case: Case, start: float) -> None:
    quantizer = make(case)
    clip = quantizer.get_parameter("clip_val")
    nn.init.constant_(clip, start)
    x = tensor(case).abs()
    optimizer = torch.optim.SGD([clip], lr=0.05 * clip.numel())
    for step in range(100):
        optimizer.zero_grad()
        y = quantizer(x)
        assert y.isfinite().all()
        functional.mse_loss(y, x).backward()
        assert clip.grad is not None
        assert clip.grad.isfinite().all()
        if step == 0:
            assert (clip.grad != 0).all()
        optimizer.step()
    assert (clip.abs() > 0.1).all()
    assert functional.mse_loss(quantizer(x), x) < 0.5 * x.square().mean()


@over(cases(groups=(None, 1, 2, CHANNELS), tags=("fm", "wt", "ot")))
def test_state_names_and_shapes(case: Case) -> None:
    quantizer = build_quantizer(case.config, case.site)
    default = CHANNELS if case.tag == "wt" else 1
    groups = default if case.quant_group is None else case.quant_group
    per_group = (groups, 1, 1, 1) if case.tag == "wt" else (1,) if groups == 1 else (1, groups, 1, 1)
    bits = (case.levels - 1).bit_length()
    shapes = {name: (bits, groups) if name == "basis" else per_group for name in case.method.state}
    shapes |= {"iteration": (1,), "level_num": (1,)}
    assert {name: tuple(value.shape) for name, value in quantizer.state_dict().items()} == shapes
    with_gamma = build_quantizer(case.with_fields(gamma=True).config, case.site)
    assert with_gamma.state_dict().keys() == shapes.keys() | {"gamma"}
    assert tuple(with_gamma.get_parameter("gamma").shape) == per_group


@over(cases(where=lambda method: bool(method.range_name)))
def test_the_clip_value_starts_at_the_boundary(case: Case) -> None:
    quantizer = make(case.with_fields(boundary=2.5), randomised=False)
    assert quantizer.get_parameter("clip_val").unique().tolist() == [2.5]


@pytest.mark.parametrize(
    ("tag", "requested", "groups"),
    [("fm", None, 1), ("ot", None, 1), ("wt", None, 12), ("fm", 4, 4), ("fm", -4, 3), ("wt", -6, 2),
     ("wt", -12, 1), ("fm", -1, 12), ("ot", 12, 12)],
)  # fmt: skip
def test_number_of_groups(tag: str, requested: int | None, groups: int) -> None:
    config = QuantizerConfig(tag=tag, enable=True, method="lsq", levels=4, quant_group=requested)
    site = LayerSite(name="conv1", channels=12, channel_dim=0 if tag == "wt" else 1, ndim=4, fan=1)
    quantizer = build_quantizer(config, site)
    assert quantizer.groups == groups
    assert quantizer.get_parameter("clip_val").numel() == groups


@pytest.mark.parametrize("requested", [0, 5, 24, -5, -24])
@pytest.mark.parametrize("tag", ["fm", "wt", "ot"])
def test_groups_that_do_not_divide_name_the_layer(tag: str, requested: int) -> None:
    layer = QuantConv2d(12, 12, 3)
    enabled = QuantizerConfig(tag=tag, enable=True, method="lsq", levels=4, quant_group=requested)
    with pytest.raises(UserError, match=rf"^layer2\.0\.conv1: --{tag}_quant_group {requested} .*12 channels"):
        layer.build_quantizers(dataclasses.replace(QuantConfig(), **{tag: enabled}), "layer2.0.conv1")


def test_groups_are_of_neighbouring_channels() -> None:
    quantizer = make(Case("lsq", "fm", 2, half_range=True, quant_group=4))
    with torch.no_grad():
        quantizer.get_parameter("clip_val").copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1))
    y = quantizer(torch.full((1, CHANNELS, 1, 1), 9.0))
    assert y.flatten().tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0]


def test_registering_a_method_twice_is_an_error() -> None:
    before = methods()
    with pytest.raises(ValueError, match="lsq is registered twice for fm"):
        register("lsq", "fm")(methods()["lsq", "fm"])
    assert methods() == before


@pytest.mark.parametrize("tag", ["fm", "wt", "ot"])
def test_an_unknown_method_lists_the_known_ones(tag: str) -> None:
    with pytest.raises(
        UserError, match=f"--{tag}_enable: 'lsqq' has no quantizer for {tag}.*dorefa.*lsq.*pact"
    ):
        build_quantizer(
            QuantizerConfig(tag=tag, enable=True, method="lsqq"), Case("lsq", tag, 4, half_range=False).site
        )


def test_a_quantizer_that_is_not_enabled_is_the_identity() -> None:
    quantizer = build_quantizer(
        QuantizerConfig(tag="fm", method="lsq"), Case("lsq", "fm", 4, half_range=True).site
    )
    assert type(quantizer) is nn.Identity


@over(cases(levels=(256, 4), where=lambda method: {4, 8} <= set(method.levels) and method.method != "lq"))
def test_set_levels(case: Case) -> None:
    quantizer = make(case)
    ranged = quantizer.current_range().clone()
    quantizer.set_levels(4)
    assert (quantizer.levels, quantizer.get_buffer("level_num").tolist()) == (4, [4])
    assert torch.equal(quantizer.current_range(), ranged)
    fresh = make(dataclasses.replace(case, levels=4))
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(quantizer(tensor(case)), fresh(tensor(case)))
    assert max(row_counts(quantizer, quantizer(tensor(case)))) <= 4


@over(cases(levels=(8,), where=lambda method: method.method in ("lsq", "pact") and 4 in method.levels))
def test_keeping_the_step_scales_the_clip_value(case: Case) -> None:
    """Lower and higher number: the levels that both grids have stay where they are."""
    quantizer = make(case)
    if quantizer.config.method != "lsq" and case.tag == "wt":
        pytest.skip("DoReFa-Net's weight, which has no clip value")
    before = quantizer.current_range().clone()
    changed = quantizer.set_levels(4, keep_step=True)
    assert [name for name, value in quantizer.named_parameters() if any(value is c for c in changed)] == [
        "clip_val"
    ]
    ratio = (4 // 2 - 1) / (8 // 2 - 1) if quantizer.config.grid == "midtread" else (4 - 1) / (8 - 1)
    torch.testing.assert_close(quantizer.current_range(), before * ratio)
    assert quantizer.set_levels(4, keep_step=True) == ()
    quantizer.set_levels(8, keep_step=True)
    torch.testing.assert_close(quantizer.current_range(), before)


@pytest.mark.parametrize(
    ("case", "levels", "message"),
    [
        (Case("lsq", "fm", 4, half_range=True), 1, "at least 2 levels"),
        (Case("xnor", "fm", 2, half_range=True), 4, "takes at most 2 levels"),
        (Case("fatnn", "fm", 3, half_range=True), 4, "has 2 slopes"),
        (Case("fatnn", "wt", 3, half_range=False), 2, "cannot change from 3 to 2"),
        (Case("lq", "wt", 4, half_range=False), 8, "4 levels are fixed"),
        (Case("lsq-midtread", "wt", 4, half_range=False), 2, "mid-tread grid needs at least 3"),
        (Case("dorefa-bin", "wt", 2, half_range=False), 4, "wt_bin has 2 levels"),
    ],
    ids=str,
)
def test_levels_that_a_method_does_not_take(case: Case, levels: int, message: str) -> None:
    quantizer = make(case)
    before = quantizer.state_dict()
    with pytest.raises(UserError, match=f"conv1: .*{message}"):
        quantizer.set_levels(levels)
    assert quantizer.levels == case.levels
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


@pytest.mark.parametrize("tag", ["fm", "wt"])
@pytest.mark.parametrize(("theirs", "ours"), [(16, 4), (4, 16)])
def test_a_basis_of_other_bits_gives_its_range(tag: str, theirs: int, ours: int) -> None:
    half = tag == "fm"
    trained, quantizer = (
        make(Case("lq", tag, levels, half_range=half, quant_group=2)) for levels in (theirs, ours)
    )
    entries = quantizer.adapted(trained.state_dict())
    basis = entries["basis"]
    assert basis.shape == (quantizer.get_buffer("basis").shape)
    top = trained.get_buffer("basis").abs().sum(dim=0)
    torch.testing.assert_close(basis.sum(dim=0), top)
    torch.testing.assert_close(basis[1:], 2 * basis[:-1])  # evenly spaced levels


def test_fewer_levels_leave_the_last_slopes_out() -> None:
    trained, quantizer = (make(Case("fatnn", "fm", levels, half_range=True)) for levels in (4, 3))
    entries = quantizer.adapted(trained.state_dict())
    assert "alpha2" in trained.state_dict() and entries.keys() == quantizer.state_dict().keys()


@over(cases(levels=(2, 4, 16), groups=(None, 2, 1), where=lambda method: method.method == "lq"))
def test_least_squares_from_counts_is_that_of_the_codes(case: Case) -> None:
    """One bit at a time gives B^T B and B^T x of the written-out codes."""
    quantizer = make(case)
    assert isinstance(quantizer, LQ)
    rows = quantizer.grouped(tensor(case).float())
    positions, _, order = quantizer.assign(rows)
    numbers = order.gather(1, positions)
    codes = quantizer.codes[numbers].double()
    gram, target = quantizer.normal_equations(rows, numbers)
    torch.testing.assert_close(gram, codes.transpose(1, 2) @ codes)
    torch.testing.assert_close(target, codes.transpose(1, 2) @ rows.double().unsqueeze(2))


@over(cases(levels=(4,), where=lambda method: {4, 8} <= set(method.levels) and method.method != "lq"))
def test_the_state_brings_the_number_of_levels(case: Case) -> None:
    trained = make(dataclasses.replace(case, levels=8))
    quantizer = make(case)
    quantizer.load_state_dict(trained.state_dict())
    assert quantizer.levels == 8
    assert torch.equal(quantizer(tensor(case)), trained(tensor(case)))


@over(cases(groups=(None, 2)))
def test_loading_the_state_reproduces_the_output(case: Case) -> None:
    trained = make(case)
    for step in range(3):
        trained(tensor(case, step))
    fresh = make(case, randomised=False)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.eval()(tensor(case)), trained.eval()(tensor(case)))


@over(cases(groups=(None, 2)))
def test_evaluation_changes_nothing(case: Case) -> None:
    quantizer = make(case.with_fields(stable=2))
    for step in range(4):
        before = copy.deepcopy(quantizer.state_dict())
        quantizer.eval()
        first = quantizer(tensor(case, step))
        assert torch.equal(first, quantizer(tensor(case, step)))
        after = quantizer.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(first, tensor(case, step)) == (step < 2)
        quantizer.train()
        quantizer(tensor(case, step))
        assert quantizer.get_buffer("iteration").tolist() == [step + 1]


# The warm-up ---------------------------------------------------------------------------------------


@over(cases(groups=(None, 2)))
def test_warm_up_passes_exactly_the_first_training_iterations(case: Case) -> None:
    quantizer = make(case.with_fields(stable=3))
    for step in range(5):
        x = tensor(case, step)
        y, gx = backward(quantizer, x)
        assert torch.equal(y, x) == (step < 3)
        if step < 3:
            assert torch.equal(gx, torch.ones_like(gx))
        else:
            assert max(row_counts(quantizer, y)) <= case.levels


@pytest.mark.parametrize("correlate", [-1.0, 0.5])
@over(cases(groups=(None, 2), where=lambda method: method.calibrates and method.method != "lq"))
def test_warm_up_takes_the_mean_of_the_largest_magnitudes(case: Case, correlate: float) -> None:
    quantizer = make(case.with_fields(stable=3, correlate=correlate))
    groups = Groups(quantizer.groups, case.site.channel_dim)
    largest = np.array([np.abs(groups.rows(sample(case, step))).max(axis=1) for step in range(3)])
    for step in range(3):
        quantizer(tensor(case, step))
    expected = largest.mean(axis=0) * (correlate if correlate > 0 else 1.0)
    np.testing.assert_allclose(quantizer.current_range().numpy().ravel(), expected, rtol=1e-5)
    quantizer(tensor(case, 4) * 100)  # past the warm-up nothing is collected
    np.testing.assert_allclose(quantizer.current_range().numpy().ravel(), expected, rtol=1e-5)


@over(cases(groups=(None, 2), where=lambda method: method.calibrates))
def test_warm_up_in_epochs_is_saved(case: Case) -> None:
    case = case.with_fields(stable_epoch=1)
    quantizer = make(case)
    quantizer.set_stable(2)
    for step in range(3):
        x = tensor(case, step)
        assert torch.equal(quantizer(x), x) == (step < 2)
    fresh = make(case, randomised=False)
    fresh.set_stable(2)
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh.eval()(tensor(case)), quantizer.eval()(tensor(case)))


@over(cases(groups=(None, 2), where=lambda method: method.calibrates))
def test_after_the_warm_up_a_range_is_left_alone(case: Case) -> None:
    """What training has made of slopes, clip values or a basis stays, to the bit."""
    quantizer = make(case.with_fields(stable=1))
    quantizer(tensor(case))
    with torch.no_grad():
        for number, parameter in enumerate(quantizer.parameters(), 1):
            parameter.mul_(number)  # slopes that differ
    before = {name: value.clone() for name, value in quantizer.named_parameters()}
    buffers = {
        name: value.clone() for name, value in quantizer.named_buffers() if name in ("clip", "range_mean")
    }
    quantizer(tensor(case, 1))
    for name, value in (before | buffers).items():
        assert torch.equal(value, quantizer.state_dict()[name]), name


@over(cases(levels=(4, 16), groups=(None, 2), where=lambda method: method.method == "lq"))
def test_a_warm_up_gives_lq_its_top_level(case: Case) -> None:
    quantizer = make(case.with_fields(stable=2))
    for step in range(2):
        quantizer(tensor(case, step))
    torch.testing.assert_close(quantizer.current_range(), quantizer.get_buffer("range_mean"))


@over(cases(levels=(2, 3, 4), where=lambda method: method.method == "fatnn"))
def test_closed_form_survives_a_huge_batch(case: Case) -> None:
    quantizer = make(case.with_fields(closed_form=True))
    quantizer(torch.full_like(tensor(case), 3e38))
    assert quantizer.get_buffer("output_scale").isfinite().all()
    assert quantizer(tensor(case)).isfinite().all()


@pytest.mark.parametrize("levels", [4, 16, 256])
@pytest.mark.parametrize("value", [0.0, 0.03, -0.03])
def test_lq_weights_without_spread_follow_the_regularised_system(levels: int, value: float) -> None:
    """Dead or constant filters: the regularisation makes their system solvable, at any number of bits."""
    quantizer = make(Case("lq", "wt", levels, half_range=False))
    assert isinstance(quantizer, LQ)
    x = torch.full(SHAPES["wt"], value)
    rows = quantizer.grouped(x)
    positions, _, order = quantizer.assign(rows)
    codes = quantizer.codes[order.gather(1, positions)].double().numpy()
    before = quantizer.basis.clone().double().numpy()
    quantizer(x)
    for group in range(CHANNELS):
        b = codes[group]
        gram = b.T @ b
        np.fill_diagonal(gram, (gram.diagonal() + 1e-4) * 1.000001)
        wanted = np.linalg.solve(gram, b.T @ rows[group].double().numpy() + 1e-4 * before[:, group])
        moved = 0.9 * before[:, group] + 0.1 * wanted
        np.testing.assert_allclose(quantizer.basis[:, group].numpy(), moved, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("stable", "expected"), [(2, 6), (9, 9)])
def test_the_longer_warm_up_counts(stable: int, expected: int) -> None:
    case = Case("lsq", "fm", 4, half_range=True, fields=(("stable", stable), ("stable_epoch", 2)))
    quantizer = make(case)
    quantizer.set_stable(3)
    passed = [torch.equal(quantizer(tensor(case)), tensor(case)) for _ in range(12)]
    assert passed == [True] * expected + [False] * (12 - expected)


@over(cases(groups=(None, 2), where=lambda method: method.calibrates))
def test_warm_up_on_zeros_recovers(case: Case) -> None:
    """A layer whose first inputs are all zero has no range yet; later ones give it one."""
    quantizer = make(case.with_fields(stable=3))
    for step in range(3):
        quantizer(tensor(case, step) * (step > 0))
    y, gx = backward(quantizer, tensor(case))
    assert y.isfinite().all()
    assert gx.isfinite().all()
    assert 1 < max(row_counts(quantizer, y)) <= case.levels
    assert (quantizer.current_range() > 0.1 * case.method.spread).all()


@over(cases(where=lambda method: method.calibrates))
def test_warm_up_on_nothing_but_zeros_stays_finite(case: Case) -> None:
    quantizer = make(case.with_fields(stable=1))
    quantizer(torch.zeros(SHAPES[case.tag]))
    for x in (torch.zeros(SHAPES[case.tag]), tensor(case)):
        y, gx = backward(quantizer, x)
        assert y.isfinite().all()
        assert gx.isfinite().all()
        assert torch.equal(quantizer.eval().integers(x).dequantize(), quantizer(x).detach())
        quantizer.train()


@over(cases(where=lambda method: method.calibrates))
def test_two_forwards_before_a_backward(case: Case) -> None:
    """A layer that is used twice, while its warm-up collects and after."""
    quantizer = make(case.with_fields(stable=2))
    for _ in range(3):
        x = tensor(case).requires_grad_()
        (quantizer(x).sum() + quantizer(2 * x).sum()).backward()
        assert x.grad is not None


@pytest.mark.parametrize(
    "fields", [{}, {"adaptive": "var-mean", "adaptive_restore": True}], ids=["plain", "restored"]
)
def test_proxquant_blends_the_quantized_value_in(fields: dict[str, Any]) -> None:
    case = Case("lsq", "wt", 4, half_range=False).with_fields(**fields)
    quantizer, plain = make(case.with_fields(proxquant_step=4)), make(case)
    plain.load_state_dict(quantizer.state_dict())
    x = tensor(case)
    for share in (0.75, 0.5, 0.25, 0.0, 0.0):
        torch.testing.assert_close(quantizer(x), share * x + (1 - share) * plain(x))
    assert torch.equal(quantizer.eval()(x), plain(x))


def test_proxquant_begins_after_the_warm_up() -> None:
    case = Case("lsq", "wt", 4, half_range=False)
    quantizer, plain = make(case.with_fields(proxquant_step=2, stable=2)), make(case)
    x = tensor(case)
    for _ in range(2):
        assert torch.equal(quantizer(x), x)
    plain.load_state_dict({"clip_val": quantizer.get_parameter("clip_val")}, strict=False)
    torch.testing.assert_close(quantizer(x), 0.5 * x + 0.5 * plain(x))
    assert torch.equal(quantizer(x), plain(x))


# Integers ------------------------------------------------------------------------------------------

ROUNDING = 2.0**-22  # of the top level: how far an engine's code times scale may be from what training sees


@over(each_level(cases(groups=(None, 2))))
def test_integers_stand_for_the_quantized_tensor(case: Case) -> None:
    quantizer = make(case).eval()
    x = tensor(case)
    found = quantizer.integers(x)
    y = quantizer(x)
    assert torch.equal(found.dequantize(), y)
    assert (found.codes.dtype, found.codes.shape) == (torch.int32, x.shape)
    assert max(row_counts(quantizer, found.codes)) <= case.levels
    assert 0 <= found.numbers.min() <= found.numbers.max() < case.levels
    low, high = int(found.codes.min()), int(found.codes.max())
    if case.config.method == "xnor":
        assert (low, high) == (-1, 1)
    elif case.half_range or found.scale is None:
        assert 0 <= low <= high < case.levels
    elif case.config.grid == "midtread":
        assert -(case.levels // 2) <= low <= high <= (case.levels - 1) // 2
    else:
        assert -case.levels < low <= high < case.levels
    if found.scale is not None:
        engine = (found.codes - found.zero_point) * found.scale
        largest = found.codebook.abs().max() * found.factor
        assert ((engine - y).abs() <= ROUNDING * largest).all()


@pytest.mark.parametrize(
    "fields", [{"gamma": True}, {"adaptive": "var-mean", "adaptive_restore": True}, {"adaptive": "var-mean"}],
    ids=["gamma", "restored", "adaptive"],
)  # fmt: skip
@over(cases(groups=(None, 2)))
def test_integers_with_what_comes_on_top(case: Case, fields: dict[str, Any]) -> None:
    quantizer = make(case.with_fields(**fields)).eval()
    for dtype in (torch.float32, torch.bfloat16):
        x = tensor(case).to(dtype)
        assert torch.equal(quantizer.integers(x).dequantize().to(dtype), quantizer(x))


@over(cases(where=lambda method: method.calibrates))
def test_integers_change_nothing(case: Case) -> None:
    quantizer = make(case.with_fields(stable=1))
    quantizer(tensor(case))
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.integers(tensor(case))
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())


# Layers --------------------------------------------------------------------------------------------

LSQ = {"enable": True, "method": "lsq", "levels": 4}
BOTH = QuantConfig(fm=QuantizerConfig(tag="fm", half_range=True, **LSQ), wt=QuantizerConfig(tag="wt", **LSQ))
FULL_RANGE = dataclasses.replace(BOTH, fm=QuantizerConfig(tag="fm", **LSQ))


def conv(
    config: QuantConfig, channels: tuple[int, int] = (4, 6), kernel: Any = 3, **options: Any
) -> QuantConv2d:
    torch.manual_seed(0)
    layer = QuantConv2d(*channels, kernel, **options)
    layer.build_quantizers(config, "conv1")
    with torch.no_grad():
        for _, quantizer in layer.quantizers():
            for parameter in quantizer.parameters():
                parameter.uniform_(0.4, 1.2)
    return layer


def image(*shape: int) -> Tensor:
    return torch.from_numpy(generator("image", shape).standard_normal(shape).astype(np.float32))


CONVOLUTIONS: dict[str, tuple[dict[str, Any], tuple[int, int, int, int], str]] = {
    # options, pads left, right, top, bottom, mode of functional.pad
    "plain": ({}, (0, 0, 0, 0), "constant"),
    "number": ({"padding": 2}, (2, 2, 2, 2), "constant"),
    "tuple": ({"padding": (1, 2)}, (2, 2, 1, 1), "constant"),
    "valid": ({"padding": "valid"}, (0, 0, 0, 0), "constant"),
    "same": ({"padding": "same"}, (1, 1, 1, 1), "constant"),
    "same, even kernel": ({"kernel": (2, 4), "padding": "same"}, (1, 2, 0, 1), "constant"),
    "same, dilated": ({"kernel": (2, 3), "padding": "same", "dilation": (3, 2)}, (2, 2, 1, 2), "constant"),
    "stride": ({"padding": 1, "stride": (2, 3)}, (1, 1, 1, 1), "constant"),
    "dilation": ({"padding": 2, "dilation": 2}, (2, 2, 2, 2), "constant"),
    "no bias": ({"padding": 1, "bias": False}, (1, 1, 1, 1), "constant"),
    "groups": ({"padding": 1, "channels": (4, 6), "groups": 2}, (1, 1, 1, 1), "constant"),
    "depth-wise": ({"padding": 1, "channels": (4, 8), "groups": 4}, (1, 1, 1, 1), "constant"),
    "reflect": ({"padding": (2, 1), "padding_mode": "reflect"}, (1, 1, 2, 2), "reflect"),
    "replicate": ({"padding": 1, "padding_mode": "replicate"}, (1, 1, 1, 1), "replicate"),
    "circular": ({"padding": 1, "padding_mode": "circular"}, (1, 1, 1, 1), "circular"),
    "reflect, same": ({"padding": "same", "padding_mode": "reflect"}, (1, 1, 1, 1), "reflect"),
}
RANGES = {
    "half": BOTH,
    "full": FULL_RANGE,
    "grouped": dataclasses.replace(
        FULL_RANGE,
        fm=QuantizerConfig(tag="fm", quant_group=2, **LSQ),
        ot=QuantizerConfig(tag="ot", quant_group=-2, **LSQ),
    ),
    "adaptive": dataclasses.replace(
        BOTH, fm=QuantizerConfig(tag="fm", half_range=True, adaptive="var-mean", **LSQ)
    ),
    "STE-scale": QuantConfig(
        fm=QuantizerConfig(
            tag="fm", enable=True, method="pact", levels=4, half_range=True, grad_type="STE-scale"
        )
    ),
    "element-scale": dataclasses.replace(
        BOTH, fm=QuantizerConfig(tag="fm", half_range=True, grad_scale="scale-element", **LSQ)
    ),
    "weight": dataclasses.replace(BOTH, fm=QuantizerConfig(tag="fm")),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("config", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize(("options", "pads", "mode"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_convolution_pads_and_quantizes_in_order(
    options: dict[str, Any], pads: tuple[int, int, int, int], mode: str, config: QuantConfig, after: bool
) -> None:
    layer = conv(config, padding_after_quant=after, **options)
    x = image(2, 4, 7, 8).requires_grad_()
    other = copy.deepcopy(layer)
    xr = x.detach().clone().requires_grad_()
    padded = other.quant_activation(functional.pad(xr, pads, mode)) if not after else functional.pad(
        other.quant_activation(xr), pads, mode
    )  # fmt: skip
    weight = other.quant_weight(other.weight)
    expected = other.quant_output(
        functional.conv2d(padded, weight, other.bias, other.stride, 0, other.dilation, other.groups)
    )
    y = layer(x)
    torch.testing.assert_close(y, expected)
    gy = image(*y.shape)
    y.backward(gy)
    expected.backward(gy)
    torch.testing.assert_close(x.grad, xr.grad)
    for mine, reference in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)


@pytest.mark.parametrize(("after", "border"), [(False, True), (True, False)])
@pytest.mark.parametrize("method", ["lsq", "xnor", "dorefa", "pact", "lq"])
def test_padded_positions_take_a_level_or_exact_zero(method: str, after: bool, border: bool) -> None:
    """A full range of two levels has no zero: a 1x1 kernel of ones shows what the padding became."""
    config = QuantConfig(fm=QuantizerConfig(tag="fm", enable=True, method=method, levels=2))
    layer = QuantConv2d(4, 1, 1, padding=1, bias=False, padding_after_quant=after)
    layer.build_quantizers(config, "conv1")
    nn.init.ones_(layer.weight)
    level = layer.eval().quant_activation(torch.zeros(1, 4, 1, 1))[0, 0, 0, 0].item()
    assert abs(level) > 0.5
    y = layer(image(2, 4, 5, 5))
    edge = torch.cat([y[:, :, 0].flatten(), y[:, :, -1].flatten(), y[..., 0].flatten(), y[..., -1].flatten()])
    torch.testing.assert_close(edge, torch.full_like(edge, 4 * level if border else 0.0))


def test_binary_padding_is_plus_one() -> None:
    layer = QuantConv2d(4, 1, 1, padding=1, bias=False)
    layer.build_quantizers(
        QuantConfig(fm=QuantizerConfig(tag="fm", enable=True, method="xnor", levels=2)), "conv1"
    )
    nn.init.ones_(layer.weight)
    assert layer(image(1, 4, 3, 3))[0, 0, 0].tolist() == [4.0] * 5


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
@pytest.mark.parametrize("groups", [None, 2, 6])
def test_linear(shape: tuple[int, ...], groups: int | None) -> None:
    fm = QuantizerConfig(tag="fm", half_range=True, quant_group=groups, **LSQ)
    config = QuantConfig(fm=fm, wt=QuantizerConfig(tag="wt", **LSQ), ot=QuantizerConfig(tag="ot", **LSQ))
    layer = QuantLinear(6, 4)
    layer.build_quantizers(config, "classifier")
    activation, weight = (layer.get_parameter(f"quant_{part}.clip_val") for part in ("activation", "weight"))
    assert tuple(activation.shape) == ((1,) if groups is None else (1, groups))
    assert tuple(weight.shape) == (4, 1)
    nn.init.uniform_(activation, 0.5, 1.5)
    x = image(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 4)

    def double(value: Tensor) -> Array:
        return value.detach().double().numpy()

    axis = len(shape) - 1
    count = groups or 1
    quantized = oracle.uniform_round(
        double(x), Groups(count, axis).spread(double(activation).ravel(), double(x)), 4, True
    )
    weights = oracle.uniform_round(double(layer.weight), double(weight), 4, False)
    output = oracle.uniform_round(quantized @ weights.T + double(layer.bias), np.ones(1), 4, False)
    np.testing.assert_allclose(double(y), output, atol=1e-5)
    y.sum().backward()
    assert activation.grad is not None
    assert activation.grad.shape == activation.shape


@pytest.mark.parametrize("fields", [{}, {"adaptive": "mean-var"}, {"quant_group": 2}], ids=str)
def test_one_sample_without_a_batch(fields: dict[str, Any]) -> None:
    """As the base classes take it; channels and samples are told apart all the same."""
    config = QuantConfig(
        fm=QuantizerConfig(tag="fm", enable=True, method="lsq", levels=4, half_range=True, **fields),
        wt=QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4),
        ot=QuantizerConfig(tag="ot", enable=True, method="lsq", levels=8, **fields),
    )
    for layer, x in ((QuantConv2d(4, 6, 3), torch.randn(4, 5, 7)), (QuantLinear(4, 6), torch.randn(4))):
        layer.build_quantizers(config, "layer")
        assert torch.equal(layer(x), layer(x.unsqueeze(0)).squeeze(0))


@pytest.mark.parametrize("layer", [QuantConv2d(4, 6, 3), QuantLinear(4, 6)], ids=["conv", "linear"])
def test_identity_quantizers_own_nothing(layer: QuantConv2d | QuantLinear) -> None:
    layer.build_quantizers(QuantConfig(), "layer")
    assert layer.state_dict().keys() == {"weight", "bias"}
    assert list(layer.quantizers()) == []
    x = image(2, 4, 5, 5) if isinstance(layer, QuantConv2d) else image(2, 4)
    plain = functional.conv2d if isinstance(layer, QuantConv2d) else functional.linear
    assert torch.equal(layer(x), plain(x, layer.weight, layer.bias))


def test_layers_list_their_quantizers() -> None:
    network = nn.Sequential(conv(BOTH), nn.ReLU(), conv(QuantConfig(), (6, 2)))
    assert [part for part, _ in conv(BOTH).quantizers()] == ["quant_activation", "quant_weight"]
    assert [name for name, _ in quantizers(network)] == ["0.quant_activation", "0.quant_weight"]


def test_convolution_under_autocast_computes_in_the_lower_precision() -> None:
    layer = conv(BOTH, padding=1)
    other = copy.deepcopy(layer)
    x = image(2, 4, 7, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        expected = functional.conv2d(
            other.quant_activation(x), other.quant_weight(other.weight), other.bias, padding=1
        )
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters()
    )


# Compilation and host synchronisation --------------------------------------------------------------

# What is compiled beside each class of quantizers: entry, tag, fields.
EXTRAS: list[tuple[str, str, dict[str, Any]]] = [
    *((name, "fm", {"stable": 2}) for name in ("dorefa", "lsq", "lq")),
    ("lsq", "fm", {"quant_group": 2, "gamma": True, "grad_scale": "scale-element"}),
    ("lsq", "fm", {"adaptive": "var-mean", "adaptive_restore": True, "proxquant_step": 5}),
    ("lsq", "wt", {"stable": 2, "adaptive": "var-mean", "gamma": True, "grad_scale": "fan-scale"}),
    ("lsq", "ot", {"quant_group": 4}),
    ("pact", "fm", {"grad_type": "STE-scale", "grad_scale": "element-scale"}),
    ("lq", "fm", {"custom_update": True, "quant_group": 2}),
    ("lq-wt", "wt", {"adaptive": "mean-var", "adaptive_restore": True}),
    ("fatnn", "fm", {"closed_form": True, "stable": 2}),
]


def one_of_each_class() -> list[Case]:
    """A case for each class of quantizers and each of its ranges and fields."""
    found: dict[object, Case] = {}
    for case in cases():
        fields = {name: value for name, value in case.method.fields.items() if name != "grad_type"}
        key = (methods()[case.method.method, case.tag], case.half_range, *fields.items())
        found.setdefault(key, case)
    return list(found.values())


def test_one_of_each_class_leaves_no_range_out() -> None:
    """A range that is never compiled may be compiled into another function unnoticed."""

    def ranges(found: Sequence[Case]) -> set[object]:
        return {(methods()[case.method.method, case.tag], case.half_range) for case in found}

    assert ranges(one_of_each_class()) == ranges(cases())


def layer_config(case: Case) -> QuantConfig:
    return dataclasses.replace(QuantConfig(), **{case.tag: case.config})


LAYERS = [
    *one_of_each_class(),
    *(case.with_fields(adaptive="mean-var", stable=1) for case in one_of_each_class()),
    *(
        next(case for case in cases(tags=(tag,)) if case.name == name).with_fields(**fields)
        for name, tag, fields in EXTRAS
    ),
]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_equals_eager(config: QuantConfig, backend: str, forwards: int) -> None:
    layer = conv(config, (8, 8), padding=1)
    reference = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)  # fused kernels round otherwise
    for step in range(forwards):
        x = image(2, 8, 5, 5) + step
        y, gx = backward(compiled, x)
        expected_y, expected_gx = backward(reference, x)
        close(y, expected_y)
        close(gx, expected_gx)
    for mine, other in zip(layer.state_dict().values(), reference.state_dict().values(), strict=True):
        close(mine, other)
    for mine, other in zip(layer.parameters(), reference.parameters(), strict=True):
        close(mine.grad, other.grad)


@over(LAYERS)
def test_compiles_into_one_graph(case: Case, fresh_compiler: None) -> None:
    compiled_equals_eager(layer_config(case), "aot_eager", forwards=3 if case.config.stable else 1)


BLOCKS = {
    "dorefa,lsq,proxquant": "--fm_bit 2 --wt_bit 2 --ot_bit 4 --wt_grid midtread",
    "pact,wt_gamma,ot_gamma": "--fm_bit 2 --wt_bit 2 --ot_bit 4 --stable 1",
    "lq": "--fm_bit 2 --wt_bit 2 --ot_bit 2 --wt_adaptive mean-var",
    "dorefa,non-uniform,closed_form": "--fm_bit 2 --wt_level 3 --ot_level 3",
    "xnor,gamma": "--fm_grad_type Triangle --fm_custom channel",
}


@pytest.mark.parametrize("words", BLOCKS)
def test_a_residual_block_compiles_into_one_graph(words: str, fresh_compiler: None) -> None:
    """With inputs, weights and outputs quantized, a stride and a shortcut of its own."""
    enable = " ".join(f"--{tag}_enable" for tag in SHAPES)
    line = f"--model resnet20 --width_alpha 0.125 --keyword cifar10,origin,cbsa,fix,{words} {enable} {BLOCKS[words]}"
    torch.manual_seed(0)
    block = build.build_network(read(line.split()).model).get_submodule("layer2.0")
    reference = copy.deepcopy(block)
    # The graph's own backward pass is that of each quantizer, above; that of a whole block is slow to make.
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    x = image(2, 8, 8, 8)
    for found, expected in zip(backward(compiled, x), backward(reference, x), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(block.state_dict(), reference.state_dict())


def test_a_method_may_ask_its_parent_about_padding(fresh_compiler: None) -> None:
    """In a compiled graph too the answer is the parent's."""

    class Asking(PACT):
        def zero_to_zero(self) -> bool:
            return super().zero_to_zero()

    config = QuantizerConfig(tag="fm", enable=True, method="pact", levels=4, half_range=False)
    layer = conv(QuantConfig(fm=config), (8, 8), padding=1)
    assert isinstance(layer.quant_activation, PACT)
    layer.quant_activation.__class__ = Asking
    x = image(2, 8, 5, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore:torch.searchsorted.*non-contiguous")
@over(
    [
        case
        for case in LAYERS
        if case.config.proxquant_step or case.config.closed_form or case.config.custom_update
    ]
)
def test_compiles_with_the_default_backend(case: Case, fresh_compiler: None) -> None:
    compiled_equals_eager(layer_config(case), "inductor", forwards=3)


def test_fake_tensors_show_a_host_synchronisation() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.rand(1).item()


@over([*LAYERS, *(case.with_fields(stable=1, gamma=True) for case in one_of_each_class())])
def test_forward_and_backward_never_wait_for_values(case: Case) -> None:
    """Fake tensors have no values: whatever reads one raises."""
    with FakeTensorMode():
        layer = conv(layer_config(case), (8, 8), padding=1)
        for mode in (True, False):
            y = layer.train(mode)(torch.randn(2, 8, 5, 5, requires_grad=True))
            assert tuple(y.shape) == (2, 8, 5, 5)
            y.sum().backward()
