#!/usr/bin/env bash
# ExecuTorch (executorch 1.5.1, torch 2.15.0) with XNNPACK: activations that are quantized to four levels, quant_min=0
# and quant_max=3, as a network of 2 bits has them.
# Expected: the values 0, s, 2 s and 3 s, as torch computes them, or a refusal when the program is lowered.
# Seen: quant_max is dropped: values run on to 127 s, without a word. With a hardtanh to 0 .. 3 s in front and the whole
# range of int8 they are right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check executorch==1.5.1 torch==2.15.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import nn

SCALE = 0.5
OPS = torch.ops.quantized_decomposed


class Levels(nn.Module):
    def __init__(self, clipped):
        super().__init__()
        self.clip = nn.Hardtanh(0, 3 * SCALE) if clipped else nn.Identity()
        self.lowest, self.highest = (-128, 127) if clipped else (0, 3)

    def forward(self, x):
        grid = (SCALE, 0, self.lowest, self.highest, torch.int8)
        return OPS.dequantize_per_tensor.default(OPS.quantize_per_tensor.default(self.clip(x), *grid), *grid)


def levels(network, x):
    program = torch.export.export(network, (x,))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    (found,) = Runtime.get().load_program(lowered.buffer).load_method("forward").execute([x])
    return sorted(set(found.flatten().tolist())), sorted(set(network(x).flatten().tolist()))


x = torch.arange(64).reshape(1, 1, 8, 8) * 0.5
seen, wanted = levels(Levels(False), x)
print(f"quant_max=3: torch {wanted}, XNNPACK {len(seen)} values up to {seen[-1]}")
clipped, _ = levels(Levels(True), x)
print(f"hardtanh in front: XNNPACK {clipped}")
assert wanted == clipped == [0.0, 0.5, 1.0, 1.5]
assert seen[-1] == 31.5
PYTHON
