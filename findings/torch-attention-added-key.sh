#!/usr/bin/env bash
# torch 2.15.0: nn.MultiheadAttention with a causal mask, is_causal=True, and a key that it adds itself (add_bias_kv or
# add_zero_attn).
# Expected: need_weights says whether the weights are returned, and changes no output.
# Seen: outputs differ. Without weights the mask is dropped for is_causal's own, which hides the added key, the last one,
# from the queries; with weights the given mask is used, which lets all queries see it. Without an added key both agree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn

torch.manual_seed(0)
x, mask = torch.randn(1, 4, 8), nn.Transformer.generate_square_subsequent_mask(4)
differences = {}
for name, added in (("no added key", {}), ("add_bias_kv", {"add_bias_kv": True}), ("add_zero_attn", {"add_zero_attn": True})):
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **added)  # in training mode, without dropout
    outputs = [
        layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=weights)[0].detach() for weights in (False, True)
    ]
    differences[name] = (outputs[0] - outputs[1]).abs().max().item()
    print(f"{name}: the outputs without and with weights differ by at most {differences[name]:.1e}")
assert differences["no added key"] < 1e-5, differences
assert differences["add_bias_kv"] > 0.01 and differences["add_zero_attn"] > 0.01, differences
PYTHON
