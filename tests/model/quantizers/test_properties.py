"""Properties that hold for every tensor, found by searching for one where they do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from model.layers.convolution import QuantConv2d
from model.layers.quantized import QuantLinear
from model.quantizers.frame import Quantizer
from model.quantizers.registry import build_quantizer
from model.quantizers.site import LayerSite
from tests import oracle, uneven
from tests.conformance import options
from tests.model.quantizers.cases import METHODS, Case, Method, cases, each_level
from utils.errors import UserError

search = settings(max_examples=150, deadline=None, derandomize=True, database=None)

any_float = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
near_range = st.floats(-4.0, 4.0, width=32)
below_top = any_float.filter(lambda value: abs(value) < 1e38)  # sums of two basis vectors stay finite
clips = st.floats(2.0**-10, 2.0**10, width=32)


def tensors(*elements: st.SearchStrategy[float]) -> st.SearchStrategy[Tensor]:
    """Tensors [n, 1, 1, 1] of a mixture of these elements."""
    values = st.lists(st.one_of(*elements), min_size=1, max_size=24)
    return values.map(lambda found: torch.tensor(found).reshape(-1, 1, 1, 1))


def any_case(where: Callable[[Method], bool] = bool) -> st.SearchStrategy[Case]:
    """Every method with each of its levels and ranges."""
    return st.sampled_from(each_level(cases(where=where)))


def is_uniform(method: Method) -> bool:
    return method.even and (bool(method.range_name) or method is METHODS["dorefa"])


def per_tensor(case: Case, x: Tensor) -> Quantizer:
    """The quantizer of a case for tensors like x [n, 1, 1, 1], all elements in one group."""
    channels, dim = (len(x), 0) if case.tag == "wt" else (1, 1)
    site = LayerSite(name="conv1", channels=channels, channel_dim=dim, ndim=4, fan=9)
    quantizer = build_quantizer(dataclasses.replace(case.config, quant_group=1), site)
    assert isinstance(quantizer, Quantizer)
    return quantizer.eval()


def ends(case: Case, clip: float) -> tuple[float, float]:
    """The lowest and the highest level of an evenly spaced method."""
    if case.half_range:
        return 0.0, clip
    if case.config.grid == "midtread":
        return -clip * (case.levels // 2) / ((case.levels - 1) // 2), clip
    return -clip, clip


@search
@given(case=any_case(is_uniform), x=tensors(any_float, near_range), clip=clips)
def test_bounds_count_and_gradients(case: Case, x: Tensor, clip: float) -> None:
    quantizer = per_tensor(case.with_fields(boundary=clip), x)
    x.requires_grad_()
    y = quantizer(x)
    low, high = ends(case, clip)
    assert (y >= low * (1 + 1e-6)).all()
    assert (y <= high * (1 + 1e-6)).all()
    assert len(y.unique()) <= case.levels
    y.sum().backward()
    assert x.grad is not None
    assert ((x.grad == 0) | ((x.grad - 1).abs() <= case.method.scaled)).all()
    for parameter in quantizer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@search
@given(case=any_case(), x=tensors(any_float, near_range))
def test_output_and_gradients_are_finite(case: Case, x: Tensor) -> None:
    quantizer = per_tensor(case, x).train()
    x.requires_grad_()
    y = quantizer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())


@search
@given(case=any_case(is_uniform), x=tensors(near_range), clip=clips)
def test_the_level_is_the_nearest(case: Case, x: Tensor, clip: float) -> None:
    low, high = ends(case, clip)
    x = (x * clip).clamp(low, high)
    step = (high - low) / (case.levels - 1)
    difference = (per_tensor(case.with_fields(boundary=clip), x)(x) - x).abs()
    assert (difference <= step / 2 + 1e-6 * (high - low)).all()


@search
@given(case=any_case(lambda method: method.method == "lq"), x=tensors(any_float, near_range))
def test_lq_takes_the_nearest_of_its_levels(case: Case, x: Tensor) -> None:
    quantizer = per_tensor(case, x)
    basis = quantizer.get_buffer("basis").double().numpy().ravel()
    levels = uneven.lq_codes(len(basis), case.half_range) @ basis
    values = x.double().numpy()
    nearest = np.abs(values[..., None] - levels).min(axis=-1)
    found = np.abs(quantizer(x).double().numpy() - values)
    np.testing.assert_allclose(found, nearest, rtol=1e-6, atol=1e-6)


@search
@given(case=any_case(lambda method: method.monotonic), x=tensors(any_float, near_range))
def test_larger_inputs_never_get_smaller_levels(case: Case, x: Tensor) -> None:
    x = x.sort(dim=0).values
    assert (per_tensor(case, x)(x).diff(dim=0) >= 0).all()


@search
@given(case=any_case(lambda method: method.idempotent), x=tensors(any_float, near_range), clip=clips)
def test_quantizing_twice_changes_nothing(case: Case, x: Tensor, clip: float) -> None:
    quantizer = per_tensor(case.with_fields(boundary=clip), x)
    y = quantizer(x)
    assert torch.equal(quantizer(y), y)


@search
@given(
    case=any_case(lambda method: is_uniform(method) and "grid" not in method.fields).filter(
        lambda case: not case.half_range
    ),
    x=tensors(near_range),
    clip=clips,
)
def test_a_full_range_is_symmetric(case: Case, x: Tensor, clip: float) -> None:
    """Ties aside, which go to the even level number on both sides."""
    quantizer = per_tensor(case.with_fields(boundary=clip), x)
    x = x * clip
    ratio = x.double().numpy() / clip
    jumps = oracle.uniform_jumps(case.levels, half_range=False)
    clear = torch.from_numpy(np.abs(ratio[..., None] - jumps).min(axis=-1) > 1e-5)
    torch.testing.assert_close(quantizer(-x)[clear], -quantizer(x)[clear], rtol=1e-6, atol=1e-6 * clip)


@search
@given(case=any_case(), x=tensors(any_float, near_range))
def test_integers_stand_for_the_quantized_tensor(case: Case, x: Tensor) -> None:
    quantizer = per_tensor(case, x)
    assert torch.equal(quantizer.integers(x).dequantize(), quantizer(x))


@search
@given(case=any_case(lambda method: method.calibrates), x=tensors(below_top, near_range))
def test_any_first_batch_calibrates(case: Case, x: Tensor) -> None:
    quantizer = per_tensor(case.with_fields(stable=1), x).train()
    assert torch.equal(quantizer(x), x)
    y = quantizer(x)
    assert y.isfinite().all()
    assert len(y.unique()) <= case.levels
    quantizer.eval()
    assert torch.equal(quantizer.integers(x).dequantize(), quantizer(x))


WORDS = (
    "dorefa", "dorefa,wt_bin", "dorefa,lsq", "dorefa,fm_non-uniform,wt_lsq", "dorefa,ot_lsq", "dorefa,non-uniform",
    "dorefa,non-uniform,closed_form", "pact", "pact,wt_lsq", "lq", "lq,custom-update", "xnor", "xnor,gamma",
    "reactnet", "dorefa,lsq,wt_gamma,ot_gamma", "dorefa,lsq,proxquant",
)  # fmt: skip
CHOICES = {
    "bit": ("1", "2", "3", "4", "8"),
    "level": ("2", "3", "5"),
    "quant_group": ("1", "2", "8", "-1", "-4", "3"),
    "adaptive": ("none", "mean", "var", "mean-var", "var-mean"),
    "adaptive_restore": ("",),
    "half_range": ("",),
    "grad_type": ("none", "STE", "STE-scale", "Triangle"),
    "grad_scale": ("fan-scale", "scale-fan", "element-scale", "scale-element", "paper"),
    "grid": ("midrise", "midtread"),
    "grad_window": ("0.5", "3.0"),
    "scale": ("0.9", "3.0"),
    "boundary": ("0.5", "3.0"),
}


@st.composite
def lines(draw: st.DrawFn) -> str:
    """Options of all three quantizers, of a method that `--keyword` names."""
    line = f"--keyword {draw(st.sampled_from(WORDS))}"
    for tag in draw(st.lists(st.sampled_from(("fm", "wt", "ot")), min_size=1, unique=True)):
        line += f" --{tag}_enable --{tag}_bit {draw(st.sampled_from(CHOICES['bit']))}"
        for name in draw(
            st.lists(st.sampled_from(sorted(CHOICES.keys() - {"bit"})), max_size=3, unique=True)
        ):
            line += f" --{tag}_{name} {draw(st.sampled_from(CHOICES[name]))}".rstrip()
    return line + draw(
        st.sampled_from(("", " --stable 1", " --fm_custom channel", " --fm_custom resolution"))
    )


@settings(search, max_examples=50)
@given(line=lines())
def test_options_are_refused_or_train(line: str) -> None:
    """A convolution, a depth-wise one and a linear layer make finite values and gradients."""
    layers = {(2, 8, 5, 5): QuantConv2d(8, 16, 3, 2, padding=(1, 0)),
              (2, 8, 4, 4): QuantConv2d(8, 8, (1, 3), groups=8, padding=1),
              (2, 8): QuantLinear(8, 16)}  # fmt: skip
    try:
        config = options({"argv": line.split()})[2]
        for layer in layers.values():
            layer.build_quantizers(config, "layer")
    except UserError:
        reject()
    for shape, layer in layers.items():
        for _ in range(2):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
            y = layer(x)
            y.square().mean().backward()
            assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
        assert all(value.isfinite().all() for value in layer.state_dict().values())
        assert layer.eval()(x).isfinite().all()
