#!/usr/bin/env bash
# torch 2.15.0 (some gigabytes to download), torch.backends.cudnn.*.fp32_precision beside torch.export.
# Expected: a program that turns TF32 off by the new settings alone, as torch's page on TF32 recommends, exports
# networks as before; on a CPU the settings mean nothing.
# Seen: with conv and rnn of cuDNN at "ieee", torch.export raises RuntimeError, which speaks of a mix of old and new
# settings. With the old `torch.backends.cudnn.allow_tf32 = False`, or with both at "tf32", it works.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

cudnn = torch.backends.cudnn


def export() -> str:
    try:
        torch.export.export(torch.nn.Linear(2, 2).eval(), (torch.ones(1, 2),))
    except RuntimeError as error:
        return f"RuntimeError: {str(error)[:120]}"
    return "exported"


seen = [export()]
cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"
seen.append(export())
cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32"
seen.append(export())
cudnn.allow_tf32 = False
seen.append(export())
for setting, text in zip(("default", "new names, ieee", "new names, tf32", "allow_tf32 = False"), seen, strict=True):
    print(f"{setting}: {text}")
assert [text == "exported" for text in seen] == [True, False, True, True], seen
PYTHON
