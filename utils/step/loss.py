"""The losses of a batch: against labels, and against a teacher's outputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def classification_loss(
    logits: Tensor,
    target: Tensor,
    *,
    smoothing: float = 0.0,
    gamma: float = 0.0,
    alpha: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy, or the focal loss: mean over images of `-alpha * sum_c y_c * (1 - p_c)^gamma * log p_c`.

    y is the label's one-hot vector or a mixture of labels, smoothed: `(1 - s) * y + s / C`. With gamma 0 and
    alpha 1 it is the cross-entropy. Gradient: autograd's, finite also at p_c = 1. Source: Lin et al., "Focal
    Loss for Dense Object Detection", arXiv 1708.02002, equation 5, for more than two classes.

    With class weights w each image's loss is multiplied by sum_c w_c * y_c, where y is not smoothed: smoothing spreads
    over all classes alike. The mean is over the images, not over their weights as in torch's `cross_entropy`, so that
    several processes, or several passes for a step, have the gradient of one whole batch.

    Args:
        logits: float32 [N, C].
        target: int64 [N], or float32 [N, C] of mixed images.
        smoothing: s, from 0 to below 1.
        gamma: exponent, not negative; the larger, the less a well classified image counts.
        alpha: factor on all of it.
        weights: of the classes, float32 [C]; None: all 1.

    Returns:
        float32 [].
    """
    factor = None
    if weights is not None:
        factor = target @ weights if target.is_floating_point() else weights[target]
    if gamma == 0 and factor is not None:
        each = functional.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
        return alpha * (factor * each).mean()
    if gamma == 0:
        loss = functional.cross_entropy(logits, target, label_smoothing=smoothing)
        return loss if alpha == 1 else alpha * loss
    classes = logits.shape[1]
    if not target.is_floating_point():
        target = functional.one_hot(target, classes).to(logits.dtype)
    target = target * (1 - smoothing) + smoothing / classes
    log_p = functional.log_softmax(logits, dim=1)
    # 1 - p, exact for small p; the floor keeps the power's gradient finite where p is 1.
    rest = (-torch.expm1(log_p)).clamp_min(torch.finfo(logits.dtype).tiny)
    each = (target * rest.pow(gamma) * log_p).sum(dim=1)
    return -alpha * (each if factor is None else factor * each).mean()


def distillation_loss(logits: Tensor, teacher: Tensor, *, temperature: float, kind: str) -> Tensor:
    """How far the network's outputs are from a teacher's, mean over images.

    `kl`: T^2 * KL(softmax(teacher / T) || softmax(logits / T)), whose gradient to the logits,
    T * (softmax(logits / T) - softmax(teacher / T)) / N, keeps its size when T grows. `mse`: mean squared
    difference of the logits. Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv
    1503.02531, section 2.

    Args:
        logits: float32 [N, C].
        teacher: float32 [N, C], without gradient.
        temperature: T > 0.
        kind: "kl" or "mse".

    Returns:
        float32 [].
    """
    if kind == "mse":
        return functional.mse_loss(logits, teacher)
    return temperature**2 * functional.kl_div(
        functional.log_softmax(logits / temperature, dim=1),
        functional.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
