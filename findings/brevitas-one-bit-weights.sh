#!/usr/bin/env bash
# Brevitas 0.13.4 with torch 2.15.0 (some gigabytes to download), weight_bit_width=1 with the weight quantizers that a
# quantized layer has by default and the other integer ones.
# Expected: two levels, or an error that names the binary quantizers.
# Seen: no error and no warning. The integer grid is narrow, from -0 to +0, so that the step is infinite and every weight
# is NaN; with fixed-point scales every weight is 0. From 2 bits on (three levels) all is well.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check brevitas==0.13.4 torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import brevitas.nn as qnn
import torch
from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerTensorFixedPoint, Int8WeightPerTensorFloat

torch.manual_seed(0)
seen = {}
for quantizer in (Int8WeightPerTensorFloat, Int8WeightPerChannelFloat, Int8WeightPerTensorFixedPoint):
    for bits in (2, 1):
        layer = qnn.QuantConv2d(4, 4, 3, bias=False, weight_quant=quantizer, weight_bit_width=bits)
        weight = layer.quant_weight().value
        finite = torch.isfinite(weight)
        seen[quantizer.__name__, bits] = (
            "NaN" if not finite.any() else "zero" if not weight.any() else "levels" if finite.all() else "mixed"
        )
        print(f"{quantizer.__name__}, {bits} bits: {seen[quantizer.__name__, bits]}")
assert list(seen.values()) == ["levels", "NaN", "levels", "NaN", "levels", "zero"], seen
PYTHON
