#!/usr/bin/env bash
# qonnx 1.0.0, qonnx.util.inference_cost (the command qonnx-inference-cost).
# Expected: a binary convolution costs one bit a weight, whether its signs are scaled or not.
# Seen: with a scale other than 1, as XNOR-Net's weights have, BipolarQuant's weights are counted as 32-bit floats (32
# times the memory, 32 times the bit operations); Quant with the same scale is counted at its own bit width.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  qonnx==1.0.0 onnx==1.23.0 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from qonnx.util.inference_cost import inference_cost

DOMAIN = "qonnx.custom_op.general"
WEIGHTS = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)


def bits(operator, scale):
    """Bits of all weights of one 3x3 convolution as qonnx counts them."""
    constants = {
        "w": WEIGHTS,
        "ws": np.float32(scale),
        "zero": np.float32(0),
        "wb": np.float32(2),
        "as": np.float32(0.125),
        "ab": np.float32(2),
    }
    quant = {"domain": DOMAIN, "rounding_mode": "ROUND", "narrow": 0}
    if operator == "Quant":
        weight = helper.make_node("Quant", ["w", "ws", "zero", "wb"], ["wq"], signed=1, **quant)
    else:
        weight = helper.make_node("BipolarQuant", ["w", "ws"], ["wq"], domain=DOMAIN)
    nodes = [
        helper.make_node("Quant", ["x", "as", "zero", "ab"], ["xq"], signed=0, **quant),
        weight,
        helper.make_node("Conv", ["xq", "wq"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 6, 6])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid(DOMAIN, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), "conv.onnx")
    return inference_cost("conv.onnx", discount_sparsity=False)["total_cost"]["total_mem_w_bits"] / WEIGHTS.size


seen = {(operator, scale): bits(operator, scale) for operator in ("Quant", "BipolarQuant") for scale in (1.0, 0.25)}
for (operator, scale), count in seen.items():
    print(f"{operator}, {2 if operator == 'Quant' else 1} bits, scale {scale}: {count:g} bits a weight")
assert list(seen.values()) == [2, 2, 1, 32], seen
PYTHON
