"""Training health: the figures of every quantizer, and the layer that a non-finite loss comes from."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.layers.convolution import QuantConv2d
from model.quantizers.frame import Quantizer
from model.training.finite import first_nonfinite
from model.watch.health import BINS, Health
from utils.config.schema import QuantConfig, QuantizerConfig
from utils.report.quantizer_record import health_table


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
    assert row.shares == pytest.approx((2 / 6, 1 / 6, 0, 3 / 6))
    assert row.dead == 1
    assert row.changed is None and row.update is None
    assert row.scalars()["level3"] == pytest.approx(0.5)


def test_one_bad_channel_shows() -> None:
    """The mean over four channels hides a clip value that is next to nothing."""
    model = layer(wt={"method": "lsq"})
    quantizer = model[0].quant_weight
    with torch.no_grad():
        quantizer.clip_val.copy_(torch.tensor([1.0, -1.5, 0.001, 0.5]).reshape(4, 1, 1, 1))
    (row,) = Health(model).report(image(1.0))
    assert row.range == pytest.approx(3.001 / 4)
    assert (row.range_lowest, row.range_highest) == pytest.approx((0.001, 1.5))
    assert (row.record()["range_lowest"], row.record()["range_highest"]) == (0.001, 1.5)
    scalars = row.scalars()
    assert scalars["range_lowest"] == pytest.approx(0.001)
    assert scalars["range_highest"] == pytest.approx(1.5)
    assert "0.001 - 1.5" in health_table([row])
    (row,) = Health(layer(wt={"method": "lsq", "quant_group": 1})).report(image(1.0))
    assert row.range_lowest == row.range_highest == row.range
    assert "range_lowest" not in row.scalars()
    assert " - " not in health_table([row])


def test_activations_beyond_the_basis_of_lq_are_noticed() -> None:
    """All take the top level, whose codes make the least squares singular: the basis stays where it is."""
    model = layer(fm={"method": "lq"}).train()
    quantizer = model[0].quant_activation
    before = quantizer.basis.clone()
    x = torch.linspace(9, 11, 24).reshape(1, 1, 4, 6)
    for _ in range(50):
        model(x)
    assert torch.equal(quantizer.basis, before)
    (row,) = Health(model).report(x)
    assert (row.used, row.dead, row.clipped, row.shares) == (1, 3, 1.0, (0, 0, 0, 1))
    assert row.notice == "constant, carries nothing" and row.notice in health_table([row])
    quantizer.initialise_from(x)
    (row,) = Health(model).report(x)
    assert row.notice == "" and row.used > 1


def test_what_is_recorded_by_hand() -> None:
    """Bins of equal width over values and levels; every finite value is in one of them."""
    values = (-0.5, 0.12, 0.31, 0.98, 2.02, 2.7)
    (row,) = Health(layer(fm={"method": "lsq"})).report(image(*values))
    record = row.record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    facts = {key: record[key] for key in ("tag", "method", "levels", "bits", "used", "range", "clipped")}
    assert facts == {
        "tag": "fm", "method": "lsq", "levels": 4, "bits": 2, "used": 3, "range": 1.0, "clipped": 0.5,
    }  # fmt: skip
    assert record["values"] == record["positions"] == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-6)
    edges, counts = record["histogram"]["edges"], record["histogram"]["counts"]
    assert (edges[0], edges[-1], len(edges), sum(counts)) == (-0.5, pytest.approx(2.7), BINS + 1, 6)
    expected, _ = np.histogram(values, bins=BINS, range=(-0.5, 2.7))
    assert counts == expected.tolist()


def test_a_histogram_covers_the_levels_and_holds_outliers_at_its_ends() -> None:
    values = torch.zeros(1000)
    values[0], values[1] = 1e6, 0.5
    (row,) = Health(layer(fm={"method": "lsq", "boundary": 3e5})).report(values.reshape(1, 1, 1, -1))
    edges, counts = row.histogram.edges, row.histogram.counts
    assert 3e5 <= edges[-1] < 1e6
    assert (counts[0], counts[-1], sum(counts)) == (999, 1, 1000)


def test_values_that_are_not_finite_are_null_and_in_no_bin() -> None:
    (row,) = Health(layer(fm={"method": "lsq"})).report(image(float("nan"), float("inf"), 0.5, 0.7))
    assert sum(row.histogram.counts) == 2
    weights = layer(wt={"method": "lsq", "quant_group": 1})
    weights.get_parameter("0.weight").data.fill_(float("nan"))
    (row,) = Health(weights).report(image(1.0))
    record = row.record()
    assert record["update"] is None
    assert "NaN" not in json.dumps(record, allow_nan=False)


def test_many_levels_are_counted_and_not_listed() -> None:
    (row,) = Health(layer(fm={"method": "lsq", "levels": 65536})).report(image(0.0, 0.25, 1.0))
    assert (row.levels, row.bits, row.used, row.dead) == (65536, 16, 3, 65533)
    assert row.shares == row.values == ()
    assert len(json.dumps(row.record())) < 2000


def test_a_method_without_integers_has_a_row() -> None:
    """A user's own quantizer need not tell its codes."""

    class Own(Quantizer):
        def quantize(self, x: Tensor) -> Tensor:
            return x.round()

    model = layer(fm={"method": "lsq"})
    conv = model[0]
    conv.quant_activation = Own(conv.quant_activation.config, conv.quant_activation.site)
    (row,) = Health(model).report(image(0.2, 0.6))
    assert (row.used, row.dead, row.shares, sum(row.histogram.counts)) == (None, 0, (), 2)
    assert "0.quant_activation" in health_table([row])


