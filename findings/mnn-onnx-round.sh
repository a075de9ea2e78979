#!/usr/bin/env bash
# MNN 3.6.1, its converter and its CPU backend: an ONNX file that divides by a constant and rounds.
# Expected: what ONNX says of Div, and of Round: the nearest whole number, ties to even.
# Seen: the converter multiplies by the reciprocal, which is another number for an eighth of these values, and Round takes
# ties away from zero: 0.5 becomes 1, 2.5 becomes 3.
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

step = np.float32(0.3)
nodes = [
    helper.make_node("Div", ["x", "step"], ["quotient"]),
    helper.make_node("Round", ["x"], ["whole"]),
]
value = helper.make_tensor_value_info
graph = helper.make_graph(
    nodes, "g", [value("x", TensorProto.FLOAT, [1, 1, 1, 200])],
    [value(name, TensorProto.FLOAT, [1, 1, 1, 200]) for name in ("quotient", "whole")],
    [numpy_helper.from_array(step, "step")],
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), "x.onnx")
# The converter itself, without MNN.tools around it, which calls pip.
convert = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
arguments = ["-f", "ONNX", "--modelFile", "x.onnx", "--MNNModel", "x.mnn"]
subprocess.run([sys.executable, "-c", convert, *arguments], check=True, capture_output=True)

x = (np.arange(-100, 100) / 2).astype(np.float32).reshape(1, 1, 1, 200)
manager = MNN.nn.create_runtime_manager(({"precision": "high", "numThread": 1},))
module = MNN.nn.load_module_from_file("x.mnn", ["x"], ["quotient", "whole"], runtime_manager=manager)
given = MNN.expr.placeholder(list(x.shape), MNN.expr.NCHW)
given.write(x)
quotient, whole = (tensor.read() for tensor in module.forward([given]))
other = (quotient != x / step).mean()
print(f"quotients that are not x / 0.3: {other:.0%}; those of a product with 1 / 0.3: "
      f"{(quotient == x * (np.float32(1) / step)).mean():.0%}")
print("Round of -2.5 -1.5 -0.5 0.5 1.5 2.5:", *whole[np.isin(x, [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])])
assert other > 0.1 and (quotient == x * (np.float32(1) / step)).all()
assert (whole == np.trunc(x + np.copysign(np.float32(0.5), x))).all() and (whole != np.round(x)).any()
PYTHON
