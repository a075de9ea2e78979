"""N2UQ: where its thresholds begin, what it takes of other methods, and what the oracle's cases do not reach."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.quant import QuantConfig, QuantConv2d, QuantizerConfig
from model.quantizers.frame import Quantizer
from tests.model.quantizers.cases import CHANNELS, Case, assert_close, backward, expectation, make
from utils.config.schema import GRAD_SCALES


def activation(levels: int = 4, *, half_range: bool = True, method: str = "n2uq") -> Quantizer:
    return make(Case(method, "fm", levels, half_range=half_range), randomised=False)


def set_state(quantizer: Quantizer, **values: float) -> None:
    with torch.no_grad():
        for name, value in values.items():
            quantizer.get_parameter(name).fill_(value)


def ends(quantizer: Quantizer) -> list[float]:
    return [float(bound) for bound in quantizer.bounds() or ()]


def test_zeros_of_a_relu_do_not_move_the_first_threshold() -> None:
    quantizer = activation()
    x = torch.zeros(4, CHANNELS, 5, 5)
    y, _ = backward(quantizer, x)
    assert not y.any()
    grads = {name: parameter.grad for name, parameter in quantizer.named_parameters()}
    assert grads.keys() == {"clip_val", "start", "width0", "width1", "width2"}
    assert not any(grad is None or grad.any() for grad in grads.values())


@pytest.mark.parametrize("width", [1e-5, -1e-5, -0.2])
def test_a_narrow_ramp_counts_as_a_thousandth(width: float) -> None:
    case = Case("n2uq", "fm", 4, half_range=True)
    quantizer = make(case, randomised=False)
    set_state(quantizer, width0=width, start=-0.1, clip_val=1.5)
    x = np.linspace(-1, 2, 4 * CHANNELS * 25).astype(np.float32).reshape(4, CHANNELS, 5, 5) + 1e-3
    gy = np.random.default_rng(0).standard_normal(x.shape)
    wanted = expectation(case, quantizer)(x.astype(np.float64), gy)
    y, gx = backward(quantizer, torch.from_numpy(x), torch.from_numpy(gy).float())
    assert_close(y, wanted.y, "output")
    assert_close(gx, wanted.gx, "gradient to x")
    for name, parameter in quantizer.named_parameters():
        assert_close(parameter.grad, wanted.grads[name], name, terms=float(np.linalg.norm(gy)))
    assert ends(quantizer)[1] == pytest.approx(1.5 * (-0.1 + max(abs(width), 1e-3) + 2 / 3))


def test_padded_places_are_zero_whatever_scales_the_gradients() -> None:
    """Also where the first threshold is below zero: an option of gradients changes no output."""
    x, found = torch.rand(1, 1, 3, 3), []
    for scale in GRAD_SCALES:
        fm = QuantizerConfig(
            tag="fm", enable=True, method="n2uq", levels=4, half_range=True, grad_scale=scale
        )
        layer = QuantConv2d(1, 1, 3, padding=1, bias=False)
        nn.init.ones_(layer.weight)
        layer.build_quantizers(QuantConfig(fm=fm), "conv")
        assert isinstance(layer.quant_activation, Quantizer)
        set_state(layer.quant_activation, start=-0.3)
        found.append(layer(x).detach())
    corner: Tensor = layer.quant_activation(x)[0, 0, :2, :2].sum()
    assert len(found) > 3
    assert all(torch.equal(one, found[0]) for one in found)
    torch.testing.assert_close(found[0][0, 0, 0, 0], corner.detach())


@pytest.mark.parametrize(
    ("method", "values", "levels", "half_range", "wanted"),
    [
        ("n2uq", {"start": 0.1, "width0": 0.3, "width1": -0.5, "width2": 0.7, "clip_val": 2.0}, 4, True, [0.2, 3.2]),
        ("lsq", {"clip_val": -2.0}, 4, True, [0.0, 2.0]),
        ("lsq", {"clip_val": 2.0}, 4, False, [-2.0, 2.0]),
        ("lsqplus", {"clip_val": 4.0, "offset": -2.0}, 4, False, [-2.0, 2.0]),
        ("lsqplus", {"clip_val": 4.0, "offset": -3.0}, 4, False, [-3.0, 3.0]),
        ("fatnn", {"alpha0": 0.5}, 4, True, [0.0, 1.0]),
    ],
)  # fmt: skip
def test_the_range_of_a_checkpoint_is_kept(
    method: str, values: dict[str, float], levels: int, half_range: bool, wanted: list[float]
) -> None:
    trained = activation(levels, half_range=half_range, method=method)
    set_state(trained, **values)
    quantizer = activation(3, half_range=half_range)
    held = trained.state_dict()
    assert quantizer.of_another_method(held.keys()) == (method != "n2uq")
    entries = quantizer.adapted(dict(held))
    quantizer.load_state_dict(entries)
    assert quantizer.levels == 3
    assert ends(quantizer) == pytest.approx(wanted)
    widths = [float(quantizer.get_parameter(f"width{i}").detach()) for i in range(2)]
    assert widths[0] == pytest.approx(widths[1])