def test_levels_of_integers_are_placed_on_their_range() -> None:
    """FATNN's levels are 0, 1, 2 and 3 whatever the inputs are."""
    (row,) = Health(layer(fm={"method": "fatnn", "scale": 1.0})).report(image(0.2, 0.6))
    assert row.values == (0, 1, 2, 3)
    assert row.range == pytest.approx(3)
    model = layer(fm={"method": "fatnn", "scale": 0.5})
    (row,) = Health(model).report(image(0.2, 0.6))
    assert row.positions == pytest.approx((0, 2, 4, 6))


def test_another_number_of_levels_is_no_oscillation() -> None:
    model = layer(wt={"method": "lsq", "quant_group": 1})
    health = Health(model)
    model[0].quant_weight.set_levels(16)
    (row,) = health.report(image(1.0))
    assert row.changed is None and row.update == 0
    (row,) = health.report(image(1.0))
    assert row.changed == 0


def test_weights_from_epoch_to_epoch() -> None:
    """Levels -1, -1/3, 1/3 and 1 per tensor; one of four weights changes its level, by 0.5."""
    model = layer(wt={"method": "lsq", "quant_group": 1})
    weight = model.get_parameter("0.weight")
    weight.data = torch.tensor([-0.9, -0.2, 0.2, 1.2]).reshape(4, 1, 1, 1)
    health = Health(model)
    norm = float(weight.detach().norm())
    weight.data[2] += 0.5
    (row,) = health.report(image(1.0))
    assert row.shares == pytest.approx((0.25, 0.25, 0, 0.5))
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
    assert "0.quant_weight" in health_table([row])


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


def test_what_only_validation_shows_is_found_in_its_mode() -> None:
    """Batch statistics hide what running ones do not fit."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    nn.init.constant_(model[1].weight, 1e30)
    images = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    model.get_buffer("1.running_mean").fill_(1e10)
    assert first_nonfinite(model, images, training=False) == (1, "1")
    assert first_nonfinite(model, images) is None


@pytest.mark.parametrize("method", ["xnor", "lq"])
def test_codes_do_not_hide_nan(method: str) -> None:
    model = layer(fm={"method": method, "levels": 2})
    output = model(image(1.0, float("nan"), -1.0))
    assert output.isnan()[..., 1].all()
    assert output.isfinite()[..., [0, 2]].all()
