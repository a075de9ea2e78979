#!/usr/bin/env bash
# NVIDIA DALI 2.4.0 (nvidia-dali-cuda130, some hundred megabytes), fn.decoders.image on the CPU.
# Expected: a WebP file decodes with and without EXIF behind its pixels, as Pillow writes both.
# Seen: where the chunk of pixels has an odd number of bytes, the file with EXIF is refused ("Unexpected end of
# stream"), whether DALI shall turn images upright or not. The padding byte of such a chunk is not passed over. The same
# pixels without EXIF decode, and so do files whose chunk is even.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  nvidia-dali-cuda130==2.4.0 pillow==13.0.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import io

import numpy as np
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from PIL import ExifTags, Image


def webp(size, exif):
    """A lossless WebP of noise, and the length of its chunk of pixels."""
    pixels = np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 1
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True, **({"exif": tags} if exif else {}))
    data = file.getvalue()
    at = data.index(b"VP8L") + 4
    return data, int.from_bytes(data[at : at + 4], "little")


def decodes(data):
    with Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1) as pipeline:
        file = fn.external_source(source=lambda: [np.frombuffer(data, np.uint8)])
        pipeline.set_outputs(fn.decoders.image(file, device="cpu", adjust_orientation=False))
    try:
        pipeline.build()
        pipeline.run()
    except RuntimeError:
        return "refused"  # the reason is on standard error
    return "decodes"


seen = {}
for size in range(8, 40):
    chunk = webp(size, True)[1] % 2
    for exif in (False, True):
        seen.setdefault((("even", "odd")[chunk], exif), set()).add(decodes(webp(size, exif)[0]))
for (chunk, exif), answers in sorted(seen.items()):
    print(f"{chunk} chunk, {'with' if exif else 'without'} EXIF: {', '.join(sorted(answers))}")
assert seen == {
    ("even", False): {"decodes"},
    ("even", True): {"decodes"},
    ("odd", False): {"decodes"},
    ("odd", True): {"refused"},
}, seen
PYTHON
