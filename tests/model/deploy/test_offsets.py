"""Offsets of activations in files: every way in which a convolution pads, and residual sums."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from model.deploy.codes import activation_codes
from model.deploy.engines import Engine
from model.deploy.graph import deploy_graph
from model.deploy.onnx_qdq import integer_layers, qdq_model
from model.deploy.runner import read_numbers
from model.deploy.sums import with_integer_sums
from model.quant import QuantConfig, QuantConv2d, QuantizerConfig
from tests.model.deploy.networks import images
from utils.errors import UserError

PARTS = {
    tag: QuantizerConfig(tag=tag, enable=True, method="lsqplus", levels=4, half_range=tag == "fm")
    for tag in ("fm", "wt")
}
PADDED: tuple[dict[str, Any], ...] = (
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "padding": (2, 1), "dilation": (2, 1), "stride": (2, 1), "groups": 4},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 4, "padding": "same"},
)


def convolution(offset: float, **more: Any) -> QuantConv2d:
    layer = QuantConv2d(8, 8, bias=False, **more)
    layer.build_quantizers(QuantConfig(**PARTS), "conv")
    with torch.no_grad():
        layer.quant_activation.get_parameter("offset").fill_(offset)
        layer.quant_activation.get_parameter("clip_val").fill_(2.5)
    return layer


def difference(network: nn.Module, path: Path, *, sums: bool = False) -> float:
    """The largest difference of a logit in onnxruntime, over the largest logit."""
    x = images(4)
    graph = deploy_graph(network, (3, 6, 6))
    assert all(codes.integer for codes in graph.activations.values())
    assert integer_layers(graph) == sum(isinstance(module, QuantConv2d) for module in network.modules())
    if sums:
        graph = with_integer_sums(graph, x.numpy())
        assert sum(name.endswith(".sum") for name in graph.activations) == 3  # two addends and their sum
    onnx.save(qdq_model(graph), path)
    with torch.no_grad():
        wanted = network(x).numpy()
    found = Engine("onnxruntime", False).open(path)(x.numpy())["logits"]
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_files_pad_as_torch_does(after: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 1)]
    for i, more in enumerate(PADDED[:2] if after else PADDED):
        layers += [nn.SiLU(), convolution(-0.4 - 0.2 * i, padding_after_quant=after, **more)]
    network = nn.Sequential(*layers, nn.Flatten()).eval()
    assert difference(network, tmp_path / "x.onnx") < 1e-5


@pytest.mark.slow
def test_onnxruntime_multiplies_integers_between_relus(tmp_path: Path) -> None:
    """Codes below that of zero cannot occur there, and must be gone for onnxruntime's integer kernels."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 1)]
    for padding in (1, 0, 1):
        layers += [nn.ReLU(), convolution(-0.9, kernel_size=3, padding=padding)]
    network, path = nn.Sequential(*layers, nn.Flatten()).eval(), tmp_path / "x.onnx"
    assert difference(network, path) < 1e-5
    assert Engine("onnxruntime", True).open(path).integer == 2  # behind the last one there is no quantizer


@pytest.mark.parametrize("offset", [-0.065, -0.06, 0.0, -2.5])
def test_the_code_of_zero_is_even_where_codes_fill_a_byte(offset: float) -> None:
    fm = replace(PARTS["fm"], levels=256)
    layer = QuantConv2d(3, 4, 1, bias=False)
    layer.build_quantizers(QuantConfig(fm=fm, wt=PARTS["wt"]), "conv")
    with torch.no_grad():
        layer.quant_activation.get_parameter("offset").fill_(offset)
        layer.quant_activation.get_parameter("clip_val").fill_(2.55)
    graph = deploy_graph(nn.Sequential(layer, nn.Flatten()).eval(), (3, 6, 6))
    (codes,) = graph.activations.values()
    assert codes.integer and codes.zero_point % 2 == 0
    assert codes.zero_point + codes.lowest >= 0 and codes.zero_point + codes.highest <= 255
    assert codes.lowest * codes.scale + codes.offset == pytest.approx(offset, abs=1e-6)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv = convolution(-0.4, kernel_size=3, padding=1, padding_after_quant=True)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.stem(x))
        return (self.conv(x) + x).relu().mean(dim=(2, 3))


@pytest.mark.slow
def test_what_is_added_at_the_border_is_no_residual_sum(tmp_path: Path) -> None:
    assert difference(Block().eval(), tmp_path / "x.onnx", sums=True) < 0.05


@pytest.mark.parametrize("sign", [-1, 1])
def test_zero_in_the_middle_between_two_levels_stays_on_its_side(sign: int) -> None:
    """Where the offset is half a step, as before training, zeros go where torch rounds them in any order of sums."""
    layer = convolution(0.0, kernel_size=1)
    quantizer = layer.quant_activation
    step = float(quantizer.integers(images(1, 8)).scale)
    with torch.no_grad():
        quantizer.get_parameter("offset").fill_(sign * 0.5 * step)
    code = quantizer.integers(torch.zeros(1, 8, 1, 1))
    wanted = int(code.codes.flatten()[0]) - code.code_of_zero
    codes = activation_codes("x", quantizer, images(1, 8))
    for places in np.float32([-2e-7, 0, 2e-7]):
        assert round(float((places - codes.shift) / codes.step)) == wanted


@pytest.mark.parametrize("text", ["", "[1]", '{"a": "b"}', '{"a": null}', "1"])
def test_damaged_offsets_are_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"^x: its offsets are no table of numbers; export it anew$"):
        read_numbers({"offsets": text}, "x")
    assert read_numbers({"offsets": '{"a": -0.5}'}, "x") == {"a": -0.5}
