"""The loss of a training against NumPy, and what each part of it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.layers.quantized import QuantConv2d
from model.training.objective import Objective
from model.training.oscillation import dampening
from model.training.quantization_error import quantization_error
from utils.config.resolve import read
from utils.config.schema import DistillConfig, LossConfig
from utils.step.loss import classification_loss, distillation_loss

Array = np.ndarray


def logits(*, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(6, 5, generator=generator)).requires_grad_()


TARGET = torch.tensor([0, 1, 2, 3, 4, 0])


def mixture() -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).softmax(dim=1)


def log_softmax(x: Array) -> Array:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("mixed", [False, True])
def test_focal_loss_is_the_formula(smoothing: float, gamma: float, mixed: bool) -> None:
    """-alpha * sum y (1 - p)^gamma log p, mean over images; with gamma 0 the cross-entropy."""
    x, target = logits(), mixture() if mixed else TARGET
    y = target.double().numpy() if mixed else np.eye(5)[TARGET.numpy()]
    y = (1 - smoothing) * y + smoothing / 5
    log_p = log_softmax(x.detach().double().numpy())
    wanted = -0.25 * (y * (1 - np.exp(log_p)) ** gamma * log_p).sum(axis=1).mean()
    found = classification_loss(x, target, smoothing=smoothing, gamma=gamma, alpha=0.25)
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-5)


def test_cross_entropy_is_torchs_to_the_bit() -> None:
    """Without options nothing changes."""
    wanted = functional.cross_entropy(logits(), TARGET, label_smoothing=0.1)
    assert classification_loss(logits(), TARGET, smoothing=0.1).equal(wanted)


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


class Fixed:
    """A teacher that always says the same."""

    def __call__(self, images: Tensor) -> Tensor:
        return mixture()


def network() -> nn.Sequential:
    """Two convolutions with 2-bit LSQ weights."""
    torch.manual_seed(0)
    config = read(["--keyword", "digits,cbsa,dorefa,lsq", "--wt_enable", "--wt_bit", "2"]).model.quant
    layers = [QuantConv2d(3, 4, 3), QuantConv2d(4, 6, 3)]
    for number, layer in enumerate(layers):
        layer.build_quantizers(config, str(number))
        layer.quant_weight.initialise_from(layer.weight)
    return nn.Sequential(*layers)


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


# The quantization error ---------------------------------------------------------------------------


def test_quantization_error_is_the_formula() -> None:
    """Mean over layers of the squared error over the squared weights; twice, once for the clip values."""
    model = network()
    wanted = []
    for layer in model:
        w = layer.weight.detach().double().numpy()
        q = layer.quant_weight(layer.weight).detach().double().numpy()
        wanted.append(2 * ((q - w) ** 2).sum() / (w**2).sum())
    assert float(quantization_error(model).detach()) == pytest.approx(np.mean(wanted), rel=1e-5)


def test_penalties_without_a_quantized_weight() -> None:
    """A policy may turn every weight's quantizer off: nothing is added."""
    model = network()
    for layer in model:
        layer.quant_weight.enabled = False
    assert float(quantization_error(model)) == float(dampening(model)) == 0


def test_quantization_error_brings_weights_and_levels_together() -> None:
    """Descending it alone makes weights and levels meet; both move."""
    model = network()
    before, clips = (
        float(quantization_error(model).detach()),
        [layer.quant_weight.clip_val.clone() for layer in model],
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(100):
        optimizer.zero_grad()
        quantization_error(model).backward()
        optimizer.step()
    assert float(quantization_error(model).detach()) < 0.2 * before
    assert not any(layer.quant_weight.clip_val.equal(clip) for layer, clip in zip(model, clips, strict=True))


def test_clip_values_of_least_error_stay() -> None:
    """The gradient of clip values vanishes where a search finds the least error."""
    layer = network()[0]
    quantizer, weight = layer.quant_weight, layer.weight.detach()
    ratios = torch.linspace(0.2, 1.0, 400)
    largest = weight.flatten(1).abs().amax(dim=1).reshape(-1, 1, 1, 1)
    errors = []
    for ratio in ratios:
        with torch.no_grad():
            quantizer.clip_val.copy_(largest * ratio)
            errors.append((quantizer(weight) - weight).square().flatten(1).sum(dim=1))
    best = ratios[torch.stack(errors).argmin(dim=0)].reshape(-1, 1, 1, 1)
    gradients = []
    for factor in (0.8, 1.0, 1.25):
        with torch.no_grad():
            quantizer.clip_val.copy_(largest * best * factor)
        quantizer.clip_val.grad = None
        quantization_error(layer).backward()
        gradients.append(quantizer.clip_val.grad.clone())
    low, middle, high = gradients
    assert bool((low < 0).all()) and bool((high > 0).all())
    assert bool((middle.abs() < torch.minimum(low.abs(), high.abs())).all())
