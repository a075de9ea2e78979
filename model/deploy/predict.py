"""The word predict of tools.py: classes of images, by the network of a checkpoint or of an exported file.

torch is imported where it is used, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.deploy import changed
from model.deploy.given import Given, given_images, numbers_of
from model.deploy.packages import needed
from utils.checkpoint.exported import NETWORK, kind_of
from utils.errors import UserError
from utils.processes.start import check_folder
from utils.report.changes import Change, changes_text
from utils.text import format_table, json_lines, printable, some_names
from utils.tools.options import Options, given_path, refuse_existing

if TYPE_CHECKING:
    from torch import Tensor

    from model.deploy.evaluated import Evaluated
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


def open_packed(options: Options) -> Predictor:
    """The network of a packed file."""
    needed("safetensors")
    from model.deploy.packed import read_checkpoint
    from model.load import trained_from

    path = given_path(options.old)
    trained = trained_from(read_checkpoint(path), path)
    return Predictor(logits=trained.network, transform=trained.transform, classes=trained.labels)


def open_program(options: Options) -> Predictor:
    """A program of `torch.export`."""
    from model.deploy import program

    path = given_path(options.old)
    network, texts = program.read(path)
    return _exported(path, "torch", network, texts)


def open_for_engine(options: Options) -> Predictor:
    """A file, or the file of a page's folder, in the first engine that reads it."""
    import torch

    from model.deploy.engines import engines_of, read_metadata

    path = given_path(options.old)
    if kind_of(path) == "web":
        path /= NETWORK
        if not path.is_file():
            raise UserError(
                f"{path.parent} is a folder without {NETWORK}; name a checkpoint, an exported file or a folder that "
                "export --to web has written"
            )
    engine = engines_of(path)[0]
    runner = engine.open(path)
    return _exported(
        path,
        engine.name,
        lambda images: torch.from_numpy(runner(images.contiguous().numpy())["logits"]),
        read_metadata(path),
    )


def _exported(
    path: Path, engine: str, run: Callable[[Tensor], Tensor], texts: Mapping[str, str]
) -> Predictor:
    """What predicts by an engine, with the texts of a file, `classes` and `images`."""
    from model.deploy.engines import reason
    from utils.data.transform import ImageTransform

    try:
        classes, images = (json.loads(texts[name]) for name in ("classes", "images"))
        if not (isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes)):
            raise ValueError("no list of names")
    except (KeyError, ValueError):
        raise UserError(
            f"{path} does not say what its classes and images are; export it anew from its checkpoint"
        ) from None

    def logits(images: Tensor) -> Tensor:
        try:
            return run(images)
        except Exception as error:  # each engine has exceptions of its own
            raise UserError(
                f"{path}: {engine} does not take images of {' x '.join(map(str, images.shape[1:]))}, which the file "
                f"asks for ({reason(error)}); export it anew from its checkpoint"
            ) from error

    return Predictor(
        logits=logits, transform=ImageTransform.from_dict(images, str(path)), classes=tuple(classes)
    )


OPENERS: dict[str, Callable[[Options], Predictor]] = {
    "c": open_for_engine,
    "coreml": open_for_engine,
    "executorch": open_for_engine,
    "litert": open_for_engine,
    "mnn": open_for_engine,
    "onnx": open_for_engine,
    "openvino": open_for_engine,
    "packed": open_packed,
    "program": open_program,
    "web": open_for_engine,
}
"""Format of an exported file -> what opens it; all other files are checkpoints."""


def open_network(options: Options) -> Predictor:
    """What predicts with --old."""
    path = given_path(options.old)
    opener = OPENERS.get(kind_of(path), open_checkpoint)
    if options.ema_weights and opener is not open_checkpoint:
        raise UserError(f"--ema_weights: {path} has one set of weights; leave it out, or give it to export")
    return opener(options)


def predict(options: Options) -> int:
    """Print the most probable classes of images, and of all images below folders, by the network of --old."""
    output, folder = options.output, None if options.to is None else Path(options.to)
    if output is not None:
        if output.suffix not in _FORMATS:
            raise UserError(f"--output {output}: end the file's name in {' or '.join(_FORMATS)}")
        if output.is_dir() or not output.parent.is_dir():
            raise UserError(f"--output {output}: name a file in a folder that exists")
        refuse_existing(options, output)
        if options.reference is not None:
            refuse_existing(options, output.with_suffix(".png"))
    if folder is not None:
        check_folder(folder, "to")
        refuse_existing(options, *(folder.iterdir() if folder.is_dir() else ()))
    given = given_images(options.images or ())
    predictor, reference = open_network(options), open_reference(options)
    if reference is not None and (other := {*predictor.classes} ^ {*reference.classes}):
        raise UserError(f"--reference {options.reference} has other classes: {some_names(sorted(other))}")
    evaluated = None if folder is None else _evaluated(predictor, given, folder)
    networks = [predictor] if reference is None else [predictor, reference]
    unreadable: list[str] = []
    rows: list[dict[str, Any]] = []
    changes: list[Change] = []
    for batch, images, logits in batches(networks, given, options.batch_size or BATCH, unreadable.append):
        found = [rows_of(batch, one, predictor.classes, options.topk or 5) for one in logits]
        rows += found[0]
        if reference is not None:
            changes += changed.changes_of(batch, found[0], found[1], predictor.classes)
        if evaluated is not None:
            evaluated.update(batch, images, logits[0], None if reference is None else logits[1])
    if not rows:
        raise UserError(unreadable[0])
    if folder is not None and evaluated is not None:
        for line in evaluated.write(folder):
            print(printable(line))
        print(printable(f"{folder}: {len(rows)} images"))
    if reference is not None and (output is not None or folder is None):
        _print_changes(options, predictor, changes, given, len(rows))
    elif output is not None:
        from utils.checkpoint import archive  # imports torch

        archive.write_atomic(output, _FORMATS[output.suffix](rows).encode("utf-8", "surrogateescape"))
        print(printable(f"{output}: {len(rows)} images"))
    elif folder is None:
        print(as_text(rows))
    for line in unreadable:
        print(f"tools.py: {line}", file=sys.stderr)
    return 1 if unreadable else 0


