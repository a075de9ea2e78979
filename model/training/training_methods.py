"""The training methods of a run: its loss, averaged weights and frozen weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """The training methods that act in every step; each does nothing unless asked for.

    Attributes:
        objective: the loss.
        average: averaged weights.
        freezing: of weights that oscillate.
    """

    objective: Objective
    average: WeightAverage
    freezing: Freezing

    def after_step(self, step: int, precision: Precision, model: nn.Module) -> None:
        """Freeze and average weights after optimizer step `step` (from 0)."""
        if self.freezing.enabled or self.average.enabled:
            weights = precision.weights(model)
            self.freezing.after_step(step, weights)
            self.average.after_step(weights)

    def state_dict(self) -> dict[str, Any]:
        """Their state for a resumed run."""
        return {
            "objective": self.objective.state_dict(),
            "average": self.average.state_dict(),
            "freezing": self.freezing.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Continue from a `state_dict()`; an empty one is a fresh start.

        Raises:
            UserError: it does not fit the network, or had a different teacher.
        """
        self.objective.load_state_dict(state.get("objective", {}))
        self.average.load_state_dict(state.get("average", {}), model)
        self.freezing.load_state_dict(state.get("freezing", {}))


def build_training_methods(
    config: Config,
    model: nn.Module,
    teacher: Teacher | None,
    total_steps: int,
    class_weights: Sequence[float] = (),
) -> TrainingMethods:
    """The methods that the options ask for, for a run of `total_steps` optimizer steps."""
    weights = config.weights
    return TrainingMethods(
        objective=Objective(config.loss, model, teacher, total_steps, class_weights),
        average=WeightAverage(weights.ema_decay),
        freezing=Freezing(model, weights.freeze_threshold, weights.freeze_momentum, total_steps),
    )
