"""Calibration: whether the share of right predictions is what their probabilities say. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BINS = 15  # of equal width


@dataclass(frozen=True, kw_only=True)
class Bin:
    """The images whose most probable class has a probability above `low` and at most `high`.

    Attributes:
        low: share.
        high: share.
        images: their number, at least 1.
        accuracy: the share of them that are of that class.
        confidence: the mean of the probabilities.
    """

    low: float
    high: float
    images: int
    accuracy: float
    confidence: float


def calibration_bins(confidence: Any, right: Any) -> list[Bin]:
    """The bins that have images.

    Args:
        confidence: the probability of the most probable class, float [images], in [0, 1].
        right: whether the image is of that class, bool [images].
    """
    import numpy as np
    from sklearn.calibration import calibration_curve  # takes a second

    if not len(confidence):
        return []
    edges = np.linspace(0, 1, BINS + 1)
    counts = np.bincount(np.searchsorted(edges[1:-1], confidence), minlength=BINS)
    accuracies, confidences = calibration_curve(right, confidence, pos_label=1, n_bins=BINS)
    return [
        Bin(low=float(edges[i]), high=float(edges[i + 1]), images=int(counts[i]), accuracy=float(accuracy),
            confidence=float(mean))
        for i, accuracy, mean in zip(np.flatnonzero(counts), accuracies, confidences, strict=True)
    ]  # fmt: skip


def calibration_error(bins: Sequence[Bin]) -> float:
    """The expected calibration error, a share.

    sum_b n_b / n * |accuracy_b - confidence_b| over the bins b with n_b of the n images (Guo et al., arXiv 1706.04599,
    equation 3).

    Example:
        >>> from utils.report.calibration import calibration_bins, calibration_error
        >>> calibration_error(calibration_bins([0.75, 0.75, 0.75, 0.75], [True, True, True, False]))
        0.0
    """
    images = sum(one.images for one in bins)
    return sum(one.images * abs(one.accuracy - one.confidence) for one in bins) / max(images, 1)
