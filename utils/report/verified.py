"""Exported files beside their checkpoint: the record of `tools.py --keyword verify`, as table and as JSON file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.checkpoint.exported import NETWORK
from utils.errors import UserError
from utils.text import format_table, printable

FILE = "verified.json"  # in the folder of a run
HEAD = ("file", "engine", "bits w/a", "codes", "logits", "same", "top-1", "KiB", "integer", "ms", "float")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A file in an engine beside the checkpoint in torch.

    Attributes:
        file: the exported file.
        engine: the engine and its optimisation.
        bits: of weights and of activations, as in the training's summary.
        images: how many were compared.
        codes: share of different codes of each quantizer, by its name, in the order of the network.
        optimiser: share of codes that the engine's default optimisation makes others than the least does, likewise;
            empty where there is one optimisation.
        logits: largest difference of a logit, over the largest logit; None where there is none.
        same: share of images with the same most probable class.
        top1: percent; `reference` is that of the checkpoint.
        reference: see `top1`.
        bytes: of the file and those beside it.
        integer: convolutions and linear layers that compute with integers, of `layers`; None: the engine does not say.
        layers: see `integer`.
        milliseconds: median of one image with `threads` threads.
        float_milliseconds: of the float network in between.
        threads: of both.
        faults: what is wrong; empty where all is well.
    """

    file: str
    engine: str
    bits: str
    images: int
    codes: dict[str, float]
    optimiser: dict[str, float]
    logits: float | None
    same: float
    top1: float
    reference: float
    bytes: int
    integer: int | None
    layers: int
    milliseconds: float
    float_milliseconds: float
    threads: int
    faults: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the file, and of the folder of a page."""
        path = Path(self.file)
        return printable("/".join(path.parts[-2:]) if path.name == NETWORK else path.name)

    @property
    def values(self) -> tuple[float | str, ...]:
        """The numbers behind the cells from `codes` on, by which a page sorts them; empty text where there is none."""
        return (
            max(self.codes.values(), default=""),
            "" if self.logits is None else self.logits,
            self.same,
            self.top1,
            self.bytes,
            "" if self.integer is None else self.integer,
            self.milliseconds,
            self.float_milliseconds,
        )

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of a table, see `HEAD`."""
        return (
            self.name,
            self.engine,
            self.bits,
            f"{100 * max(self.codes.values()):.3f} %" if self.codes else "-",
            "-" if self.logits is None else f"{self.logits:.1e}",
            f"{100 * self.same:.2f} %",
            f"{self.top1:.2f}",
            f"{self.bytes / 1024:.1f}",
            f"{'?' if self.integer is None else self.integer} of {self.layers}",
            f"{self.milliseconds:.2f}",
            f"{self.float_milliseconds:.2f}",
        )


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What verify has found.

    Attributes:
        checkpoint: the file that was compared with.
        cpu: the processor.
        comparisons: at least one.
    """

    checkpoint: str
    cpu: str
    comparisons: tuple[Comparison, ...]

    @property
    def faults(self) -> list[str]:
        """A line for each fault."""
        return [
            printable(f"{item.file} ({item.engine}): {fault}")
            for item in self.comparisons
            for fault in item.faults
        ]

    @property
    def notes(self) -> list[str]:
        """What a reader of the table must know."""
        first = self.comparisons[0]
        lines = [
            f"torch: top-1 {first.reference:.2f} on {first.images} images; codes: the largest share of different ones "
            f"in a layer; ms and float: median of one image, {first.threads} thread{'s' * (first.threads != 1)}, "
            f"{self.cpu}"
        ]
        pages = dict.fromkeys(item.name for item in self.comparisons if Path(item.file).name == NETWORK)
        if pages:
            lines.append(f"{', '.join(pages)}: the ONNX file of a page, run here and not in a browser")
        return lines

    def as_text(self) -> str:
        """A table, and what must be known of it."""
        return "\n".join([format_table(HEAD, [item.cells for item in self.comparisons]), *self.notes])

    def as_json(self) -> str:
        """The text of a JSON file, for `read`."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)


def read(folder: Path) -> Verified | None:
    """The record in the folder of a run; None without one.

    Raises:
        UserError: it is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        comparisons = tuple(_comparison(entry) for entry in found["comparisons"])
        record = Verified(
            checkpoint=_checked(found["checkpoint"], str),
            cpu=_checked(found["cpu"], str),
            comparisons=comparisons,
        )
        if not comparisons:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: verify again, or remove it") from error
    return record


_TYPES: dict[str, Any] = {
    "file": str, "engine": str, "bits": str, "images": int, "codes": dict, "optimiser": dict,
    "logits": (int, float, type(None)), "same": (int, float), "top1": (int, float), "reference": (int, float),
    "bytes": int, "integer": (int, type(None)), "layers": int, "milliseconds": (int, float),
    "float_milliseconds": (int, float), "threads": int, "faults": list,
}  # fmt: skip


def _comparison(entry: dict[str, Any]) -> Comparison:
    for name, kind in _TYPES.items():
        _checked(entry[name], kind)
    for share in (*entry["codes"].values(), *entry["optimiser"].values()):
        _checked(share, (int, float))
    faults = tuple(_checked(fault, str) for fault in entry["faults"])
    fields: dict[str, Any] = {**entry, "faults": faults}
    return Comparison(**fields)


def _checked(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError
    return value
