"""Oscillating weights, dampened or frozen.

Near the end of training a weight close to a threshold may jump between two levels in every few steps, since each
level's gradient points to the other. Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware
Training", arXiv 2203.11086.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.layers.quantized import quantized_layers, quantized_weights
from model.quantizers.numbered import numbered
from utils.errors import UserError


def dampening(model: nn.Module) -> Tensor:
    """The sum over quantized weights of (q - clip(w))^2, with q the level of w, a constant; float32 [] (section 4.2).

    Gradient 2 * (w - q) for weights within the range, 0 for those beyond its ends, which pulls a weight to the
    middle of the interval that rounds to its level. A layer in its warm-up, when levels mean nothing, is not counted.
    """
    total = None
    for _, layer, quantizer in quantized_weights(model):
        weight = layer.full_weight().float()
        numbers, level_of = numbered(quantizer, weight)
        level = level_of(numbers)
        last = quantizer.levels - 1
        clipped = ((numbers == last) & (weight > level)) | ((numbers == 0) & (weight < level))
        part = (weight - level).masked_fill(clipped, 0.0).square().sum() * quantizer.warmed_up().squeeze()
        total = part if total is None else total + part
    return torch.zeros(()) if total is None else total


def dampening_factor(step: int, total_steps: int) -> float:
    """Rise from 0 at the first step to 1 at the last along a cosine (section 4.2): (1 - cos(pi * t / T)) / 2."""
    return (1 - math.cos(math.pi * step / max(total_steps - 1, 1))) / 2


class Freezing:
    """Iterative weight freezing (section 4.3): a weight that oscillates too often stays at its mean level.

    A weight oscillates in a step when its level number changes in the direction opposite to its last change. With
    f the exponential mean of these oscillations (momentum m) and n that of the level number, a weight with
    f > threshold is set to the level round(n) and stays there, whatever the optimizer does to it. The threshold
    moves from the first to the second of two values along a cosine. A layer starts anew when a policy changes its
    levels or turns its quantizer off.

    Args:
        model: the network whose quantized weights are tracked.
        threshold: one or two frequencies, oscillations per step; empty: nothing is frozen.
        momentum: m.
        total_steps: optimizer steps of the run.

    Raises:
        UserError: weights are to be frozen in a network with a layer that computes its weight from a parameter.
    """

    def __init__(
        self, model: nn.Module, threshold: Sequence[float], momentum: float, total_steps: int
    ) -> None:
        self._model = model
        self._threshold, self._momentum, self._total_steps = tuple(threshold), momentum, total_steps
        self._tracked: dict[str, dict[str, Tensor]] = {}
        computed = [name for name, layer in quantized_layers(model) if layer.computes_weight()]
        if computed and self.enabled:
            raise UserError(
                f"--freeze_threshold: {computed[0]} computes its weight from its parameter in every step, so that no "
                "weight of it can be frozen: leave it out, or choose another network"
            )

    @property
    def enabled(self) -> bool:
        """Whether weights are frozen at all."""
        return bool(self._threshold)

    def threshold(self, step: int) -> float:
        """The threshold after `step` steps."""
        first, last = self._threshold[0], self._threshold[-1]
        return last + (first - last) * (1 - dampening_factor(step, self._total_steps))

    @torch.no_grad()
    def after_step(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Track the weights after optimizer step `step` (from 0), freeze some, and reset frozen ones to their level.

        Args:
            step: as the schedule counts.
            weights: the float32 weights that the optimizer updates, by the names of the network's state; they
                and the network's own are changed, without waiting for the device.
        """
        if not self.enabled:
            return
        layers = list(quantized_weights(self._model))
        for name in self._tracked.keys() - {name for name, _, _ in layers}:  # turned off by a policy
            del self._tracked[name]
        for name, layer, quantizer in layers:
            weight = weights[layer.weight_entry(name)]
            numbers, level_of = numbered(quantizer, weight)
            numbers = numbers.to(torch.int32)
            grid = [quantizer.levels, int(quantizer.config.half_range)]
            state = self._tracked.get(name)
            if state is None or state["grid"].tolist() != grid:
                self._tracked[name] = self._start(numbers, grid)
                continue
            changed = (numbers - state["numbers"]).sign()
            moved = changed != 0
            oscillates = moved & (changed == -state["direction"]) & quantizer.warmed_up()
            state["frequency"].lerp_(oscillates.float(), self._momentum)
            state["mean"].lerp_(numbers.float(), self._momentum)
            state["direction"].copy_(torch.where(moved, changed, state["direction"]))
            newly = (state["frequency"] > self.threshold(step)) & ~state["frozen"]
            kept = torch.where(newly, state["mean"].round().to(torch.int32), state["kept"])
            state["kept"].copy_(kept)
            state["frozen"] |= newly
            state["numbers"].copy_(torch.where(state["frozen"], kept, numbers))
            weight.copy_(torch.where(state["frozen"], level_of(kept), weight))
            if layer.weight.data_ptr() != weight.data_ptr():  # the network computes with a half copy
                layer.weight.copy_(weight)

    @staticmethod
    def _start(numbers: Tensor, grid: list[int]) -> dict[str, Tensor]:
        """The state that tracks a layer's weight: int32, float32 or bool of its shape; `grid` is on the CPU."""
        return {
            "grid": torch.tensor(grid),
            "numbers": numbers.clone(),
            "direction": torch.zeros_like(numbers),
            "frequency": torch.zeros_like(numbers, dtype=torch.float32),
            "mean": numbers.float(),
            "kept": torch.zeros_like(numbers),
            "frozen": torch.zeros_like(numbers, dtype=torch.bool),
        }

    def share(self) -> float:
        """Share of the quantized weights that is frozen; waits for the device."""
        masks = [state["frozen"] for state in self._tracked.values()]
        frozen = sum(int(mask.sum()) for mask in masks)
        return frozen / max(sum(mask.numel() for mask in masks), 1)

    def state_dict(self) -> dict[str, Any]:
        """The state for a resumed run, tensors by layer."""
        return {name: dict(state) for name, state in self._tracked.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`; an empty one is a fresh start.

        Raises:
            UserError: it belongs to a different network.
        """
        if not self.enabled:
            return
        layers = dict(quantized_layers(self._model))
        for name, tensors in state.items():
            weight = layers[name].weight if name in layers else None
            if weight is None or tensors["numbers"].shape != weight.shape:
                raise UserError(f"the checkpoint's frozen weights of {name} do not fit the network")
            self._tracked[name] = {
                key: value.clone() if key == "grid" else value.to(weight.device, copy=True)
                for key, value in tensors.items()
            }
