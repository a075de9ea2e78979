#!/usr/bin/env bash
# qonnx 1.0.0, ConvertToChannelsLastAndClean, on a convolution of integers whose output is annotated as such, with a
# multiplication by a scale behind it.
# Expected: the annotation stays with the sums, and the network runs as before.
# Seen: the tensor's name, and with it its datatype, goes to the output of the multiplication. The executor then raises an
# exception, since values in float are no integers. InferDataTypes behind it puts it right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  qonnx==1.0.0 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6 setuptools==84.2.1
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from onnx import TensorProto, helper, numpy_helper
from qonnx.core.datatype import DataType
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
from qonnx.transformation.infer_datatypes import InferDataTypes
from qonnx.transformation.infer_shapes import InferShapes

rng = np.random.default_rng(0)
constants = {
    "w": rng.integers(-2, 2, (4, 3, 3, 3)).astype(np.float32),
    "s": np.float32(0.3).reshape(1, 1, 1, 1),
    "b": rng.random((1, 4, 1, 1)).astype(np.float32),
}
graph = helper.make_graph(
    [
        helper.make_node("Conv", ["x", "w"], ["sums"], kernel_shape=[3, 3], strides=[1, 1], pads=[0] * 4, dilations=[1, 1], group=1),
        helper.make_node("Mul", ["sums", "s"], ["scaled"]),
        helper.make_node("Add", ["scaled", "b"], ["y"]),
    ],
    "network",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 4, 4])],
    [numpy_helper.from_array(value, name) for name, value in constants.items()],
)
model = ModelWrapper(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8))
for name, kind in {"x": "UINT2", "w": "INT2", "sums": "INT8"}.items():
    model.set_tensor_datatype(name, DataType[kind])
image = {"x": rng.integers(0, 4, (1, 3, 6, 6)).astype(np.float32)}
before = model.transform(InferShapes())
wanted = execute_onnx(before, image)["y"]
after = before.transform(ConvertToChannelsLastAndClean())
marked = [node.op_type for node in after.graph.node if after.get_tensor_datatype(node.output[0]).name == "INT8"]
print("INT8 is the output of", marked)
assert marked == ["Mul"], marked
try:
    execute_onnx(after, {after.graph.input[0].name: image["x"]})
except Exception as error:
    print(" ".join(str(error).split()))
else:
    raise SystemExit("it runs")
mended = after.transform(InferDataTypes())
found = execute_onnx(mended, {mended.graph.input[0].name: image["x"]})[mended.graph.output[0].name]
np.testing.assert_allclose(found, wanted, rtol=1e-5)
print("right behind InferDataTypes")
PYTHON
