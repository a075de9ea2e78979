"""Images that two networks put into different classes, such as a quantized one and the one in full precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from utils.text import counted, csv_text

HEAD: tuple[str, ...] = (
    "image",
    "class",
    "reference",
    "reference_probability",
    "called",
    "probability",
    "change",
)
KINDS = ("right to wrong", "wrong to right", "wrong to other wrong")
HEADING = "Changed classes, the reference's highest probabilities first"  # of a sheet
UNKNOWN = "class not known"


@dataclass(frozen=True, kw_only=True)
class Change:
    """An image and its class by both networks.

    Attributes:
        image: its name.
        true: its class; None where that is not known.
        reference: the class by the reference.
        reference_probability: that the reference gives this class.
        called: the class by the other network.
        probability: that this one gives its class.
    """

    image: str
    true: str | None
    reference: str
    reference_probability: float
    called: str
    probability: float

    @property
    def kind(self) -> str:
        """One of `KINDS`, or `UNKNOWN`."""
        if self.true is None:
            return UNKNOWN
        if self.reference == self.true:
            return KINDS[0]
        return KINDS[1] if self.called == self.true else KINDS[2]

    @property
    def caption(self) -> str:
        """What became of it, for below its picture."""
        before = f"{self.reference} {100 * self.reference_probability:.1f} %"
        return f"{before} became {self.called} {100 * self.probability:.1f} %"

    @property
    def row(self) -> dict[str, str | float | None]:
        """The values of `HEAD`."""
        values = (
            self.image, self.true, self.reference, self.reference_probability, self.called, self.probability, self.kind,
        )  # fmt: skip
        return dict(zip(HEAD, values, strict=True))


def as_csv(changes: Sequence[Change]) -> str:
    """A line for each image; the class is empty where it is not known."""
    return csv_text(
        HEAD,
        [
            [f"{value:.6f}" if isinstance(value, float) else value for value in change.row.values()]
            for change in changes
        ],
    )


def changes_text(changes: Sequence[Change], images: int) -> str:
    """How many of so many images changed their class, and how."""
    kinds = Counter(change.kind for change in changes)
    listed = [f"{kinds[kind]} {kind}" for kind in (*KINDS, UNKNOWN) if kinds[kind] or kind != UNKNOWN]
    return f"{len(changes)} of {counted(images, 'image')} changed the class of the reference: {', '.join(listed)}"
