#!/usr/bin/env bash
# torchvision 0.29.2 with torch 2.15.0 (some gigabytes to download), classifiers built on the meta device.
# Expected: all of them can be, to count parameters and layers without memory.
# Seen: the 15 RegNets cannot (NotImplementedError, "Cannot copy out of meta tensor"): their widths are computed with
# tensors, which the device of the block makes meta tensors too. The other 65 can.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 torchvision==0.29.2 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torchvision import models

names = models.list_models(module=models)
refused = {}
for name in names:
    try:
        with torch.device("meta"):
            models.get_model(name)
    except NotImplementedError as error:
        refused[name] = str(error)
print(f"{len(refused)} of {len(names)} cannot: {', '.join(refused)}")
print(f"because: {', '.join(set(refused.values()))}")
assert len(names) == 80 and sorted(refused) == [name for name in names if name.startswith("regnet_")], refused
assert len(refused) == 15, refused
PYTHON
