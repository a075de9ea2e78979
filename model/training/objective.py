"""The training loss: of the labels, of a teacher, and penalties on the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.training.oscillation import dampening, dampening_factor
from model.training.quantization_error import quantization_error
from model.training.teacher import Teacher
from utils.config.schema import LossConfig
from utils.step.loss import classification_loss, distillation_loss


class Objective:
    """The loss of a training: `(1 - a) * labels + a * teacher + quant_loss * error + dampen(t) * oscillation`.

    Args:
        config: which parts, and their factors.
        model: the network whose weights the penalties are on.
        teacher: None without distillation.
        total_steps: optimizer steps of the run, over which the dampening grows.
        class_weights: weight of each class in the loss of the labels; empty: all 1.
    """

    def __init__(
        self,
        config: LossConfig,
        model: nn.Module,
        teacher: Teacher | None,
        total_steps: int,
        class_weights: Sequence[float] = (),
    ) -> None:
        self.config = config
        self.teacher = teacher
        self._model = model
        self._total_steps = total_steps
        self._weights = torch.tensor(class_weights) if class_weights else None

    def __call__(self, logits: Tensor, target: Tensor, images: Tensor, step: int) -> Tensor:
        """The loss, float32 [].

        Args:
            logits: float32 [N, C].
            target: int64 [N], or float32 [N, C] of mixed images.
            images: [N, 3, H, W], for the teacher.
            step: optimizer steps done.
        """
        config = self.config
        if self._weights is not None and self._weights.device != logits.device:
            self._weights = self._weights.to(logits.device)  # once
        loss = classification_loss(
            logits, target, smoothing=config.label_smooth, gamma=config.focal_gamma, alpha=config.focal_alpha,
            weights=self._weights,
        )  # fmt: skip
        if self.teacher is not None and config.distill is not None:
            distill = config.distill
            theirs = distillation_loss(
                logits, self.teacher(images), temperature=distill.temperature, kind=distill.kind
            )
            loss = (1 - distill.alpha) * loss + distill.alpha * theirs
        if config.quant_loss > 0:
            loss = loss + config.quant_loss * quantization_error(self._model)
        if config.dampen > 0:
            factor = config.dampen * dampening_factor(step, self._total_steps)
            loss = loss + factor * dampening(self._model)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The teacher's fingerprint, which must be the same in a resumed run."""
        return {} if self.teacher is None else {"teacher": self.teacher.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise `UserError` when the resumed run had a different teacher."""
        if self.teacher is not None and "teacher" in state:
            self.teacher.check_same(state["teacher"])
