#!/usr/bin/env bash
# torchao 0.18.0 with torch 2.15.0: quantization-aware training with a learned range and levels that need a zero point,
# IntxFakeQuantizeConfig(..., is_symmetric=False, is_dynamic=False, range_learning=True), all else by default.
# Expected: it trains, or the configuration is refused where it is made.
# Seen: the configuration is made; initialize_fake_quantizers then raises RuntimeError, since the zero point is an
# integer parameter, which can have no gradient. With zero_point_precision=torch.float32 it trains.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps torchao==0.18.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torchao.quantization import PerAxis, qat


def attempt(**more: object) -> str:
    """What becomes of a learned range of 2-bit weights."""
    config = qat.IntxFakeQuantizeConfig(
        torch.uint2, PerAxis(0), is_symmetric=False, is_dynamic=False, range_learning=True, **more
    )
    quantizer = qat.IntxFakeQuantizer(config)
    x = torch.randn(8, 100, generator=torch.Generator().manual_seed(0))
    try:
        qat.initialize_fake_quantizers(torch.nn.Sequential(quantizer), (x,))
        quantizer(x).square().sum().backward()
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return f"gradients of {sum(p.grad is not None for p in quantizer.parameters())} parameters"


default, floating = attempt(), attempt(zero_point_precision=torch.float32)
print(f"by default: {default}")
print(f"zero_point_precision=torch.float32: {floating}")
assert default.startswith("RuntimeError"), "the default has changed"
assert floating == "gradients of 2 parameters", "the float zero point has changed"
PYTHON
