#!/usr/bin/env bash
# MNN 3.6.1, CPU: an ONNX file with Where(x > 0.5, x, values), values one for each channel.
# Expected: what NumPy's where gives, as ONNX says: the values are spread over images and places.
# Seen: right with the values as the second tensor, Where(x > 0.5, values, x), and wrong with them as the third.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check MNN==3.6.1 onnx==1.23.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import subprocess
import sys

import MNN
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

values = np.arange(10, 15, dtype=np.float32).reshape(1, 5, 1, 1)
nodes = [
    helper.make_node("Greater", ["x", "half"], ["above"]),
    helper.make_node("Where", ["above", "values", "x"], ["second"]),
    helper.make_node("Where", ["above", "x", "values"], ["third"]),
]
value = helper.make_tensor_value_info
graph = helper.make_graph(
    nodes, "g", [value("x", TensorProto.FLOAT, ["n", 5, 4, 4])],
    [value(name, TensorProto.FLOAT, ["n", 5, 4, 4]) for name in ("second", "third")],
    [numpy_helper.from_array(np.float32(0.5), "half"), numpy_helper.from_array(values, "values")],
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), "x.onnx")
# The converter itself, without MNN.tools around it, which calls pip.
convert = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
arguments = ["-f", "ONNX", "--modelFile", "x.onnx", "--MNNModel", "x.mnn"]
subprocess.run([sys.executable, "-c", convert, *arguments], check=True, capture_output=True)

manager = MNN.nn.create_runtime_manager(({"precision": "high", "numThread": 1},))
module = MNN.nn.load_module_from_file("x.mnn", ["x"], ["second", "third"], runtime_manager=manager)
seen = {}
for images in (1, 2):
    x = np.random.default_rng(0).random((images, 5, 4, 4)).astype(np.float32)
    given = MNN.expr.placeholder(list(x.shape), MNN.expr.NCHW)
    given.write(x)
    found = [tensor.read() for tensor in module.forward([given])]
    wanted = (np.where(x > 0.5, values, x), np.where(x > 0.5, x, values))
    seen[images] = [float((one != other).mean()) for one, other in zip(found, wanted, strict=True)]
    print(f"{images} images: wrong with the values second {seen[images][0]:.0%}, third {seen[images][1]:.0%}")
assert all(second == 0 and third > 0.1 for second, third in seen.values())
PYTHON
