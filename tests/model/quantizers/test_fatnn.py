"""FATNN's integers: the closed form, levels and slopes, the keywords."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from model.layers.quantized import QuantLinear
from model.quantizers.registry import build_quantizer
from tests.conformance import options
from tests.model.quantizers.cases import Case, cases, generator, make, over, sample, tensor
from tests.oracle import Groups
from utils.errors import UserError


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


def test_fewer_levels_leave_the_last_slopes_out() -> None:
    trained, quantizer = (make(Case("fatnn", "fm", levels, half_range=True)) for levels in (4, 3))
    entries = quantizer.adapted(trained.state_dict())
    assert "alpha2" in trained.state_dict() and entries.keys() == quantizer.state_dict().keys()


@over(cases(levels=(2, 3, 4), where=lambda method: method.method == "fatnn"))
def test_closed_form_survives_a_huge_batch(case: Case) -> None:
    quantizer = make(case.with_fields(closed_form=True))
    quantizer(torch.full_like(tensor(case), 3e38))
    assert quantizer.get_buffer("output_scale").isfinite().all()
    assert quantizer(tensor(case)).isfinite().all()
