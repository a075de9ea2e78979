"""Stops a run whose numbers are not finite, before it saves them, and names the layer that made the first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from model.training.training_state import TrainingState
from utils.checkpoint import weights
from utils.data.loader import Loader
from utils.errors import TrainingError
from utils.processes import distributed


def check_loss(state: TrainingState, loss: Tensor, logits: Tensor, images: Tensor, where: str) -> None:
    """Stop all processes before the optimizer step when the loss or a logit of one is NaN or infinite."""
    bad_loss = not math.isfinite(float(loss.detach()))
    # The loss stays finite where the logit of a class that is not the image's is minus infinity.
    mine = bad_loss or not bool(logits.isfinite().all())
    if distributed.any_process(mine):
        what = (
            "the loss is" if bad_loss else "logits are" if mine else "loss or logits of another process are"
        )
        raise TrainingError(f"{what} not finite in {where}; {advice(state, images)}")


def check_validation(state: TrainingState, finite: Sequence[Tensor], loader: Loader) -> None:
    """Stop all processes when a logit of a validation image is NaN or infinite.

    Args:
        state: the training.
        finite: for each batch that was validated, whether its logits are finite, bool [].
        loader: the batches; read again up to the first bad one, so that the layer can be named.
    """
    flags = torch.stack(list(finite)).tolist() if finite else []
    mine = not all(flags)
    if distributed.any_process(mine):
        images = None  # nothing is shared in evaluation mode, so the others need not take part
        if mine:
            images, _ = next(itertools.islice(loader, flags.index(False), None))
            images = state.images(images)
        whose = "logits" if mine else "logits of another process"
        says = advice(state, images, training=False)
        raise TrainingError(f"{whose} are not finite in validation; {says}")


def check_gradients(state: TrainingState, norm: Tensor, where: str) -> None:
    """Stop the run before the optimizer step when a gradient is NaN or infinite."""
    if not math.isfinite(float(norm)):
        bad = weights.nonfinite(
            (name, parameter.grad)
            for name, parameter in state.model.named_parameters()
            if parameter.grad is not None
        )
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
    bad = weights.nonfinite(state.precision.weights(state.model).items())
    if distributed.any_process(bool(bad) or not math.isfinite(row.get("val_loss", 0.0))):
        where = f"{bad[0]} is not finite" if bad else "the validation loss is not finite"
        says = advice(state, images(), training=False)
        raise TrainingError(f"{where} after epoch {row['epoch']:.0f}; {says}")


def advice(state: TrainingState, images: Tensor | None, *, training: bool = True) -> str:
    """Say where non-finite numbers came from and what may help; all processes must call it.

    A teacher whose logits are not finite is the cause whatever the network's are.

    Args:
        state: the training.
        images: the images that caused them, or may have; None, only in validation, if this process has none.
        training: whether it was in a training step; otherwise in validation or between the two.
    """
    teacher = state.methods.objective.teacher
    if training and teacher is not None and images is not None:
        layer = _first_layer(state, teacher.network, images.float(), training=False)
        if layer:
            return (
                f"the teacher's logits are not, its first layer with such an output is {layer}; give another "
                f"checkpoint with --distill_pretrained{_exactly(state)}"
            )
    layer = _first_layer(state, state.model, images, training=training)
    # An infinite running variance, for example, gives finite outputs, and other images may have caused the loss.
    nowhere = "no layer has such an output" + (
        ", the loss itself is" if training else " for the images looked at"
    )
    where = f"the first layer with such an output is {layer}" if layer else nowhere
    if state.config.run.evaluate:
        return f"{where}; give another checkpoint{_exactly(state)}"
    return f"{where}; these weights are not saved; try a lower --lr, --grad_clip or --re_init"


def _first_layer(state: TrainingState, model: nn.Module, images: Tensor | None, *, training: bool) -> str:
    """The first layer, over all processes, whose output is not finite; empty if there is none."""
    with state.precision.autocast():
        mine = None if images is None else first_nonfinite(model, images, training=training)
    found = distributed.gathered(mine)
    # Shared statistics carry it to the other processes from the next layer on.
    _, layer = min((each for each in found if each), default=(0, ""))
    return layer


def _exactly(state: TrainingState) -> str:
    return "" if state.config.precision.level == "O0" else ", or compute in float32 (without --fp16)"


def first_nonfinite(model: nn.Module, images: Tensor, *, training: bool = True) -> tuple[int, str] | None:
    """Find the first layer whose output for `images` [N, 3, S, S] is not finite; None if there is none.

    Returns the number of layers before it, and its name with its parameters and buffers that are not finite. In
    training mode this is a training step without gradients: all processes take part, since norms and quantizers may
    share statistics, and the network's buffers change. So call it only when the run ends anyway.
    """
    found: list[tuple[int, str]] = []
    counter = itertools.count()

    def watch(name: str, module: nn.Module, output: Tensor) -> None:
        before = next(counter)
        if found or not isinstance(output, Tensor) or bool(output.isfinite().all()):
            return
        bad = weights.nonfinite(
            [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        )
        name = name or "the network itself"
        found.append((before, f"{name} (its {', '.join(bad)} is not finite)" if bad else name))

    hooks = [
        module.register_forward_hook(lambda m, _, out, name=name: watch(name, m, out))
        for name, module in model.named_modules()  # parents end after their children, and may compute by themselves
        if not isinstance(module, nn.Identity)
    ]
    model.train(training)
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
