"""An exponential moving average of the weights (`--ema_decay`), evaluated beside the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from utils.errors import UserError


class WeightAverage:
    """Averages the weights after each step of the optimizer: average = d * average + (1 - d) * weights.

    d = min(decay, (1 + t) / (10 + t)), where t counts the steps: the smaller decay of the first ones lets the start be
    forgotten. All floating values of the network's state are averaged, also running statistics of norms and learned
    ranges; counters stay the network's.
    Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992, in the
    exponential form that Tarvainen and Valpola, arXiv 1703.01780, use.

    Args:
        decay: from 0, which averages nothing, to below 1.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._steps = 0
        self._weights: dict[str, Tensor] = {}

    @property
    def enabled(self) -> bool:
        """Whether anything is averaged."""
        return self._decay > 0

    @property
    def exists(self) -> bool:
        """Whether there is an average to evaluate."""
        return bool(self._weights)

    @torch.no_grad()
    def after_step(self, weights: Mapping[str, Tensor]) -> None:
        """Add the network's state after a step: float32 values by name; others are left out."""
        if not self.enabled:
            return
        floats = {name: value for name, value in weights.items() if value.is_floating_point()}
        if not self._weights:
            self._weights = {name: value.detach().float().clone() for name, value in floats.items()}
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        current = [floats[name].detach().float() for name in self._weights]
        get_ema_multi_avg_fn(decay)(list(self._weights.values()), current, self._steps)
        self._steps += 1

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give `model` the averaged values, in its own dtypes, and restore its values at the end."""
        state = model.state_dict()
        before = {name: value.clone() for name, value in state.items()}
        try:
            with torch.no_grad():
                for name, value in self._weights.items():
                    state[name].copy_(value)
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    state[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The state for a resumed run."""
        return {"steps": self._steps, "weights": dict(self._weights)} if self._weights else {}

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Continue from a `state_dict()` of a network like `model`; an empty one is a fresh start.

        Raises:
            UserError: it belongs to a different network.
        """
        if not state:
            return
        own = model.state_dict()
        for name, value in state["weights"].items():
            if name not in own or own[name].shape != value.shape:
                raise UserError(f"the checkpoint's averaged weights do not fit the network: {name}")
        self._steps = state["steps"]
        self._weights = {
            name: value.to(own[name].device, copy=True) for name, value in state["weights"].items()
        }
