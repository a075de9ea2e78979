#!/usr/bin/env bash
# OpenVINO 2026.4.1, CPU: a BinaryConvolution (float32 only, xnor-popcount) behind a FakeQuantize of two levels.
# Expected: FakeQuantize hands bits over, wherever its input's two ends are; both networks below round to the same signs.
# Seen: bits only where input_low equals input_high; with the ends -1 and 1 a Reorder by a reference kernel makes them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openvino==2026.4.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import openvino
from openvino import Type, opset13

rng = np.random.default_rng(0)
bits = rng.integers(0, 2, (64, 64, 3, 3)).astype(np.uint8)
images = rng.standard_normal((1, 64, 28, 28)).astype(np.float32)


def run(low: float, high: float) -> tuple[list[str], np.ndarray]:
    """The kinds of the layers that OpenVINO runs, in order, and their result."""
    x = opset13.parameter([1, 64, 28, 28], Type.f32)
    ends = [np.float32(end) for end in (low, high, 0, 1)]
    signs = opset13.fake_quantize(x, *ends, 2)
    weights = opset13.constant(bits, dtype=Type.u1)
    sums = opset13.binary_convolution(signs, weights, [1, 1], [0, 0], [0, 0], [1, 1], "xnor-popcount", 0.0)
    model = openvino.Model([opset13.multiply(sums, np.float32(1)).output(0)], [x])
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    kinds = [f"{i['layerType'].astype(str)} ({i['primitiveType'].astype(str)})" for i in found]
    return kinds, compiled(images)[0]


equal, apart = run(0, 0), run(-1, 1)
for ends, (kinds, _) in (("0 and 0", equal), ("-1 and 1", apart)):
    print(f"ends {ends}: {', '.join(kinds)}")
same = float(np.mean(equal[1] == apart[1]))
print(f"same sums: {100 * same:.1f} %")
assert same == 1.0
assert ("Reorder (ref_any_f32)" in equal[0], "Reorder (ref_any_f32)" in apart[0]) == (False, True)
PYTHON
