#!/usr/bin/env bash
# OpenVINO 2026.4.0 beside onnxruntime 1.32.0, an ONNX QuantizeLinear.
# Expected: the same codes. ONNX defines y = saturate(round(x / scale) + zero_point), and ties go to the even integer.
# Seen: OpenVINO rounds x / scale + zero_point. Where the zero point is odd, every tie lands on the other neighbour;
# with an even one nothing differs. Ternary activations in uint8 (codes 0, 1, 2) have the odd zero point 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  onnx==1.23.0 onnxruntime==1.32.0 openvino==2026.4.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper

TIES = np.array([-1.5, -0.5, 0.5, 1.5, 2.5, 3.5], np.float32)


def graph(zero_point):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero_point"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(np.float32(1), "scale"),
        numpy_helper.from_array(np.uint8(zero_point), "zero_point"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(TIES)]) for name in "xy"]
    return helper.make_model(
        helper.make_graph(nodes, "ties", ends[:1], ends[1:], constants),
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=8,
    ).SerializeToString()


core = openvino.Core()
print("x:", TIES.tolist())
differing = {}
for zero_point in (2, 3, 4, 5):
    model = graph(zero_point)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    ort = session.run(None, {"x": TIES})[0]
    ov = core.compile_model(core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(TIES)[0]
    assert ort.tolist() == np.maximum(np.round(TIES), -zero_point).tolist()
    differing[zero_point] = int((ort != ov).sum())
    print(f"zero point {zero_point}: onnxruntime {ort.tolist()}, OpenVINO {ov.tolist()}")
assert differing == {2: 0, 3: 6, 4: 0, 5: 6}, differing
PYTHON