def _evaluated(predictor: Predictor, given: Sequence[Given], folder: Path) -> Evaluated:
    from model.deploy.evaluated import Evaluated  # imports torch

    numbers = numbers_of(given, predictor.classes, f"--to {folder}")
    return Evaluated(predictor.classes, numbers, predictor.transform)


def open_reference(options: Options) -> Predictor | None:
    """What predicts with --reference; None without one."""
    if options.reference is None:
        return None
    if options.topk is not None:
        raise UserError("--topk: beside a --reference the most probable class alone counts; leave it out")
    return open_network(dataclasses.replace(options, old=options.reference, ema_weights=False))


def _print_changes(
    options: Options, predictor: Predictor, changes: Sequence[Change], given: Sequence[Given], images: int
) -> None:
    """Print the images whose class is not the reference's, or write them, and a sheet of them."""
    output = options.output
    if output is not None:
        from utils.checkpoint import archive  # imports torch

        archive.write_atomic(
            output, changed.FORMATS[output.suffix](changes).encode("utf-8", "surrogateescape")
        )
        files = {one.name: one.file for one in given}
        changed.draw_changes(changes, files, predictor.transform, output.with_suffix(".png"))
    elif changes:
        print(changed.as_text(changes))
    print(changes_text(changes, images))


def batches(
    networks: Sequence[Predictor], given: Sequence[Given], size: int, refuse: Callable[[str], object]
) -> Iterator[tuple[list[Given], Tensor, list[Tensor]]]:
    """Run networks of the same classes on the images that can be read.

    Args:
        networks: one or more.
        given: the images.
        size: images that are computed together.
        refuse: gets a line about each image that cannot be read.

    Yields:
        Images; their tensors for the first network, float32 [N, C, H, W]; and the logits of each network in the order
        of the first one's classes, float32 [N, classes].
    """
    import torch

    from utils.report.progress import progress

    classes = networks[0].classes
    orders = [[network.classes.index(name) for name in classes] for network in networks]
    with progress(given, len(given), "images", True) as bar:
        readable = _readable([network.transform for network in networks], bar, refuse)
        while batch := list(itertools.islice(readable, size)):
            chosen = [one for one, _ in batch]
            logits: list[Tensor] = []
            inputs = [torch.stack(images) for images in zip(*(tensors for _, tensors in batch), strict=True)]
            for network, images, order in zip(networks, inputs, orders, strict=True):
                with torch.no_grad():
                    found = network.logits(images).float()
                _check_logits(found, chosen, network)
                logits.append(found if network.classes == classes else found[:, order])
            yield chosen, inputs[0], logits


def _check_logits(logits: Tensor, given: Sequence[Given], network: Predictor) -> None:
    if logits.shape != (len(given), len(network.classes)):
        raise UserError(
            f"the network puts out values of shape {tuple(logits.shape)} for {len(given)} images, and its "
            f"file names {len(network.classes)} classes; export it anew from its checkpoint"
        )
    if not logits.isfinite().all():
        raise UserError(f"the network puts out values that are not finite, of {given[0].name} for example")


def rows_of(
    given: Sequence[Given], logits: Tensor, classes: Sequence[str], topk: int
) -> list[dict[str, Any]]:
    """A row for each image: its name, and its most probable classes with their probabilities."""
    best = logits.softmax(1).topk(min(topk, len(classes)), dim=1)
    return [
        {
            "image": one.name,
            "classes": [classes[number] for number in numbers.tolist()],
            "probabilities": shares.tolist(),
        }
        for one, shares, numbers in zip(given, best.values, best.indices, strict=True)
    ]


def _readable(
    transforms: Sequence[ImageTransform], given: Iterable[Given], refuse: Callable[[str], object]
) -> Iterator[tuple[Given, list[Tensor]]]:
    for one in given:
        try:
            file = one.file()
            yield one, [transform(file, one.name) for transform in transforms]
        except OSError as error:  # of a set
            refuse(f"cannot read the image {one.name} ({error.strerror or error})")
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


_FORMATS = {".csv": as_csv, ".jsonl": json_lines}
