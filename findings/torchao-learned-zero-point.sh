#!/usr/bin/env bash
# torchao 0.18.0 with torch 2.15.0: quantization-aware training with a learned range and levels that need a zero point,
# IntxFakeQuantizeConfig(..., is_symmetric=False, is_dynamic=False, range_learning=True), all else by default.
# Expected: it trains, or the configuration is refused where it is made; the range starts as that of the tensor it is
# initialised with, and two bits stay four evenly spaced levels.
# Seen: the configuration is made; initialize_fake_quantizers then raises RuntimeError, since the zero point is an
# integer parameter, which can have no gradient. With zero_point_precision=torch.float32 it trains. But the range of
# values from 0 to 3 starts as -2 to 1, and the zero point does not stay whole: after one step the levels are unevenly
# spaced, with five values where two bits have four, and no integers with one scale stand for them.
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
    """What becomes of a learned range of 2-bit weights in a step of training."""
    config = qat.IntxFakeQuantizeConfig(
        torch.uint2, PerAxis(0), is_symmetric=False, is_dynamic=False, range_learning=True, **more
    )
    quantizer = qat.IntxFakeQuantizer(config)
    x = torch.linspace(0, 3, 101).reshape(1, -1)
    every = torch.linspace(-9, 9, 1001).reshape(1, -1)
    try:
        qat.initialize_fake_quantizers(torch.nn.Sequential(quantizer), (x,))
        first = quantizer(every).unique().tolist()
        (quantizer(x) - x).square().mean().backward()
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    torch.optim.SGD(quantizer.parameters(), lr=0.1).step()
    return f"levels {rounded(first)}, after one step {rounded(quantizer(every).unique().tolist())}"


def rounded(values: list[float]) -> str:
    """The values in words."""
    return " ".join(f"{value:.2f}" for value in values)


default, floating = attempt(), attempt(zero_point_precision=torch.float32)
print(f"by default: {default}")
print(f"zero_point_precision=torch.float32: {floating}")
assert default.startswith("RuntimeError"), "the default has changed"
assert floating.startswith("levels -2.00 -1.00 0.00 1.00, after"), "the first range has changed"
assert len(floating.partition("after one step ")[2].split()) == 5, "the float zero point has changed"
PYTHON
