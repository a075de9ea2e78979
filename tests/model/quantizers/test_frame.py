"""The frame around every method: levels, dtypes, extreme values, groups, names, other numbers of levels."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from model.layers.convolution import QuantConv2d
from model.quantizers.registry import build_quantizer
from model.quantizers.site import LayerSite
from tests.model.quantizers.cases import (
    CHANNELS,
    LEVELS,
    SHAPES,
    Case,
    backward,
    cases,
    each_level,
    generator,
    learns,
    make,
    over,
    row_counts,
    tensor,
)
from utils.config.schema import QuantConfig, QuantizerConfig
from utils.errors import UserError


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
    default = CHANNELS if case.tag == "wt" or case.method.per_channel else 1
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


@pytest.mark.parametrize("requested", [5, 24, -5, -24])  # 0 groups: see test_schema
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
        (Case("n2uq", "fm", 4, half_range=True), 2, "has 3 thresholds"),
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


FIXED = ("lq", "n2uq")  # whose state has a value for each level


@over(cases(levels=(4,), where=lambda method: {4, 8} <= set(method.levels) and method.method not in FIXED))
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


@pytest.mark.parametrize("reentrant", [True, False])
@over(cases(levels=(4, 3, 2)))
def test_a_recomputed_pass_is_the_same_or_refused(case: Case, reentrant: bool) -> None:
    """Output, gradients, counter and all other state are those of one pass; methods that change refuse."""
    plain, again = make(case).train(), make(case).train()
    again.load_state_dict(plain.state_dict())
    x = tensor(case).requires_grad_()
    other = x.detach().clone().requires_grad_()
    expected = plain(x)
    expected.sum().backward()
    found = checkpoint(again, other, use_reentrant=reentrant)
    if again.gathers() and (
        reentrant or case.tag != "wt"
    ):  # LQ-Nets' weight keeps no tensor, so that it needs none
        with pytest.raises(RuntimeError, match=r"changes with each training pass.*checkpoint"):
            found.sum().backward()
        return
    found.sum().backward()
    assert torch.equal(found, expected) and torch.equal(other.grad, x.grad)
    assert int(again.iteration) == 1
    for (name, one), two in zip(plain.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    for one, two in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("options", [{"stable": 2}, {"proxquant_step": 10}])
def test_what_depends_on_the_number_of_passes_is_not_recomputed(options: dict[str, int]) -> None:
    config = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4, **options)
    quantizer = build_quantizer(config, LayerSite(name="fc", channels=4, channel_dim=0, ndim=2, fan=4))
    x = torch.randn(4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="fc: lsq with these options changes with each training pass"):
        checkpoint(quantizer, x, use_reentrant=False).sum().backward()


@over(cases())
def test_without_gradients_the_bits_are_the_same(case: Case) -> None:
    quantizer, x = make(case).eval(), tensor(case)
    expected = quantizer(x.clone().requires_grad_()).detach()
    before = x.clone()
    with torch.no_grad():
        found = quantizer(x)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    assert torch.equal(x, before)
    with torch.no_grad():
        quantizer.set_range(torch.ones(quantizer.range_shape()))  # passes over a range of 1 are left out
        quantizer.train(False)
        assert torch.equal(quantizer(x), quantizer.integers(x).dequantize())
