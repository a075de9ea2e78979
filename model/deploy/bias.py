"""Biases that integer engines can round without changing a code.

An engine adds the bias to the integer sum of products, and rounds it to a multiple of a unit for that. The sum is an
integer, so that a code changes only where an integer lies between an old threshold and the moved one. Of the multiples
near the bias one is taken with which no code changes.
"""

from __future__ import annotations

import numpy as np

from model.deploy.codes import ActivationCodes, Array

STRETCHES = np.linspace(-1, 1, 81)  # tried on the scale, over the outermost thresholds' distance in sums


def roundable_bias(
    bias: Array, quantum: Array, most: Array, parts: int, codes: ActivationCodes
) -> tuple[Array, Array]:
    """Biases in multiples of `quantum * stretch / parts`, which give the same codes.

    Args:
        bias: float [out].
        quantum: float [out], the value of a sum of 1: the scale of the weight times that of the activation.
        most: int [out], the largest magnitude of a sum.
        parts: into how many an engine divides the quantum.
        codes: the quantizer behind the sum, with or without ReLU in between.

    Returns:
        The biases, float32 [out], and the stretch of the scales, float32 [out], 1 for nearly all. Channels for which
        there is neither keep what they have.

    Example:
        >>> import numpy as np
        >>> from model.deploy.bias import roundable_bias
        >>> from model.deploy.codes import ActivationCodes
        >>> codes = ActivationCodes(name="relu", levels=4, highest=3, step=1.0)
        >>> bias, stretch = roundable_bias(np.array([0.53]), np.array([0.5]), np.array([9]), 4, codes)
        >>> sums = np.arange(-9, 10)
        >>> np.array_equal(np.round(sums * 0.5 + 0.53).clip(0, 3), np.round(sums * 0.5 + bias).clip(0, 3))
        True
        >>> bias / 0.125, stretch
        (array([5.], dtype=float32), array([1.], dtype=float32))
    """
    assert codes.step is not None
    edges = (np.arange(codes.lowest + 1, codes.highest + 1) - 0.5) * codes.step
    found, stretches = np.array(bias, np.float64), np.ones(len(bias))
    for channel, (old, unit, largest) in enumerate(zip(found, quantum.astype(np.float64), most, strict=True)):
        before = (edges - old) / unit
        used = before[np.abs(before) <= largest + 1]
        distance = max(2.0, float(np.ptp(used))) if used.size else 2.0  # the scale changes by half at most
        for tried in (np.zeros(1), STRETCHES / distance):
            best = _nearest(old, unit * (1 + tried), edges, _last_below(before, largest), int(largest), parts)
            if best is not None:
                found[channel], stretches[channel] = best[0], best[1] / unit
                break
    return found.astype(np.float32), stretches.astype(np.float32)


def _last_below(places: Array, largest: int) -> Array:
    """The last sum, of -largest .. largest, below each threshold; -largest - 1 where all are above."""
    return np.clip(np.floor(places), -largest - 1, largest)


def _nearest(
    old: float, units: Array, thresholds: Array, before: Array, largest: int, parts: int
) -> tuple[float, float] | None:
    """The bias and the unit that change no code, the safest near the old ones; None where there are none."""
    steps = np.round(old / units * parts)[:, None] + np.arange(-parts, parts + 1)  # [units, tried]
    tried = steps * units[:, None] / parts
    after = (thresholds - tried[..., None]) / units[:, None, None]  # [units, tried, thresholds]
    same = (_last_below(after, largest) == before).all(axis=2)
    if not same.any():
        return None
    to_sum = np.where(np.abs(after) <= largest + 1, np.abs(after - np.round(after)), 0.5)
    margin = to_sum.min(axis=2, initial=0.5)  # to the sum at which a code would change
    score = np.minimum(margin, 0.25 / parts) - 1e-6 * np.abs(tried - old) / units[:, None]
    at = np.unravel_index(np.where(same, score, -1.0).argmax(), same.shape)
    return float(tried[at]), float(units[at[0]])
