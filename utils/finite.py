"""Stops a run whose numbers are not finite, before it saves them, with the name of what made the first one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from model.health import first_nonfinite
from utils import distributed
from utils.errors import TrainingError
from utils.parts import Parts


def check_loss(parts: Parts, loss: Tensor, images: Tensor, where: str) -> None:
    """Stop the run, in all processes, before the weights take the step, when the loss of one is NaN or infinite."""
    mine = not math.isfinite(float(loss.detach()))
    if distributed.anyone(mine):
        whose = "the loss" if mine else "the loss of another process"
        raise TrainingError(f"{whose} is not finite in {where}; {advice(parts, images)}")


def check_gradients(parts: Parts, norm: Tensor, where: str) -> None:
    """Stop the run, before the weights take the step, when a gradient is NaN or infinite."""
    if not math.isfinite(float(norm)):
        bad = [
            name
            for name, parameter in parts.model.named_parameters()
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
        ]
        raise TrainingError(
            f"the gradient of {bad[0] if bad else 'the network'} is not finite in {where}, though the loss is; "
            "checkpoints hold the weights before it; try a lower --lr, --grad_clip or --re_init"
        )


def check_epoch(parts: Parts, row: Mapping[str, float], images: Callable[[], Tensor]) -> None:
    """Stop the run before it notes an epoch whose last step has ruined the weights.

    Args:
        parts: the training.
        row: the epoch's metrics.
        images: a batch of images, asked for when something is wrong.
    """
    weights = parts.precision.weights(parts.model)
    bad = [name for name, value in weights.items() if not bool(value.isfinite().all())]
    if distributed.anyone(bool(bad) or not math.isfinite(row.get("val_loss", 0.0))):
        where = f"{bad[0]} is not finite" if bad else "the validation loss is not finite"
        says = advice(parts, images(), training=False)
        raise TrainingError(f"{where} after epoch {row['epoch']:.0f}; {says}")


def advice(parts: Parts, images: Tensor, *, training: bool = True) -> str:
    """Where numbers that are not finite came from, and what may help; all processes ask, or none.

    Args:
        parts: the training.
        images: that it came from, or may have.
        training: in a step of training; otherwise in validation, or between the two.
    """
    with parts.precision.autocast():
        found = distributed.gathered(first_nonfinite(parts.model, images, training=training))
    # Shared statistics carry it to the others from the next layer on.
    _, layer = min((each for each in found if each), default=(0, ""))
    # An infinite running variance, for one, makes finite outputs, and other images may have made the loss.
    nowhere = "no layer has such an output" + (
        ", the loss itself is" if training else " for the images looked at"
    )
    where = f"the first layer with such an output is {layer}" if layer else nowhere
    return f"{where}; these weights are not saved; try a lower --lr, --grad_clip or --re_init"
