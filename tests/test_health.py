"""Training health: the figures of every quantizer, and the layer that a non-finite loss comes from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model import build as _methods  # noqa: F401  (registers the methods)
from model.health import Health, first_nonfinite, table
from model.quant import QuantConv2d
from utils.config import QuantConfig, QuantizerConfig


def layer(fm: dict[str, object] | None = None, wt: dict[str, object] | None = None) -> nn.Sequential:
    """A 1x1 convolution of one channel with these quantizers; weight [4, 1, 1, 1]."""

    def config(tag: str, given: dict[str, object] | None) -> QuantizerConfig:
        if given is None:
            return QuantizerConfig(tag=tag)
        return QuantizerConfig(
            **{"tag": tag, "enable": True, "levels": 4, "half_range": tag == "fm", **given}
        )

    conv = QuantConv2d(1, 4, 1, bias=False)
    conv.build_quantizers(QuantConfig(fm=config("fm", fm), wt=config("wt", wt)), "0")
    return nn.Sequential(conv)


def image(*values: float) -> Tensor:
    return torch.tensor(values).reshape(1, 1, 1, -1)


def test_activations_by_hand() -> None:
    """Clip value 1, levels 0, 1/3, 2/3 and 1: half of the values are beyond, the level 2/3 is dead."""
    (row,) = Health(layer(fm={"method": "lsq"})).report(image(-0.5, 0.1, 0.3, 1.0, 2.0, 3.0))
    assert row.name == "0.quant_activation"
    assert row.range == 1.0
    assert row.clipped == pytest.approx(3 / 6)
    assert row.levels == pytest.approx((2 / 6, 1 / 6, 0, 3 / 6))
    assert row.dead == 1
    assert row.changed is None and row.update is None
    assert row.scalars()["0.quant_activation/level3"] == pytest.approx(0.5)


def test_weights_from_epoch_to_epoch() -> None:
    """Levels -1, -1/3, 1/3 and 1 per tensor; one of four weights changes its level, by 0.5."""
    model = layer(wt={"method": "lsq", "quant_group": 1})
    weight = model.get_parameter("0.weight")
    weight.data = torch.tensor([-0.9, -0.2, 0.2, 1.2]).reshape(4, 1, 1, 1)
    health = Health(model)
    norm = float(weight.detach().norm())
    weight.data[2] += 0.5
    (row,) = health.report(image(1.0))
    assert row.levels == pytest.approx((0.25, 0.25, 0, 0.5))
    assert row.clipped == pytest.approx(0.25)
    assert row.changed == pytest.approx(0.25)
    assert row.update == pytest.approx(0.5 / norm)
    (row,) = health.report(image(1.0))
    assert row.changed == row.update == 0


@pytest.mark.parametrize(
    ("wt", "values", "clipped"),
    [
        # Two's complement reaches one step further down: c = 1 has the levels -2, -1, 0 and 1.
        ({"method": "lsq", "grid": "midtread", "quant_group": 1}, (-1.9, -2.1, 0.9, 1.1), 0.5),
        ({"method": "lq", "quant_group": 1}, (-9.0, 0.0, 0.0, 9.0), 0.5),
        ({"method": "fatnn", "levels": 3, "scale": 1.0, "quant_group": 1}, (-1.5, -0.5, 0.5, 0.9), 0.25),
        ({"method": "dorefa"}, (-9.0, 0.1, 0.2, 9.0), None),
        ({"method": "xnor", "levels": 2}, (-9.0, 0.1, 0.2, 9.0), None),
    ],
)
def test_what_counts_as_clipped(
    wt: dict[str, object], values: tuple[float, ...], clipped: float | None
) -> None:
    model = layer(wt=wt)
    model.get_parameter("0.weight").data = torch.tensor(values).reshape(4, 1, 1, 1)
    (row,) = Health(model).report(image(1.0))
    assert row.clipped == (None if clipped is None else pytest.approx(clipped))
    assert (row.range is None) == (clipped is None)
    assert len(row.basis) == (2 if wt["method"] == "lq" else 0)
    assert "0.quant_weight" in table([row])


def test_a_report_leaves_the_network_as_it_was() -> None:
    model = layer(fm={"method": "lq"}, wt={"method": "lq"}).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert len(Health(model).report(image(1.0, 2.0))) == 2
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_first_layer_with_a_non_finite_output_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 2))
    assert first_nonfinite(model, torch.ones(1, 2)) is None
    model.get_parameter("2.weight").data[0, 0] = torch.nan
    assert first_nonfinite(model, torch.ones(1, 2)) == (2, "2 (its weight is not finite)")
    model.get_parameter("2.weight").data.fill_(3e38)
    nn.init.ones_(model[0].weight)
    assert first_nonfinite(model, torch.full((1, 2), 1e10)) == (2, "2")


@pytest.mark.parametrize("method", ["xnor", "lq"])
def test_codes_do_not_hide_nan(method: str) -> None:
    model = layer(fm={"method": method, "levels": 2})
    output = model(image(1.0, float("nan"), -1.0))
    assert output.isnan()[..., 1].all()
    assert output.isfinite()[..., [0, 2]].all()
