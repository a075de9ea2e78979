"""Writes the files of an evaluation; `utils.report.confusion` reads those that the page shows."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from utils.report.calibration import BINS, Bin, calibration_bins, calibration_error
from utils.report.changes import HEADING, Change, as_csv, changes_text
from utils.report.confusion import CALIBRATION, CLASSES, EXAMPLES, MATRIX, PICTURES
from utils.report.predicted import Predicted, highest
from utils.report.run_report import write_text
from utils.report.sheet import SHOWN, Shown, draw_sheet
from utils.text import csv_text, json_lines

MOST = 20  # classes, above which there are no examples
PREDICTIONS, LINES, CHANGES = "predictions.csv", "predictions.jsonl", "changes.csv"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The outcome of an evaluation of N images.

    Attributes:
        classes: names of the classes.
        predicted: of the images, in the order of the set.
        names: of the images.
        mistakes: PNG files, in base64, of the worst mistakes by their place.
        changes: the same of images whose class is not the reference's.
        examples: "row,column" of the confusion matrix -> PNG files in base64.
    """

    classes: Sequence[str]
    predicted: Predicted
    names: Sequence[str]
    mistakes: Mapping[int, str]
    changes: Mapping[int, str]
    examples: Mapping[str, list[str]]

    def class_of(self, numbers: Tensor, i: int) -> str:
        """The name of the i-th class of int64 [N]."""
        return self.classes[int(numbers[i])]


def write(folder: Path, found: Evaluation) -> list[str]:
    """Write all files into the folder of a run, and remove those of an earlier evaluation that this one lacks.

    Returns lines about them for the log.
    """
    predicted, classes = found.predicted, found.classes
    _write_classes(folder, found)
    _write_predictions(folder, found)
    if len(classes) <= MOST:
        write_text(folder / EXAMPLES, json.dumps(found.examples) + "\n")
    else:
        (folder / EXAMPLES).unlink(missing_ok=True)

    right = predicted.called == predicted.true
    bins = calibration_bins(predicted.probabilities[:, 0].double().numpy(), right.numpy())
    head = [field.name for field in dataclasses.fields(Bin)]
    rows = [[f"{v:.6f}" if isinstance(v, float) else v for v in dataclasses.astuple(one)] for one in bins]
    write_text(folder / CALIBRATION, csv_text(head, rows))
    lines = [f"expected calibration error {100 * calibration_error(bins):.2f} % ({BINS} bins)"]

    numbers = (predicted.called != predicted.reference).nonzero()[:, 0].tolist()
    changes = {i: _change(found, i) for i in numbers if predicted.reference[i] >= 0}
    if bool((predicted.reference >= 0).any()):
        write_text(folder / CHANGES, as_csv(list(changes.values())))
        lines.append(f"{changes_text(list(changes.values()), len(predicted))}; see {folder / CHANGES}")
    else:
        (folder / CHANGES).unlink(missing_ok=True)

    mistakes = [
        Shown(
            image=found.names[i], title=found.class_of(predicted.true, i), picture=found.mistakes[i],
            caption=f"called {found.class_of(predicted.called, i)} {100 * predicted.probabilities[i, 0]:.1f} %",
        )
        for i in highest(predicted.mistakes, SHOWN)
    ]  # fmt: skip
    changed = [
        Shown(image=found.names[i], title=changes[i].true or "", caption=changes[i].caption, picture=found.changes[i])
        for i in highest(predicted.changes, SHOWN)
    ]  # fmt: skip
    pictures = {"mistakes": mistakes, "changes": changed}
    write_text(
        folder / PICTURES,
        json.dumps({kind: [dataclasses.asdict(one) for one in shown] for kind, shown in pictures.items()})
        + "\n",
    )
    draw_sheet(
        mistakes, folder / "mistakes.png", "Worst mistakes: the highest probabilities of a wrong class"
    )
    draw_sheet(changed, folder / "changes.png", HEADING)
    return lines


def _change(found: Evaluation, i: int) -> Change:
    predicted = found.predicted
    return Change(
        image=found.names[i], true=found.class_of(predicted.true, i), reference=found.class_of(predicted.reference, i),
        reference_probability=float(predicted.reference_probability[i]), called=found.class_of(predicted.called, i),
        probability=float(predicted.probabilities[i, 0]),
    )  # fmt: skip


def _write_classes(folder: Path, found: Evaluation) -> None:
    """Write accuracy and precision of each class, and the confusion matrix."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support  # takes a second

    true, called, classes = found.predicted.true.numpy(), found.predicted.called.numpy(), found.classes
    numbers = np.arange(len(classes))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A single label was found")  # of a network of one class
        matrix = confusion_matrix(true, called, labels=numbers)
    precision, recall, _, _ = precision_recall_fscore_support(
        true, called, labels=numbers, zero_division=np.nan,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    rows = [
        (name, count, _percent(one), _percent(other))
        for name, count, one, other in zip(
            classes, matrix.sum(axis=1), np.asarray(recall), np.asarray(precision), strict=True
        )
    ]
    write_text(folder / CLASSES, csv_text(("class", "images", "accuracy", "precision"), rows))
    rows = [(name, *row) for name, row in zip(classes, matrix.tolist(), strict=True)]
    write_text(folder / MATRIX, csv_text(("class", *classes), rows))


def _write_predictions(folder: Path, found: Evaluation) -> None:
    """Write a line for each image, as a table and as JSON."""
    predicted, classes = found.predicted, found.classes
    true, called = predicted.true.tolist(), predicted.classes.tolist()
    shares, own = predicted.probabilities.tolist(), predicted.own.tolist()
    head = ("image", "class", "called", "probability", "class_probability")
    table = [
        (name, classes[true[i]], classes[called[i][0]], f"{shares[i][0]:.6f}", f"{own[i]:.6f}")
        for i, name in enumerate(found.names)
    ]
    write_text(folder / PREDICTIONS, csv_text(head, table))
    rows = (
        {
            "image": name,
            "class": classes[true[i]],
            "classes": [classes[number] for number in called[i]],
            "probabilities": shares[i],
        }
        for i, name in enumerate(found.names)
    )
    write_text(folder / LINES, json_lines(rows))


def _percent(share: float) -> str:
    return "" if np.isnan(share) else f"{100 * share:.2f}"
