"""Stops a run whose numbers are not finite, before it saves them, and names the layer that made the first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from model.layers.quantized import QuantLayer
from model.training.training_state import TrainingState
from utils.errors import TrainingError
from utils.processes import distributed


def check_loss(state: TrainingState, loss: Tensor, images: Tensor, where: str) -> None:
    """Stop all processes before the optimizer step when the loss of one is NaN or infinite."""
    mine = not math.isfinite(float(loss.detach()))
    if distributed.any_process(mine):
        whose = "the loss" if mine else "the loss of another process"
        raise TrainingError(f"{whose} is not finite in {where}; {advice(state, images)}")


def check_gradients(state: TrainingState, norm: Tensor, where: str) -> None:
    """Stop the run before the optimizer step when a gradient is NaN or infinite."""
    if not math.isfinite(float(norm)):
        bad = [
            name
            for name, parameter in state.model.named_parameters()
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
        ]
        raise TrainingError(
            f"the gradient of {bad[0] if bad else 'the network'} is not finite in {where}, though the loss is; "
            "checkpoints hold the weights before it; try a lower --lr, --grad_clip or --re_init"
        )


def check_epoch(state: TrainingState, row: Mapping[str, float], images: Callable[[], Tensor]) -> None:
    """Stop the run before it records an epoch whose weights or validation loss are not finite.

    Args:
        state: the training.
        row: the epoch's metrics.
        images: gives a batch of images; called only when something is wrong.
    """
    weights = state.precision.weights(state.model)
    bad = [name for name, value in weights.items() if not bool(value.isfinite().all())]
    if distributed.any_process(bool(bad) or not math.isfinite(row.get("val_loss", 0.0))):
        where = f"{bad[0]} is not finite" if bad else "the validation loss is not finite"
        says = advice(state, images(), training=False)
        raise TrainingError(f"{where} after epoch {row['epoch']:.0f}; {says}")


def advice(state: TrainingState, images: Tensor, *, training: bool = True) -> str:
    """Say where non-finite numbers came from and what may help; all processes must call it.

    Args:
        state: the training.
        images: the images that caused them, or may have.
        training: whether it was in a training step; otherwise in validation or between the two.
    """
    with state.precision.autocast():
        found = distributed.gathered(first_nonfinite(state.model, images, training=training))
    # Shared statistics carry it to the other processes from the next layer on.
    _, layer = min((each for each in found if each), default=(0, ""))
    # An infinite running variance, for example, gives finite outputs, and other images may have caused the loss.
    nowhere = "no layer has such an output" + (
        ", the loss itself is" if training else " for the images looked at"
    )
    where = f"the first layer with such an output is {layer}" if layer else nowhere
    return f"{where}; these weights are not saved; try a lower --lr, --grad_clip or --re_init"


def first_nonfinite(model: nn.Module, images: Tensor, *, training: bool = True) -> tuple[int, str] | None:
    """Find the first layer whose output for `images` [N, 3, S, S] is not finite; None if there is none.

    Returns the number of layers before it, and its name with its non-finite parameters. In training mode this is a
    training step without gradients: all processes take part, since norms and quantizers may share statistics, and the
    network's buffers change. So call it only when the run ends anyway.
    """
    found: list[tuple[int, str]] = []
    counter = itertools.count()

    def watch(name: str, module: nn.Module, output: Tensor) -> None:
        before = next(counter)
        if found or not isinstance(output, Tensor) or bool(output.isfinite().all()):
            return
        bad = [
            key for key, value in module.named_parameters(recurse=False) if not bool(value.isfinite().all())
        ]
        found.append((before, f"{name} (its {', '.join(bad)} is not finite)" if bad else name))

    hooks = [
        module.register_forward_hook(lambda m, _, out, name=name: watch(name, m, out))
        for name, module in model.named_modules()
        if isinstance(module, QuantLayer) or not (isinstance(module, nn.Identity) or any(module.children()))
    ]
    model.train(training)
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
