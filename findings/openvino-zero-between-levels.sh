#!/usr/bin/env bash
# OpenVINO 2026.4.1 (onnx 1.23.0, onnxruntime 1.32.0), CPU: four levels -c, -c/3, c/3 and c, written as the usual formula
# round((clip(x / c, -1, 1) + 1) * 3 / 2) in front of QuantizeLinear, DequantizeLinear and a convolution. x is 0, as behind a
# ReLU or in padding: the middle between two levels, 1.5, which rounds to 2, half to even.
# Expected: c/3 for every c, as onnxruntime gives it.
# Seen: for some c OpenVINO gives -c/3: its low-precision passes move the division behind the sum, and c * (1.5 / c) may be
# a bit less than 1.5. Without them it is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openvino==2026.4.1 onnx==1.23.0 onnxruntime==1.32.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper

x = np.zeros((1, 4, 2, 2), np.float32)


def network(c: float) -> bytes:
    """The mean of four levels of x, as a convolution."""
    constants = {
        "c": c, "low": -1, "high": 1, "one": 1, "half": 1.5, "two": 2, "three": 3, "scale": c / 3,
        "weight": np.full((4, 4, 1, 1), 0.25),
    }
    tensors = [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in constants.items()]
    tensors.append(numpy_helper.from_array(np.array(4, np.uint8), "zero"))
    nodes = [
        helper.make_node("Div", ["x", "c"], ["ratio"]),
        helper.make_node("Clip", ["ratio", "low", "high"], ["clipped"]),
        helper.make_node("Add", ["clipped", "one"], ["moved"]),
        helper.make_node("Mul", ["moved", "half"], ["position"]),
        helper.make_node("Round", ["position"], ["number"]),
        helper.make_node("Mul", ["number", "two"], ["doubled"]),
        helper.make_node("Sub", ["doubled", "three"], ["code"]),
        helper.make_node("QuantizeLinear", ["code", "one", "zero"], ["stored"]),
        helper.make_node("DequantizeLinear", ["stored", "scale", "zero"], ["value"]),
        helper.make_node("Conv", ["value", "weight"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)], tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7).SerializeToString()


def openvino_output(model: bytes, **settings: object) -> float:
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32", **settings})
    return float(np.asarray(compiled(x)[0]).flat[0])


wrong, plain = [], []
for c in np.linspace(0.5, 2, 40).astype(np.float32):
    model = network(c)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    assert abs(session.run(None, {"x": x})[0].flat[0] - c / 3) < 1e-4
    if abs(openvino_output(model) - c / 3) > 1e-4:
        wrong.append(round(float(c), 4))
    if abs(openvino_output(model, LP_TRANSFORMS_MODE=False) - c / 3) > 1e-4:
        plain.append(c)
print(f"of 40 values of c, zero is -c/3 in OpenVINO for {wrong}, without low-precision passes for {plain}")
assert len(wrong) == 2 and not plain, (wrong, plain)
PYTHON
