"""Averaged weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from utils.errors import UserError
from utils.step.average import WeightAverage


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_the_average_is_the_formula() -> None:
    """d * average + (1 - d) * weights with d = min(decay, (1 + t) / (10 + t)), of weights and running statistics."""
    model, average = network(), WeightAverage(0.25)
    wanted = {}
    for step in range(6):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(1) if value.dtype == torch.int64 else value.mul_(1.5)
        average.after_step(model.state_dict())
        decay = min(0.25, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            now = value.double().numpy()
            wanted[name] = decay * wanted.get(name, now) + (1 - decay) * now
    count = int(model[1].num_batches_tracked)
    with average.applied(model):
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                np.testing.assert_allclose(value.numpy(), wanted[name], rtol=1e-5, err_msg=name)
        assert int(model[1].num_batches_tracked) == count


def test_the_network_is_given_back() -> None:
    """Whatever happens while the average is applied, the network ends with the bits that it had."""
    model, average = network(), WeightAverage(0.9)
    average.after_step(model.state_dict())
    nn.init.normal_(model[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="an error"), average.applied(model):
        assert not model[0].weight.equal(before["0.weight"])
        model.train()
        model(torch.randn(2, 3, 8, 8))  # moves running statistics and the counter
        raise RuntimeError("an error")
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_nothing_without_a_decay() -> None:
    average = WeightAverage(0.0)
    average.after_step(network().state_dict())
    assert not average.exists and average.state_dict() == {}


def test_it_goes_on_from_its_state() -> None:
    """Two halves are the whole."""
    model, whole, first = network(), WeightAverage(0.7), WeightAverage(0.7)
    second = WeightAverage(0.7)
    for step in range(6):
        nn.init.normal_(model[0].weight, mean=step)
        whole.after_step(model.state_dict())
        if step == 3:
            second.load_state_dict(first.state_dict(), model)
        (first if step < 3 else second).after_step(model.state_dict())
    for name, value in whole.state_dict()["weights"].items():
        assert value.equal(second.state_dict()["weights"][name])


def test_another_networks_average_is_refused() -> None:
    average = WeightAverage(0.7)
    average.after_step(nn.Conv2d(3, 5, 3).state_dict())
    with pytest.raises(UserError, match="averaged weights do not fit the network: "):
        WeightAverage(0.7).load_state_dict(average.state_dict(), network())


def test_noise_averages_out() -> None:
    """The effect: of weights that jitter around a point the average is much nearer to it."""
    torch.manual_seed(0)
    model, average = nn.Linear(8, 8, bias=False), WeightAverage(0.98)
    for _ in range(400):
        nn.init.normal_(model.weight, mean=1.0)
        average.after_step(model.state_dict())
    last = (model.weight.detach() - 1).norm()
    with average.applied(model):
        assert float((model.weight.detach() - 1).norm()) < 0.2 * float(last)
