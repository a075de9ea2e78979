"""What an evaluation predicts, collected batch by batch, with a few of the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from utils.processes import distributed
from utils.report import evaluation_files
from utils.report.evaluation_files import MOST, Evaluation
from utils.report.predicted import Predicted, highest
from utils.report.sheet import SHOWN, SIDE, as_picture

PER_CELL = 3  # examples
CELL_SIDE = 48  # pixels of an example


@dataclass
class Outcome:
    """The predictions of a pass over images, and a few of the images.

    Args:
        classes: names of the classes in the order of the logits.
        mean: of the normalisation, per channel.
        std: likewise.

    Attributes:
        numbers: of the images in the set, in the order in which they came, int64 [images]; set after the pass.
    """

    classes: Sequence[str]
    mean: Sequence[float]
    std: Sequence[float]
    numbers: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    _parts: list[Predicted] = field(default_factory=list)
    _examples: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    _mistakes: dict[int, tuple[float, str]] = field(
        default_factory=dict
    )  # place in the pass -> score, picture
    _changes: dict[int, tuple[float, str]] = field(default_factory=dict)

    def update(self, images: Tensor, target: Tensor, output: Tensor, reference: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            images: as the network gets them, [N, C, H, W].
            target: classes, int64 [N].
            output: logits, float [N, classes].
            reference: those of another network for the same images.
        """
        part = Predicted.of(target, output, reference)
        first = sum(map(len, self._parts))
        self._parts.append(part)
        for kept, scores in ((self._mistakes, part.mistakes), (self._changes, part.changes)):
            least = min((score for score, _ in kept.values()), default=0) if len(kept) >= SHOWN else 0
            for i in highest(scores, SHOWN):
                if float(scores[i]) > least:
                    kept[first + i] = float(scores[i]), self._picture(images[i], SIDE)
            for place in sorted(kept, key=lambda place: -kept[place][0])[SHOWN:]:  # equal ones in their order
                del kept[place]
        if len(self.classes) > MOST:
            return
        for i, cell in enumerate(zip(part.true.tolist(), part.called.tolist(), strict=True)):
            known = self._examples.setdefault(cell, [])
            if len(known) < PER_CELL:
                known.append(self._picture(images[i], CELL_SIDE))

    def _picture(self, image: Tensor, side: int) -> str:
        """A PNG of an image with its normalisation undone, at most `side` pixels high and wide, as text."""
        from PIL import Image

        shape = (len(self.mean), 1, 1)
        mean, std = (torch.tensor(list(values)).view(shape) for values in (self.mean, self.std))
        pixels = ((image.detach().cpu().float() * std + mean) * 255).round().clamp(0, 255).byte()
        picture = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
        return as_picture(picture, side)

    def write(self, folder: Path, *, first: bool, name: Callable[[int], str] = str) -> list[str]:
        """Write the files of an evaluation into the folder of a run; returns lines about them for the log.

        All processes take part, and the `first` one writes the images of all. Of several processes, examples of cells
        are others than those of one.

        Args:
            folder: of the run.
            first: whether this process writes.
            name: the name of an image, by its number in the set.
        """
        pictures = [
            {int(self.numbers[place]): picture for place, (_, picture) in kept.items()}
            for kept in (self._mistakes, self._changes)
        ]
        found = distributed.gathered((self._parts, self.numbers, pictures, self._examples))
        if not first:
            return []
        examples: dict[str, list[str]] = {}
        for *_, one in found:
            for (row, column), cell in one.items():
                known = examples.setdefault(f"{row},{column}", [])
                known += cell[: PER_CELL - len(known)]
        numbers = torch.cat([one for _, one, *_ in found])
        order = numbers.argsort()
        merged = [{k: v for _, _, kinds, _ in found for k, v in kinds[which].items()} for which in (0, 1)]
        places = numbers[order].tolist()
        return evaluation_files.write(
            folder,
            Evaluation(
                classes=self.classes,
                predicted=Predicted.joined([part for parts, *_ in found for part in parts])[order],
                names=[name(number) for number in places],
                mistakes={i: merged[0][number] for i, number in enumerate(places) if number in merged[0]},
                changes={i: merged[1][number] for i, number in enumerate(places) if number in merged[1]},
                examples=examples,
            ),
        )
