"""Residual sums in 8 bits: onnxruntime computes all quantized convolutions with integers, and nearly the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from model.deploy.engines import Engine
from model.deploy.graph import deploy_graph
from model.deploy.onnx_qdq import qdq_model
from model.deploy.sums import with_integer_sums
from model.quant import QuantConfig, QuantConv2d, QuantizerConfig
from utils.errors import UserError

CONFIG = QuantConfig(
    **{
        tag: QuantizerConfig(tag=tag, enable=True, method="lsq", levels=4, half_range=tag == "fm")
        for tag in ("fm", "wt")
    }
)


class Residual(nn.Module):
    """Two convolutions, each with a skip around it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 1)
        self.convs = nn.ModuleList(QuantConv2d(8, 8, 3, padding=1) for _ in range(2))
        for conv in self.convs:
            conv.build_quantizers(CONFIG, "conv")
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = (norm(conv(x)) + x).relu()
        return x.mean(dim=(2, 3))


@pytest.mark.slow
def test_sums_of_eight_bits_are_computed_with_integers(tmp_path: Path) -> None:
    network = Residual().eval()
    images = torch.rand(16, 3, 6, 6)
    with torch.no_grad():
        expected = network(images).numpy()
    graph = deploy_graph(network, (3, 6, 6))
    integer = []
    for name, made in (("float", graph), ("int8", with_integer_sums(graph, images.numpy()))):
        path = tmp_path / f"{name}.onnx"
        onnx.save(qdq_model(made), path)
        runner = Engine("onnxruntime").open(path)
        integer.append(runner.integer)
        found = runner(images.numpy())["logits"]
        limit = 0.08 if name == "int8" else 1e-4
        assert np.abs(found - expected).max() < limit * np.abs(expected).max()
    assert integer == [0, 2]


def test_a_network_without_sums_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()).eval()
    with pytest.raises(UserError, match="no sums of quantized convolutions"):
        with_integer_sums(deploy_graph(network, (3, 1, 1)), np.zeros((1, 3, 1, 1), np.float32))
