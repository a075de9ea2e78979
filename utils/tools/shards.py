"""The word of tools.py that writes shards: make-shards."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from utils.errors import UserError
from utils.text import counted
from utils.tools.options import Options

_PER_SHARD, _QUALITY = 2000, 90


def make_shards(options: Options) -> int:
    """Write images from folders, archives, Parquet or CSV into tar files that training reads by offset."""
    if options.quality is not None and options.quality > 100:
        raise UserError(f"--quality {options.quality}: write 1 to 100")
    if options.quality is not None and options.max_side is None:
        raise UserError(
            "--quality is that of images which --max_side reduces: write --max_side too, or leave it out"
        )
    if options.source is None or options.to is None:
        raise TypeError("the words that make-shards needs are not declared in tools.WORDS")

    from tqdm import tqdm

    from utils.data import workers
    from utils.data.shards.origin import open_origin
    from utils.data.shards.write import Reduction, write_set

    if options.workers is not None:
        workers.check_workers(options.workers)
    folder = Path(options.to)
    parts = open_origin(options.source, options.val_split)
    reduction = None
    if options.max_side is not None:
        reduction = Reduction(max_side=options.max_side, quality=options.quality or _QUALITY)
    total = sum(map(len, parts.values()))
    with tqdm(total=total, unit="image", disable=None) as bar:
        manifest = write_set(
            parts, folder, per_shard=options.shard_size or _PER_SHARD, reduction=reduction,
            threads=options.workers or os.cpu_count() or 1, force=options.force, progress=bar.update,
        )  # fmt: skip
    for part, shards in manifest.parts.items():
        size = sum(shard.bytes for shard in shards)
        print(
            f"{part}: {len(parts[part]):,} images in {counted(len(shards), 'shard')}, {size / 2**20:.1f} MiB"
        )
    more = "" if "val" in manifest.parts else " --val_batch_size 0 (there are no images for validation)"
    more = more if "train" in manifest.parts else " -e (there are no images for training)"
    print(
        f"{len(manifest.classes):,} classes; use them with --dataset shards --root {shlex.quote(str(folder))}{more}"
    )
    return 0
