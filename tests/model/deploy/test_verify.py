"""Exported files beside their checkpoint: what is compared, and graphs that engines get wrong without a word."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from model.deploy.code_shares import faults_of_codes
from model.deploy.engines import Engine, engines_of
from model.deploy.graph import DeployGraph, deploy_graph, with_byte_input
from model.deploy.onnx_qdq import qdq_model
from model.deploy.openvino_ir import openvino_model, write_openvino
from model.deploy.verify import compare
from model.quant import QuantConfig, QuantConv2d, QuantizerConfig
from utils.errors import UserError
from utils.report.verified import Comparison

SHAPE = (3, 6, 6)


def quantized(channels: int, levels: int, kernel: int = 3, stride: int = 1) -> QuantConv2d:
    layer = QuantConv2d(8, channels, kernel, stride)
    parts = {
        tag: QuantizerConfig(
            tag=tag, enable=True, method="lsq", levels=levels, half_range=tag == "fm", boundary=1.0
        )
        for tag in ("fm", "wt")
    }
    layer.build_quantizers(QuantConfig(**parts), "2")
    nn.init.normal_(layer.weight, std=0.5)
    return layer


@functools.cache
def small(levels: int) -> tuple[nn.Module, DeployGraph, list[tuple[Tensor, Tensor]]]:
    """A network, its graph, and images with the classes that it gives them."""
    torch.manual_seed(0)
    layer = quantized(10, levels)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), layer, nn.AvgPool2d(4), nn.Flatten()).eval()
    images = torch.randn(64, *SHAPE)
    with torch.no_grad():
        target = network(images).argmax(1)
    return network, deploy_graph(network, SHAPE), [(images[:40], target[:40]), (images[40:], target[40:])]


def compared(path: Path, levels: int) -> dict[str, Comparison]:
    network, _, batches = small(levels)
    found = compare(network, SHAPE, batches, {path: engines_of(path)})
    return {item.engine: item for item in found}


@pytest.mark.slow
def test_a_right_file_has_no_faults(tmp_path: Path) -> None:
    path = tmp_path / "right.onnx"
    onnx.save(qdq_model(small(15)[1]), path)
    found = compared(path, 15)
    assert list(found) == [
        *(f"{name}, {how}" for name in ("onnxruntime", "openvino") for how in ("default", "basic"))
    ]
    for item in found.values():
        assert item.faults == () and item.same == 1.0 and item.top1 == item.reference == 100.0
        assert item.codes.keys() == {"2.quant_activation"} and item.codes["2.quant_activation"] < 0.001
        assert (item.images, item.layers, item.bytes) == (64, 2, path.stat().st_size)
        assert item.milliseconds > 0 and item.float_milliseconds > 0
        assert (item.optimiser.keys() == item.codes.keys()) == (item.engine.endswith("default"))
    assert [found[f"openvino, {how}"].integer for how in ("default", "basic")] == [1, 0]


@pytest.mark.parametrize(
    ("operator", "message"),
    [("Relu", "gives 40x3x6x6 logits"), ("Add", "does not run on the checkpoint's images")],
)
def test_a_file_of_another_network_is_refused(operator: str, message: str, tmp_path: Path) -> None:
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, list("nchw")) for name in ("input", "logits")
    ]
    other = helper.make_tensor("other", TensorProto.FLOAT, [7], [0.0] * 7)
    inputs = ["input", "other"] if operator == "Add" else ["input"]
    graph = helper.make_graph(
        [helper.make_node(operator, inputs, ["logits"])], "other", ends[:1], ends[1:], [other]
    )
    path = tmp_path / "other.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7), path)
    with pytest.raises(UserError, match=message):
        compared(path, 15)


def test_bytes_are_normalised_inside(tmp_path: Path) -> None:
    path, mean, std = tmp_path / "bytes.onnx", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    graph = small(15)[1]
    graph = DeployGraph(
        model=graph.model, activations=graph.activations, weights=graph.weights,
        metadata={"images": json.dumps({"mean": mean, "std": std})},
    )  # fmt: skip
    onnx.save(qdq_model(with_byte_input(graph, mean, std)), path)
    pixels = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), np.uint8)
    shape = (1, 3, 1, 1)
    images = (pixels / 255 - np.reshape(mean, shape)) / np.reshape(std, shape)
    with torch.no_grad():
        expected = small(15)[0](torch.from_numpy(images).float()).numpy()
    for engine in engines_of(path):
        found = engine.open(path)(images.astype(np.float32))["logits"]
        assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.slow
def test_openvinos_fifteen_levels_are_found(tmp_path: Path) -> None:
    """A FakeQuantize of 15 levels, which OpenVINO turns into others, instead of one of 256."""
    import openvino
    from openvino import opset13

    path = tmp_path / "wrong.xml"
    graph = small(15)[1]
    model = openvino_model(graph)
    (old,) = (node for node in model.get_ordered_ops() if node.get_type_name() == "FakeQuantize")
    ends = [np.float32(0), np.float32(14 * graph.activations["2.quant_activation"].scale)] * 2
    old.output(0).replace(opset13.fake_quantize(old.input_value(0), *ends, 15).output(0))
    openvino.save_model(model, path, compress_to_fp16=False)
    found = compared(path, 15)
    assert found["openvino, basic"].faults == ()
    found = found["openvino, default"]
    assert found.codes["2.quant_activation"] > 0.1 and found.optimiser["2.quant_activation"] > 0.1
    ours, theirs = found.faults
    assert (
        "2.quant_activation are others, and none before it" in ours and theirs == f"by its optimiser {ours}"
    )


@pytest.mark.slow
def test_onnxruntimes_missing_relu_is_found(tmp_path: Path) -> None:
    """ReLU in front of a QuantizeLinear to 4 bits with a sign, which onnxruntime's optimiser leaves out."""
    path = tmp_path / "wrong.onnx"
    model = qdq_model(small(8)[1])
    nodes = {node.op_type: node for node in model.graph.node}
    clip = nodes["Clip"]
    (decoded,) = (node for node in model.graph.node if clip.output[0] in node.input)
    decoded.input[0] = clip.input[0]
    model.graph.node.remove(clip)
    model.graph.initializer.append(helper.make_tensor("zero", TensorProto.INT4, [], [0]))
    for node in (nodes["QuantizeLinear"], decoded):
        node.input[2] = "zero"
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", 21))
    model.ir_version = 10
    onnx.save(model, path)
    found = compared(path, 8)
    assert found["onnxruntime, basic"].faults == found["openvino, default"].faults == ()
    assert any("optimiser changes the class" in fault for fault in found["onnxruntime, default"].faults)


