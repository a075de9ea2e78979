"""The word predict of tools.py: classes of images, by a network from its checkpoint or, later, by an engine.

torch is imported where it is used, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.text import format_table, printable
from utils.tools.options import Options, given_path, refuse_existing

if TYPE_CHECKING:
    from torch import Tensor

    from utils.data.transform import ImageTransform

BATCH = 64  # images


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """What predicts: a network or an engine, and what its file says of images and classes.

    Attributes:
        logits: float32 [N, C, H, W], made by `transform`, to float32 [N, classes]; called without gradients.
        transform: turns the path of an image into float32 [C, H, W].
        classes: names of the classes in the order of the logits.
    """

    logits: Callable[[Tensor], Tensor]
    transform: ImageTransform
    classes: tuple[str, ...]


def open_checkpoint(options: Options) -> Predictor:
    """The network of a checkpoint."""
    from model.load import load_trained

    trained = load_trained(given_path(options.old), ema_weights=options.ema_weights)
    return Predictor(logits=trained.network, transform=trained.transform, classes=trained.labels)


def open_exported(options: Options) -> Predictor:
    """An exported file in the first engine that reads it."""
    import json

    import torch

    from model.deploy.engines import engines_of, read_metadata
    from utils.data.transform import ImageTransform

    path = given_path(options.old)
    runner = engines_of(path)[0].open(path)
    try:
        found = read_metadata(path)
        classes, images = (json.loads(found[name]) for name in ("classes", "images"))
    except (KeyError, ValueError):
        raise UserError(
            f"{path} does not say what its classes and images are; export it anew from its checkpoint"
        ) from None
    return Predictor(
        logits=lambda images: torch.from_numpy(runner(images.contiguous().numpy())["logits"]),
        transform=ImageTransform.from_dict(images, str(path)),
        classes=tuple(map(str, classes)),
    )


OPENERS: dict[str, Callable[[Options], Predictor]] = {".onnx": open_exported, ".xml": open_exported}
"""Ending of an exported file -> what opens it; all other files are checkpoints."""


def predict(options: Options) -> int:
    """Print the most probable classes of images, and of all images below folders, by the network of --old."""
    output = options.output
    if output is not None:
        if output.suffix not in _FORMATS:
            raise UserError(f"--output {output}: end the file's name in {' or '.join(_FORMATS)}")
        if output.is_dir() or not output.parent.is_dir():
            raise UserError(f"--output {output}: name a file in a folder that exists")
        refuse_existing(options, output)
    paths = image_paths(options.images or ())
    predictor = OPENERS.get(given_path(options.old).suffix, open_checkpoint)(options)
    unreadable: list[str] = []
    rows = list(
        predictions(predictor, paths, options.topk or 5, options.batch_size or BATCH, unreadable.append)
    )
    if not rows:
        raise UserError(unreadable[0])
    if output is None:
        print(as_text(rows))
    else:
        from utils.checkpoint import archive  # imports torch

        archive.write_atomic(output, _FORMATS[output.suffix](rows).encode("utf-8", "surrogateescape"))
        print(printable(f"{output}: {len(rows)} images"))
    for line in unreadable:
        print(f"tools.py: {line}", file=sys.stderr)
    return 1 if unreadable else 0


def image_paths(places: Sequence[Path]) -> list[Path]:
    """The images named, and those below the folders named, as the data sets list them.

    Raises:
        UserError: there is no such file, or no image in a folder.
    """
    from torchvision.datasets.folder import is_image_file

    from utils.data.image_file import walk

    found: list[Path] = []
    for place in places:
        if not os.path.lexists(place):
            raise UserError(f"{place}: no such file or folder; name images or folders of images")
        if not place.is_dir():
            found.append(place)
            continue
        below = [Path(folder, name) for folder, names in walk(place) for name in names if is_image_file(name)]
        if not below:
            raise UserError(f"{place} has no image in it or in a folder below it")
        found += sorted(below)
    return found


def predictions(
    predictor: Predictor, paths: Sequence[Path], topk: int, batch_size: int, refuse: Callable[[str], object]
) -> Iterator[dict[str, Any]]:
    """A row for each image that can be read: its path, and its most probable classes with their probabilities.

    Args:
        predictor: the network.
        paths: the images.
        topk: how many classes.
        batch_size: images that are computed together.
        refuse: gets a line about each image that cannot be read.
    """
    import torch

    from utils.report.progress import progress

    topk = min(topk, len(predictor.classes))
    with progress(paths, len(paths), "images", True) as bar:
        images = _readable(predictor.transform, bar, refuse)
        while batch := list(itertools.islice(images, batch_size)):
            with torch.no_grad():
                logits = predictor.logits(torch.stack([image for _, image in batch])).float()
            if not logits.isfinite().all():
                raise UserError(
                    f"the network puts out values that are not finite, of {batch[0][0]} for example"
                )
            best = logits.softmax(1).topk(topk, dim=1)
            for (path, _), shares, numbers in zip(batch, best.values, best.indices, strict=True):
                yield {
                    "image": str(path),
                    "classes": [predictor.classes[number] for number in numbers.tolist()],
                    "probabilities": shares.tolist(),
                }


def _readable(
    transform: ImageTransform, paths: Iterable[Path], refuse: Callable[[str], object]
) -> Iterator[tuple[Path, Tensor]]:
    for path in paths:
        try:
            yield path, transform(path)
        except UserError as error:
            refuse(str(error))


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table, with probabilities in percent."""
    most = max(len(row["classes"]) for row in rows)
    head = ("image", *(part for i in range(most) for part in (f"class {i + 1}", "%")))
    cells = [
        (
            printable(row["image"]),
            *(
                part
                for name, share in zip(row["classes"], row["probabilities"], strict=True)
                for part in (printable(name), f"{100 * share:.2f}")
            ),
        )
        for row in rows
    ]
    return format_table(head, cells)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV, a line for each image and class: image, rank, class, probability."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(("image", "rank", "class", "probability"))
    for row in rows:
        for rank, (name, share) in enumerate(zip(row["classes"], row["probabilities"], strict=True), 1):
            writer.writerow((row["image"], rank, name, share))
    return file.getvalue()


def as_json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as JSON, an object with image, classes and probabilities in each line."""
    return "".join(f"{json.dumps(row, allow_nan=False)}\n" for row in rows)


_FORMATS = {".csv": as_csv, ".jsonl": as_json_lines}
