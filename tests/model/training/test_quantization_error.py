"""The quantization error of weights as a part of the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.training.oscillation import dampening
from model.training.quantization_error import quantization_error
from tests.model.training.quantized_network import network


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