@functools.cache
def deep() -> tuple[nn.Module, DeployGraph, list[tuple[Tensor, Tensor]]]:
    """A network with two quantizers of activations, its graph, and images."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 1), nn.ReLU(), quantized(8, 8), nn.ReLU(), quantized(10, 8)
    network = nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten()).eval()
    images = torch.randn(64, *SHAPE)
    with torch.no_grad():
        batches = [(images, network(images).argmax(1))]
    return network, deploy_graph(network, SHAPE), batches


def changed(constants: dict[str, float], names: dict[str, str], path: Path) -> Comparison:
    """The file of `deep` with factors on constants and other names of tensors, compared in onnxruntime."""
    network, graph, batches = deep()
    model = qdq_model(graph)
    for tensor in model.graph.initializer:
        if tensor.name in constants:
            value = numpy_helper.to_array(tensor) * np.float32(constants[tensor.name])
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))
    for node in model.graph.node:
        for places in (node.input, node.output):
            for i, name in enumerate(places):
                places[i] = names.get(name, name)
    onnx.save(model, path)
    (found,) = compare(network, SHAPE, batches, {path: [Engine("onnxruntime")]})
    return found


@pytest.mark.slow
def test_a_tie_hides_no_later_layer(tmp_path: Path) -> None:
    """A few codes of the first quantizer are others, as by rounding, and many of the second."""
    first = {"2.quant_activation.step": 1.002}
    found = changed(first, {}, tmp_path / "x.onnx")
    assert 0 < found.codes["2.quant_activation"] < 0.005 and found.faults == ()
    found = changed(first | {"4.quant_activation.step": 1.5}, {}, tmp_path / "x.onnx")
    assert found.codes["4.quant_activation"] > 0.1
    assert any("of the codes of 4.quant_activation are others" in fault for fault in found.faults)


@pytest.mark.slow
def test_a_quantizer_that_a_file_has_not_is_a_fault(tmp_path: Path) -> None:
    names = {f"{number}.quant_activation": f"other{number}" for number in (2, 4)}
    found = changed({}, names, tmp_path / "x.onnx")
    assert found.codes == {} and [fault[:10] for fault in found.faults] == ["it has no "] * 2
    assert found.cells[3] == "-"


@pytest.mark.slow
def test_logits_of_zero_have_no_relative_difference(tmp_path: Path) -> None:
    """JSON has no word for NaN."""
    network, _, batches = small(15)
    zero = copy.deepcopy(network)
    nn.init.zeros_(zero[2].weight)
    nn.init.zeros_(zero[2].bias)
    path = tmp_path / "x.onnx"
    onnx.save(qdq_model(deploy_graph(zero, SHAPE)), path)
    (found,) = compare(zero, SHAPE, batches, {path: [Engine("onnxruntime")]})
    assert found.logits is None and found.cells[4] == "-"


@pytest.mark.slow
def test_layers_that_are_slow_without_need_are_a_fault(tmp_path: Path) -> None:
    """Weights that are no integers, which OpenVINO multiplies in float."""
    network, graph, batches = small(15)
    path = tmp_path / "x.onnx"
    model = qdq_model(graph)
    (weight,) = [node for node in model.graph.node if node.output[0] == "2.quant_weight"]
    weight.op_type = "Mul"
    cast, scale = (weight.input[i] for i in (0, 1))
    del weight.attribute[:], weight.input[:]
    (made,) = [node for node in model.graph.node if node.output[0] == cast]
    made.attribute[0].i = TensorProto.FLOAT
    weight.input.extend([cast, scale])
    for tensor in model.graph.initializer:
        if tensor.name == scale:
            tensor.dims.extend([1] * (4 - len(tensor.dims)))
    onnx.save(model, path)
    (found,) = compare(network, SHAPE, batches, {path: [Engine("openvino")]})
    assert found.integer == 0 and found.faults == (
        "0 layers are computed with integers, and 1 could be: it is slow",
    )


@pytest.mark.slow
def test_a_shortcut_that_openvino_computes_in_float_is_no_fault_of_an_onnx_file(tmp_path: Path) -> None:
    """A 1x1 convolution with a stride; OpenVINO's own file has it with integers, and is judged by that."""
    torch.manual_seed(0)
    shortcut = quantized(10, 4, kernel=1, stride=2)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), shortcut, nn.AvgPool2d(3), nn.Flatten()).eval()
    graph = deploy_graph(network, SHAPE)
    onnx.save(qdq_model(graph), tmp_path / "x.onnx")
    write_openvino(graph, tmp_path / "x.xml")
    images = torch.randn(32, *SHAPE)
    with torch.no_grad():
        batches = [(images, network(images).argmax(1))]
    engines = {path: [Engine("openvino")] for path in (tmp_path / "x.onnx", tmp_path / "x.xml")}
    plain, own = compare(network, SHAPE, batches, engines)
    assert (plain.integer, plain.faults) == (0, ()) and (own.integer, own.faults) == (1, ())


@pytest.mark.parametrize(
    ("share", "sums", "faults"),
    [
        (0.009, False, 0),
        (0.05, False, 1),
        (0.05, True, 0),  # 8-bit sums in front of it disturb like other codes
        (0.07, True, 1),
    ],
)
def test_limits_of_the_first_codes(share: float, sums: bool, faults: int) -> None:
    found = faults_of_codes({"first": share, "second": share**0.5}, ["first", "second"], sums=sums)
    assert len(found) == faults and all(fault.endswith("before it") for fault in found)
