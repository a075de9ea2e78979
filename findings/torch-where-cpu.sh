#!/usr/bin/env bash
# torch 2.15.0, CPU, one thread: choosing between two float32 tensors by a mask, as every clipped gradient is written.
# Expected: torch.where and masked_fill take about the time of a clamp, since all only pass over memory.
# Seen (AVX2): with a mask in no order they take 20 to 50 times as long; a mask of ones only, a few times. They branch at
# each element. hardtanh_backward, which chooses too, takes less than twice the time of a clamp.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import time
from collections.abc import Callable

import torch

torch.set_num_threads(1)
x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
out, zero, mask, ones = torch.empty_like(x), torch.zeros_like(x), x > 0, torch.ones(1 << 20, dtype=torch.bool)


def least(work: Callable[[], object]) -> float:
    """The least processor time of some runs."""
    times = []
    for _ in range(30):
        began = time.thread_time()
        work()
        times.append(time.thread_time() - began)
    return min(times)


clamp = least(lambda: torch.clamp(x, 0, 1, out=out))
ratios = {
    "where": least(lambda: torch.where(mask, x, zero, out=out)) / clamp,
    "where, a mask of ones": least(lambda: torch.where(ones, x, zero, out=out)) / clamp,
    "masked_fill": least(lambda: out.copy_(x).masked_fill_(mask, 0.0)) / clamp,
    "hardtanh_backward": least(lambda: torch.ops.aten.hardtanh_backward(x, x, 0.0, 1.0)) / clamp,
}
print(f"{torch.backends.cpu.get_cpu_capability()}, times of a clamp of {x.numel():,} float32 elements")
for name, ratio in ratios.items():
    print(f"{name}: {ratio:.1f}")
assert ratios["where"] > 8 and ratios["masked_fill"] > 8 and ratios["hardtanh_backward"] < 4, ratios
PYTHON
