"""The losses of classes and of a teacher against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.utils.step.scores import TARGET, logits, mixture
from utils.step.loss import classification_loss, distillation_loss

Array = np.ndarray


def log_softmax(x: Array) -> Array:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("weights", [None, (0.2, 1.0, 3.0, 0.7, 2.0)])
def test_focal_loss_is_the_formula(
    smoothing: float, gamma: float, mixed: bool, weights: tuple[float, ...] | None
) -> None:
    """-alpha * sum y (1 - p)^gamma log p, mean over images; with gamma 0 the cross-entropy.

    With weights of the classes each image counts by those of its own.
    """
    x, target = logits(), mixture() if mixed else TARGET
    y = target.double().numpy() if mixed else np.eye(5)[TARGET.numpy()]
    factor = 1.0 if weights is None else y @ np.array(weights)
    y = (1 - smoothing) * y + smoothing / 5
    log_p = log_softmax(x.detach().double().numpy())
    wanted = -0.25 * (factor * (y * (1 - np.exp(log_p)) ** gamma * log_p).sum(axis=1)).mean()
    given = None if weights is None else torch.tensor(weights)
    found = classification_loss(x, target, smoothing=smoothing, gamma=gamma, alpha=0.25, weights=given)
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-5)


def test_cross_entropy_is_torchs_to_the_bit() -> None:
    """Without options nothing changes."""
    wanted = functional.cross_entropy(logits(), TARGET, label_smoothing=0.1)
    assert classification_loss(logits(), TARGET, smoothing=0.1).equal(wanted)


def test_parts_of_a_batch_with_class_weights_have_the_mean_of_the_whole() -> None:
    """As several processes, or passes, have; torch's own weighted mean has another one in each part."""
    weights = torch.tensor([0.2, 1.0, 3.0, 0.7, 2.0])
    whole = classification_loss(logits(), TARGET, weights=weights)
    parts = [
        classification_loss(logits()[part], TARGET[part], weights=weights) for part in (slice(3), slice(3, 6))
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_of_certain_images(gamma: float) -> None:
    """Images that the network is certain of, rightly or wrongly, give finite values and gradients."""
    x = (1000 * torch.eye(5)).requires_grad_()
    for target in (torch.arange(5), torch.arange(5).roll(1)):
        x.grad = None
        classification_loss(x, target, gamma=gamma).backward()
        assert x.grad is not None and bool(x.grad.isfinite().all())


def test_focal_loss_turns_to_what_is_wrong() -> None:
    """The larger gamma, the larger the share of the gradient that badly classified images have."""
    shares = []
    for gamma in (0.0, 1.0, 3.0):
        x = torch.tensor([[4.0, 0.0], [0.0, 1.0]], requires_grad=True)  # the first is right, the second wrong
        classification_loss(x, torch.tensor([0, 0]), gamma=gamma).backward()
        assert x.grad is not None
        sizes = x.grad.norm(dim=1)
        shares.append(float(sizes[1] / sizes.sum()))
    assert shares[0] < shares[1] < shares[2]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_labels_are_the_formula(temperature: float) -> None:
    """T^2 * KL of the softened outputs, mean over the batch; gradient T * (p - q) / N."""
    x, teacher = logits(), logits(scale=1.0).detach().flip(0)
    loss = distillation_loss(x, teacher, temperature=temperature, kind="kl")
    loss.backward()
    log_q = log_softmax(teacher.double().numpy() / temperature)
    log_p = log_softmax(x.detach().double().numpy() / temperature)
    wanted = temperature**2 * (np.exp(log_q) * (log_q - log_p)).sum(axis=1).mean()
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)
    gradient = temperature * (np.exp(log_p) - np.exp(log_q)) / 6
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), gradient, atol=1e-6)


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_the_teacher_itself_has_nothing_to_learn(kind: str) -> None:
    x = logits()
    loss = distillation_loss(x, x.detach(), temperature=2.0, kind=kind)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert x.grad is not None and float(x.grad.abs().max()) < 1e-6
