"""What an evaluation predicts: written as accuracy of each class, confusion matrix and examples of its cells."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.processes import distributed
from utils.report.confusion import CLASSES, EXAMPLES, MATRIX
from utils.report.run_report import write_text

MOST = 20  # classes, above which there are no examples
PER_CELL = 3  # examples
SIDE = 48  # pixels of an example


@dataclass
class Outcome:
    """The predictions of a pass over images, and a few of the images.

    Args:
        classes: names of the classes in the order of the logits.
        mean: of the normalisation, per channel.
        std: likewise.
    """

    classes: Sequence[str]
    mean: Sequence[float]
    std: Sequence[float]
    _pairs: list[Tensor] = field(default_factory=list)
    _examples: dict[tuple[int, int], list[str]] = field(default_factory=dict)

    def update(self, images: Tensor, target: Tensor, output: Tensor) -> None:
        """Add a batch.

        Args:
            images: as the network gets them, [N, C, H, W].
            target: classes, int64 [N].
            output: logits, float [N, classes].
        """
        pairs = torch.stack([target, output.argmax(1)]).cpu()
        self._pairs.append(pairs)
        if len(self.classes) > MOST:
            return
        for i, (true, guess) in enumerate(pairs.T.tolist()):
            cell = self._examples.setdefault((true, guess), [])
            if len(cell) < PER_CELL:
                cell.append(self._picture(images[i]))

    def _picture(self, image: Tensor) -> str:
        """A PNG of an image with its normalisation undone, as text."""
        from PIL import Image

        shape = (len(self.mean), 1, 1)
        mean, std = (torch.tensor(list(values)).view(shape) for values in (self.mean, self.std))
        pixels = ((image.detach().cpu().float() * std + mean) * 255).round().clamp(0, 255).byte()
        picture = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
        picture.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        picture.save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode("ascii")

    def write(self, folder: Path, *, first: bool) -> None:
        """Write `classes.csv`, `confusion.csv` and, of few classes, `examples.json`.

        All processes take part, and the `first` one writes.
        """
        from sklearn.metrics import confusion_matrix, precision_recall_fscore_support  # takes a second

        true, guess = torch.cat([*self._pairs, torch.zeros(2, 0, dtype=torch.int64)], dim=1)
        numbers = np.arange(len(self.classes))
        own = (
            confusion_matrix(true, guess, labels=numbers) if len(true) else np.zeros((len(numbers),) * 2, int)
        )
        matrix = distributed.summed(torch.from_numpy(own)).numpy()
        examples: dict[str, list[str]] = {}
        for part in distributed.gathered(self._examples):
            for (row, column), pictures in part.items():
                known = examples.setdefault(f"{row},{column}", [])
                known += pictures[: PER_CELL - len(known)]
        if not first:
            return
        rows, columns = (places.reshape(-1) for places in np.indices(matrix.shape))
        precision, recall, _, _ = precision_recall_fscore_support(
            rows, columns, labels=numbers, sample_weight=matrix.reshape(-1),
            zero_division=np.nan,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        counts = matrix.sum(axis=1)
        _write_csv(
            folder / CLASSES,
            ("class", "images", "accuracy", "precision"),
            [
                (name, count, _percent(one), _percent(other))
                for name, count, one, other in zip(
                    self.classes, counts, np.asarray(recall), np.asarray(precision), strict=True
                )
            ],
        )
        head = ("class", *self.classes)
        _write_csv(
            folder / MATRIX,
            head,
            [(name, *row) for name, row in zip(self.classes, matrix.tolist(), strict=True)],
        )
        if len(self.classes) <= MOST:
            write_text(folder / EXAMPLES, json.dumps(examples) + "\n")
        else:
            (folder / EXAMPLES).unlink(missing_ok=True)


def _percent(share: float) -> str:
    return "" if np.isnan(share) else f"{100 * share:.2f}"


def _write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    write_text(path, file.getvalue())
