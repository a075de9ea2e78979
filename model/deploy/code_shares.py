"""Whether exported files give the codes of the checkpoint: the share of different ones in each quantizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from model.deploy.codes import Array
from model.deploy.engines import Runner, read_metadata
from model.deploy.sums import METADATA
from model.deploy.torch_engine import activations, kept_values
from utils.checkpoint.exported import kind_of

TIES = 0.01  # share of the codes of a layer that rounding may change
APART = 1e-3  # of a tensor's largest value: levels that are farther apart are different ones
SUMS = 1 / 256  # what residual sums in 8 bits count for: the share of other codes that would disturb as much
CHUNK = 32  # images that are compared together


class CodeShares:
    """Compares the values of quantizers of activations, batch by batch.

    Args:
        network: the checkpoint's, in evaluation mode.
        runners: return the quantized tensors.
        basic: the place of the runner of the same file with the engine's least optimisation, or None, of each.

    Attributes:
        names: the quantizers in the order in which the network runs them.
    """

    def __init__(self, network: nn.Module, runners: Sequence[Runner], basic: Sequence[int | None]) -> None:
        self.names: list[str] = []
        self._network, self._runners, self._basic = network, runners, basic
        self._torch: list[dict[str, Array]] = [{} for _ in runners]  # of each quantizer: other codes, and all
        self._own: list[dict[str, Array]] = [{} for _ in runners]

    def update(self, images: Array) -> None:
        """Compare the codes of images, float32 [N, channels, height, width] and normalised; N may be 0."""
        watched = tuple(name for name, _ in activations(self._network))
        for start in range(0, len(images), CHUNK):
            chunk = images[start : start + CHUNK]
            with torch.no_grad(), kept_values(self._network, watched) as values:
                self._network(torch.from_numpy(chunk))
            self.names = list(values)
            found = [runner(chunk) for runner in self._runners]
            for mine, own, tensors, place in zip(self._torch, self._own, found, self._basic, strict=True):
                _count(mine, tensors, values)
                if place is not None:
                    _count(own, tensors, {name: found[place].get(name) for name in values})

    def codes(self, runner: int) -> dict[str, float]:
        """The shares of a runner's codes that are not torch's."""
        return self._shares(self._torch[runner])

    def optimiser(self, runner: int) -> dict[str, float]:
        """The shares of a runner's codes that are not those of the least optimisation; empty where there is none."""
        return self._shares(self._own[runner])

    def _shares(self, counts: dict[str, Array]) -> dict[str, float]:
        return {name: float(counts[name][0] / counts[name][1]) for name in self.names if name in counts}


def _count(counts: dict[str, Array], found: dict[str, Array], wanted: Mapping[str, Array | None]) -> None:
    for name, value in wanted.items():
        if name in found and value is not None:
            value = unpadded(value, found[name].shape)
            apart = ~(np.abs(found[name] - value) <= APART * np.abs(value).max())  # NaN is apart, too
            counts[name] = counts.get(name, np.zeros(2)) + np.array([apart.sum(), apart.size])


def unpadded(value: Array, shape: Sequence[int]) -> Array:
    """The middle of an array [N, channels, height, width] where a tensor of a file has a smaller shape: no padding.

    Files may pad behind a quantizer where torch pads in front of it.

    Example:
        >>> import numpy as np
        >>> from model.deploy.code_shares import unpadded
        >>> unpadded(np.arange(9).reshape(1, 1, 3, 3), (1, 1, 1, 3))
        array([[[[3, 4, 5]]]])
    """
    if value.ndim != 4 or len(shape) != 4 or any(value.shape[i] < shape[i] for i in range(4)):
        return value
    top, left = ((value.shape[i] - shape[i]) // 2 for i in (2, 3))
    return value[:, :, top : top + shape[2], left : left + shape[3]]


def has_integer_sums(path: Path) -> bool:
    """Whether a file was exported with residual sums in 8 bits."""
    return kind_of(path) in ("onnx", "openvino") and read_metadata(path).items() >= METADATA.items()


def faults_of_codes(codes: dict[str, float], names: Sequence[str], *, sums: bool = False) -> list[str]:
    """What is wrong with the codes of a file, in the order of the network's quantizers `names`.

    Codes that are others disturb the sums behind them like noise, whose deviation grows with the square root of their
    share: it limits the shares of later layers. Sums in 8 bits disturb, too.
    """
    faults, largest = [], SUMS if sums else 0.0
    for name in names:
        if name not in codes:
            faults.append(f"it has no {name}, a quantizer of the checkpoint")
        elif codes[name] > max(TIES, largest**0.5):
            before = f"at most {100 * largest:.3f} % of a layer's before it" if largest else "none before it"
            before = "8-bit sums alone before it" if sums and largest == SUMS else before
            faults.append(f"{100 * codes[name]:.1f} % of the codes of {name} are others, and {before}")
        largest = max(largest, codes.get(name, 0.0))
    return faults


def faults_of_optimiser(codes: dict[str, float]) -> list[str]:
    """What is wrong with codes that an engine's optimisation makes others, by the same rule."""
    return [f"by its optimiser {fault}" for fault in faults_of_codes(codes, list(codes))]
