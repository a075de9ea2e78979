#!/usr/bin/env bash
# MNN 3.6.1, its converter: `--weightQuantBits` of a convolution whose weights have three or four levels already.
# Expected: levels that are there are kept, and a number of bits that does not exist is refused.
# Seen: four levels -3 -1 1 3 are kept with the default only where each channel uses both ends; ternary ones -1 0 1 are
# moved by it, and kept with `--weightQuantAsymmetric false`, which moves the four. One bit is the same file as two. The
# exit status is 0 each time. The format itself holds all of these levels with 2 bits: a file stores a table of codes.
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

convert = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"  # MNN.tools calls pip
manager = MNN.nn.create_runtime_manager(({"precision": "high", "numThread": 1},))


def moved(codes, *options):
    """The largest distance between a weight and what the file computes with, in steps; weights are read by unit images."""
    weight = (codes * np.float32(0.7)).astype(np.float32)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])], "g", [value("x", TensorProto.FLOAT, ["n", 16, 1, 1])],
        [value("y", TensorProto.FLOAT, ["n", 8, 1, 1])], [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), "x.onnx")
    arguments = ["-f", "ONNX", "--modelFile", "x.onnx", "--MNNModel", "x.mnn", *options]
    subprocess.run([sys.executable, "-c", convert, *arguments], check=True, capture_output=True)
    module = MNN.nn.load_module_from_file("x.mnn", ["x"], ["y"], runtime_manager=manager)
    x = np.eye(16, dtype=np.float32).reshape(16, 16, 1, 1)
    given = MNN.expr.placeholder(list(x.shape), MNN.expr.NCHW)
    given.write(x)
    (y,) = module.forward([given])
    y = MNN.expr.convert(y, MNN.expr.NCHW) if y.data_format == MNN.expr.NC4HW4 else y
    return float(np.abs(y.read()[:, :, 0, 0].T - weight[:, :, 0, 0]).max() / 0.7)


rng = np.random.default_rng(0)
four = rng.choice([-3, -1, 1, 3], (8, 16, 1, 1))
four[:, 0], four[:, 1] = -3, 3  # both ends in each channel
one_end = np.where(four == 3, 1, four)
three = rng.choice([-1, 0, 1], (8, 16, 1, 1))
three[:, 0], three[:, 1] = -1, 1
symmetric = ("--weightQuantAsymmetric", "false")
cases = {"four levels": four, "four levels without the highest": one_end, "three levels": three}
seen = {}
for name, codes in cases.items():
    for options in ((), symmetric):
        seen[name, options] = moved(codes, "--weightQuantBits", "2", *options)
        print(f"{name}, {'symmetric' if options else 'default'}: moved by {seen[name, options]:.2g} steps")
one = moved(four, "--weightQuantBits", "1")
print(f"four levels with one bit: moved by {one:.2g} steps")
assert seen["four levels", ()] < 1e-5 < 0.1 < seen["four levels", symmetric]
assert seen["four levels without the highest", ()] > 0.1
assert seen["three levels", symmetric] < 1e-5 < 0.1 < seen["three levels", ()]
assert one == seen["four levels", ()]
PYTHON
