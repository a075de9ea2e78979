"""What a training minimises: the sum of its parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.training.objective import Objective
from model.training.oscillation import dampening
from model.training.quantization_error import quantization_error
from tests.model.training.quantized_network import network
from tests.utils.step.scores import TARGET, logits, mixture
from utils.config.schema import DistillConfig, LossConfig
from utils.step.loss import classification_loss, distillation_loss


class Fixed:
    """A teacher that always says the same."""

    def __call__(self, images: Tensor) -> Tensor:
        return mixture()


def objective(config: LossConfig, model: nn.Module | None = None, teacher: object = None) -> Objective:
    return Objective(config, model or nn.Identity(), teacher, total_steps=11)  # type: ignore[arg-type]


def test_the_sum_of_the_parts() -> None:
    """Each part with its factor; the dampening grows from nothing."""
    model, images = network(), torch.zeros(6, 3, 8, 8)
    distill = DistillConfig(alpha=0.25, temperature=2.0)
    config = LossConfig(label_smooth=0.1, distill=distill, quant_loss=0.5, dampen=0.3)
    both = objective(config, model, Fixed())
    labels = classification_loss(logits(), TARGET, smoothing=0.1)
    teacher = distillation_loss(logits(), mixture(), temperature=2.0, kind="kl")
    for step, factor in ((0, 0.0), (5, 0.5), (10, 1.0)):
        wanted = (
            0.75 * labels + 0.25 * teacher + 0.5 * quantization_error(model) + 0.3 * factor * dampening(model)
        )
        torch.testing.assert_close(both(logits(), TARGET, images, step), wanted)


def test_labels_can_be_left_out() -> None:
    """With a share of 1 the labels count for nothing."""
    only = objective(LossConfig(distill=DistillConfig(alpha=1.0)), teacher=Fixed())
    images = torch.zeros(6, 3, 8, 8)
    torch.testing.assert_close(only(logits(), TARGET, images, 0), only(logits(), TARGET.flip(0), images, 0))
