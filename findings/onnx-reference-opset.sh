#!/usr/bin/env bash
# onnx 1.23.0, onnx.reference.ReferenceEvaluator.
# Expected: the reference runs a valid model of any opset, so that it can be the judge of QDQ files of opset 13, the
# oldest with scales per channel, which all engines load.
# Seen: there is no DequantizeLinear below opset 19: the evaluator refuses such files, though QuantizeLinear of the same
# opset runs. The same graph marked as opset 19 gives the right answer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

X = np.array([-0.5, 0.2, 0.7, 9.0], np.float32)


def model(opset, operators):
    names = ["x", *operators]
    nodes = [
        helper.make_node(operator, [before, "scale", "zero_point"], [operator])
        for before, operator in zip(names, operators)
    ]
    constants = [
        numpy_helper.from_array(np.float32(0.5), "scale"),
        numpy_helper.from_array(np.uint8(0), "zero_point"),
    ]
    kind = TensorProto.FLOAT if operators[-1] == "DequantizeLinear" else TensorProto.UINT8
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "qdq",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
            [helper.make_tensor_value_info(operators[-1], kind, [4])],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    checker.check_model(made, full_check=True)
    return made


both = ["QuantizeLinear", "DequantizeLinear"]
print("opset 13, QuantizeLinear:", ReferenceEvaluator(model(13, both[:1])).run(None, {"x": X})[0].tolist())
print("opset 19, both:", ReferenceEvaluator(model(19, both)).run(None, {"x": X})[0].tolist())
try:
    ReferenceEvaluator(model(13, both)).run(None, {"x": X})
except RuntimeError as error:
    print("opset 13, both:", error)
    assert "DequantizeLinear" in str(error)
else:
    raise SystemExit("opset 13 runs now")
PYTHON
