#!/usr/bin/env bash
# onnxruntime 1.32.0 (onnx 1.23.0), CPU: a convolution with float32 weights between quantized activations.
# Expected: QuantizeLinear and DequantizeLinear in front of and behind Conv say how activations are quantized. Weights
# that the file stores in float32, without a DequantizeLinear of their own, stay as they are.
# Seen: from the optimisation "basic" on they are quantized to 8 bits, unasked and without a word; a fifth of the codes
# behind the convolution differ. With the DequantizeLinear written as Cast and Mul they are right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

rng = np.random.default_rng(0)
weight = rng.standard_normal((16, 16, 3, 3)).astype(np.float32)
constants = {"w": weight, "s": np.float32(0.1), "z": np.uint8(0), "t": np.float32(0.5)}


def model(plain: bool) -> bytes:
    """Codes of a convolution with float weights between two pairs of QuantizeLinear and DequantizeLinear."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Conv", ["d", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "t", "z"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "t", "z"], ["y"]),
    ]
    if plain:
        nodes[1:2] = [
            helper.make_node("Cast", ["q"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["f", "s"], ["d"]),
        ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16, 6, 6])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    onnx.checker.check_model(made)
    return made.SerializeToString()


def run(content: bytes, level: str) -> tuple[np.ndarray, list[str]]:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = "optimised.onnx"
    options.log_severity_level = 3
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0], [node.op_type for node in onnx.load("optimised.onnx").graph.node]


x = (rng.random((1, 16, 8, 8)) * 25).astype(np.float32)
differing = []
for plain in (False, True):
    wanted, _ = run(model(plain), "ORT_DISABLE_ALL")
    for level in ("ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"):
        found, kinds = run(model(plain), level)
        differing.append(float((found != wanted).mean()))
        form = "Cast and Mul" if plain else "DequantizeLinear"
        print(f"{form}, {level}: {100 * differing[-1]:.1f} % of the codes differ; {', '.join(kinds)}")
assert min(differing[:2]) > 0.1 and max(differing[2:]) == 0, differing
PYTHON
