#!/usr/bin/env bash
# hls4ml 1.3.0, a cleaned QONNX network: convolution, ReLU, Reshape to a row, quantizer, matrix product.
# Expected: io_stream gives what io_parallel gives, or refuses the network.
# Seen: io_parallel is right; io_stream builds, warns of leftover data in a stream, and answers wrongly.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  hls4ml==1.3.0 qonnx==1.0.0 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6 setuptools==84.2.1
"$folder/venv/bin/python" - "$folder" 2>"$folder/log" <<'PYTHON' || { tail -5 "$folder/log"; exit 1; }
import sys

import hls4ml
import numpy as np
from onnx import TensorProto, helper, numpy_helper
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
from qonnx.util.cleanup import cleanup_model

rng = np.random.default_rng(0)
constants = {
    "w": rng.integers(-2, 3, (4, 3, 3, 3)) / 4, "v": rng.integers(-2, 3, (64, 5)) / 4,
    "scale": 0.5, "zero": 0, "bits": 3,
}  # fmt: skip
square = {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1], "group": 1}
quant = {"domain": "qonnx.custom_op.general", "signed": 0, "narrow": 0, "rounding_mode": "ROUND"}
graph = helper.make_graph(
    [
        helper.make_node("Conv", ["x", "w"], ["a"], **square),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Reshape", ["b", "row"], ["c"]),
        helper.make_node("Quant", ["c", "scale", "zero", "bits"], ["d"], **quant),
        helper.make_node("MatMul", ["d", "v"], ["y"]),
    ],
    "network",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
    [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in constants.items()]
    + [numpy_helper.from_array(np.array([1, 64]), "row")],
)
imports = [helper.make_opsetid("", 13), helper.make_opsetid("qonnx.custom_op.general", 1)]
model = cleanup_model(ModelWrapper(helper.make_model(graph, opset_imports=imports, ir_version=8)))
images = (rng.integers(-4, 5, (8, 3, 6, 6)) / 4).astype(np.float32)
output = model.graph.output[0].name
wanted = [execute_onnx(model, {model.graph.input[0].name: image[None]})[output][0] for image in images]
model = cleanup_model(model.transform(ConvertToChannelsLastAndClean(make_input_channels_last=True)))
far = {}
for kind in ("io_parallel", "io_stream"):
    settings = hls4ml.utils.config.config_from_onnx_model(
        model, granularity="name", backend="Vitis", default_precision="fixed<32,16>"
    )
    made = hls4ml.converters.convert_from_onnx_model(
        model, output_dir=f"{sys.argv[1]}/{kind}", backend="Vitis", io_type=kind, hls_config=settings
    )
    made.compile()
    found = made.predict(np.ascontiguousarray(images.transpose(0, 2, 3, 1))).reshape(8, 5)
    far[kind] = float(np.abs(found - np.array(wanted)).max())
largest = float(np.abs(wanted).max())
print(f"\nlargest result {largest:.3f}; largest difference: {far}")
assert far["io_parallel"] < 1e-3 * largest, far
assert far["io_stream"] > 0.1 * largest, far
PYTHON
