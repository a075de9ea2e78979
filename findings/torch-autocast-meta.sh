#!/usr/bin/env bash
# torch 2.15.0 (some gigabytes to download), torch.autocast on the meta device.
# Expected: a region with autocast switched off does nothing, on any device, so that layers which compute in float32
# inside it, as quantizers must, can be run on the meta device to learn shapes and operations.
# Seen: RuntimeError "unsupported scalarType" on entering, switched on or off; with "cpu" both work.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

seen = {}
for device in ("cpu", "meta"):
    for enabled in (True, False):
        x = torch.ones(2, 2, device=device)
        try:
            with torch.autocast(device, enabled=enabled):
                seen[device, enabled] = f"a product of shape {list((x @ x).shape)}"
        except RuntimeError as error:
            seen[device, enabled] = str(error).splitlines()[0]
        print(f"{device}, enabled={enabled}: {seen[device, enabled]}")
assert ["unsupported" in text for text in seen.values()] == [False, False, True, True], seen
PYTHON
