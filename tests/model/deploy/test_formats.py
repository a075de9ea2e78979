"""Exported files in their engines compute what torch does, for each method and number of bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from model.convert import quantize
from model.deploy.coreml.file import agreement
from model.deploy.engines import Engine, engines_of
from model.deploy.formats import GRAPH_FORMATS
from model.deploy.graph import deploy_graph
from model.deploy.openvino_ir import write_openvino
from model.quant import QuantConfig, QuantConv2d, QuantizerConfig
from tests.model.deploy.coreml_interpreter import Interpreted
from tests.model.deploy.networks import exported, images, torch_values
from utils.errors import UserError

FORMATS = {
    "header.h": "c", "qdq.onnx": "onnx", "openvino.xml": "openvino", "coreml.mlpackage": "coreml",
    "executorch.pte": "executorch", "litert.tflite": "litert", "mnn.mnn": "mnn", "qonnx.onnx": "qonnx",
    "thresholds.onnx": "thresholds",
}  # fmt: skip
RUNS = (
    ("qdq.onnx", Engine("onnxruntime")),
    ("qdq.onnx", Engine("onnxruntime", False)),
    ("qdq.onnx", Engine("openvino")),
    ("openvino.xml", Engine("openvino")),
    ("qonnx.onnx", Engine("qonnx")),
    ("thresholds.onnx", Engine("qonnx")),
    ("header.h", Engine("cc")),
    ("litert.tflite", Engine("litert")),
    ("litert.tflite", Engine("litert", False)),
    ("mnn.mnn", Engine("mnn")),
    ("mnn.mnn", Engine("mnn", False)),
    ("executorch.pte", Engine("executorch")),
    ("coreml.mlpackage", Interpreted()),
)
# What is computed with integers, of 32, 24 and 17 layers: all but the stem, layers with uneven levels on a side, with a
# scale for each image, with 8 bits on both sides, or with a code of -128. onnxruntime needs a quantizer behind a layer,
# too.
INTEGER = {
    ("methods", "cc"): 25,  # also 8 bits on both sides
    ("widths", "cc"): 21,
    ("options", "cc"): 7,
    ("methods", "executorch"): 25,
    ("widths", "executorch"): 17,  # also 8 bits on both sides
    ("options", "executorch"): 7,
    ("methods", "onnxruntime"): 0,
    ("methods", "openvino"): 25,
    ("widths", "onnxruntime"): 5,
    ("options", "onnxruntime"): 2,
    ("options", "openvino"): 7,
    ("widths", "openvino"): 15,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Writes a network of `exported` in a format, once."""
    folder = tmp_path_factory.mktemp("exported")

    def write(kind: str, name: str) -> Path:
        path = folder / f"{kind}-{name}"
        if not path.exists():
            GRAPH_FORMATS[FORMATS[name]](exported(kind)[1], path)
        return path

    return write


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["methods", "widths", "options"])
@pytest.mark.parametrize(("name", "engine"), RUNS, ids=str)
def test_levels_and_logits_are_those_of_torch(
    kind: str, name: str, engine: Engine | Interpreted, written: Callable[[str, str], Path]
) -> None:
    network, graph = exported(kind)
    x = images(4)
    expected = torch_values(network, x)
    runner = engine.open(written(kind, name), tensors=True)
    found = runner(x.numpy())
    assert found.keys() == expected.keys() == {"logits", *graph.activations}
    for quantizer, value in expected.items():
        if value.shape[2:] == (8, 8) and found[quantizer].shape[2:] == (6, 6):
            value = value[:, :, 1:7, 1:7]  # padded in front of the quantizer in torch alone
        far = np.abs(found[quantizer] - value) > 1e-3 * np.abs(value).max()
        assert far.mean() <= 0.005, quantizer  # values between two levels may go to either
    if isinstance(engine, Interpreted):
        assert agreement(written(kind, name), graph).faults == ()
    elif engine.optimised and engine.name not in ("qonnx", "litert", "mnn"):
        assert runner.integer == INTEGER[kind, engine.name]


@pytest.mark.parametrize(("method", "levels"), [("lsq", 4), ("xnor", 2)])
def test_convolutions_of_one_dimension_are_right_or_refused(method: str, levels: int, tmp_path: Path) -> None:
    """Behind 64 places of an image; ONNX knows them, and so do its engines."""
    torch.manual_seed(0)
    layers = (nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3, padding=1))
    network = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Flatten(2), *layers, nn.Flatten(), nn.Linear(256, 2)
    ).eval()
    parts = {tag: QuantizerConfig(tag=tag, enable=True, method=method, levels=levels) for tag in ("fm", "wt")}
    assert quantize(network, QuantConfig(**parts)).replaced == ("2", "5")
    graph, x = deploy_graph(network, (3, 8, 8)), images(2, size=8)
    expected = torch_values(network, x)
    refused = set()
    for name, kind in FORMATS.items():
        try:
            GRAPH_FORMATS[kind](graph, tmp_path / name)
        except UserError as error:
            assert re.search(r"^(2|2.quant_activation): .*; export --to \w+$", str(error))
            refused.add(kind)
            continue
        for engine in engines_of(tmp_path / name):
            found = engine.open(tmp_path / name, tensors=True)(x.numpy())
            assert found.keys() == expected.keys() == {"logits", *graph.activations}
            for tensor, value in expected.items():
                np.testing.assert_allclose(found[tensor], value, atol=1e-5, err_msg=f"{tensor} {engine}")
    assert refused == set(FORMATS.values()) - {"onnx", "openvino", "qonnx"}


def test_a_layer_in_two_places_is_refused() -> None:
    layer = QuantConv2d(8, 8, 3)
    parts = {tag: QuantizerConfig(tag=tag, enable=True, method="lsq", levels=4) for tag in ("fm", "wt")}
    layer.build_quantizers(QuantConfig(**parts), "0")
    with pytest.raises(
        UserError, match=r"0.quant_(activation|weight): the network uses this layer more than once"
    ):
        deploy_graph(nn.Sequential(layer, nn.ReLU(), layer).eval(), (8, 6, 6))


def test_openvino_writes_signs_as_bits_without_a_copy(tmp_path: Path) -> None:
    """A copy of floats to bits takes as long as the convolution; zero has the sign +."""
    openvino = pytest.importorskip("openvino")
    torch.manual_seed(0)
    layer = QuantConv2d(8, 8, 3)
    parts = {tag: QuantizerConfig(tag=tag, enable=True, method="xnor", levels=2) for tag in ("fm", "wt")}
    layer.build_quantizers(QuantConfig(**parts), "1")
    network = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), layer, nn.Flatten()).eval()
    with torch.no_grad():
        network[0].weight[:4] = 0
    path = tmp_path / "x.xml"
    write_openvino(deploy_graph(network, (3, 6, 6)), path)
    compiled = openvino.Core().compile_model(path, "CPU")
    operators = {op.get_friendly_name(): op for op in compiled.get_runtime_model().get_ordered_ops()}
    kinds = {name: op.get_rt_info()["layerType"].astype(str) for name, op in operators.items()}
    (binary,) = [operators[name] for name, kind in kinds.items() if kind == "BinaryConvolution"]
    assert kinds[binary.input_value(0).get_node().get_friendly_name()] == "FakeQuantize"
    assert "Convert" not in kinds.values()
    x = images(1)
    with torch.no_grad():
        expected = network(x).numpy()
    np.testing.assert_allclose(Engine("openvino").open(path)(x.numpy())["logits"], expected, rtol=1e-5)
