#!/usr/bin/env bash
# OpenVINO 2026.4.0 (onnx 1.23.0), CPU: ONNX convolutions of quantized inputs and weights (QDQ), as in a ResNet's shortcuts.
# Expected: all of them run with integers, whatever kernel and stride they have.
# Seen: a 1x1 convolution of stride 2 runs in float32, without a word; 1x1 of stride 1 and 3x3 of both strides run as u8.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openvino==2026.4.0 onnx==1.23.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import openvino
from onnx import TensorProto, helper, numpy_helper

rng = np.random.default_rng(0)


def convolution(kernel: int, stride: int) -> str:
    """The precision at which OpenVINO runs a convolution of 2-bit codes."""
    constants = {
        "s": np.float32(0.1), "zero": np.uint8(0), "top": np.uint8(3), "v": np.float32(0.05), "z": np.int8(0),
        "w": rng.integers(-2, 2, (16, 16, kernel, kernel)).astype(np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "zero"], ["q"]),
        helper.make_node("Clip", ["q", "zero", "top"], ["c"]),
        helper.make_node("DequantizeLinear", ["c", "s", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "v", "z"], ["e"]),
        helper.make_node("Conv", ["d", "e"], ["y"], strides=[stride, stride]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16, None, None])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    return next(str(i["runtimePrecision"].astype(str)) for i in found if i["layerType"].astype(str) == "Convolution")


seen = {(kernel, stride): convolution(kernel, stride) for kernel in (1, 3) for stride in (1, 2)}
for (kernel, stride), precision in seen.items():
    print(f"{kernel}x{kernel}, stride {stride}: {precision}")
assert seen == {(1, 1): "u8", (1, 2): "f32", (3, 1): "u8", (3, 2): "u8"}, seen
PYTHON
