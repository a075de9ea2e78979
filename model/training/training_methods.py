"""The methods of training that a run is put together from: its loss, averaged weights, frozen weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from model.training.objective import Objective
from model.training.oscillation import Freezing
from model.training.teacher import Teacher
from utils.config.schema import Config
from utils.step.average import WeightAverage
from utils.step.precision import Precision


@dataclass(frozen=True, kw_only=True)
class TrainingMethods:
    """The methods of training that have a part in every step; each does nothing when it is not asked for.

    Attributes:
        objective: the loss.
        average: averaged weights.
        freezing: of weights that oscillate.
    """

    objective: Objective
    average: WeightAverage
    freezing: Freezing

    def after_step(self, step: int, precision: Precision, model: nn.Module) -> None:
        """What follows step `step` (from 0) of the optimizer."""
        if self.freezing.enabled or self.average.enabled:
            weights = precision.weights(model)
            self.freezing.after_step(step, weights)
            self.average.after_step(weights)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of them."""
        return {
            "objective": self.objective.state_dict(),
            "average": self.average.state_dict(),
            "freezing": self.freezing.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Go on from a `state_dict()`; an empty one is a start.

        Raises:
            UserError: it does not fit the network, or another teacher's.
        """
        self.objective.load_state_dict(state.get("objective", {}))
        self.average.load_state_dict(state.get("average", {}), model)
        self.freezing.load_state_dict(state.get("freezing", {}))


def build_training_methods(
    config: Config, model: nn.Module, teacher: Teacher | None, total_steps: int
) -> TrainingMethods:
    """The methods that the options ask for, for a run of `total_steps` optimizer steps."""
    weights = config.weights
    return TrainingMethods(
        objective=Objective(config.loss, model, teacher, total_steps),
        average=WeightAverage(weights.ema_decay),
        freezing=Freezing(model, weights.freeze_threshold, weights.freeze_momentum, total_steps),
    )
