"""Oscillating weights: what dampens and what freezes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.convert import build_quantizers
from model.layers.convolution import QuantConv2d
from model.training.oscillation import Freezing, dampening, dampening_factor
from model.training.quantization_error import quantization_error
from utils.config.resolve import read
from utils.errors import UserError


def layer(values: Tensor, *, bits: int = 2, keywords: str = "dorefa,lsq") -> QuantConv2d:
    """A layer whose weights are `values`, in one group, with levels at -1, -1/3, 1/3 and 1."""
    line = f"--keyword digits,cbsa,{keywords} --wt_enable --wt_bit {bits} --wt_quant_group 1"
    found = QuantConv2d(1, values.numel(), 1, bias=False)
    build_quantizers(found, read(line.split()).model.quant)
    with torch.no_grad():
        found.weight.copy_(values.reshape_as(found.weight))
    return found


def weights(model: nn.Module) -> Mapping[str, Tensor]:
    return model.state_dict()


def test_dampening_is_the_formula() -> None:
    """(q - w)^2 within the range, nothing beyond its ends."""
    values = torch.tensor([-2.0, -1.0, -0.8, -0.1, 0.0, 0.3, 0.9, 1.0, 1.7])
    model = nn.Sequential(layer(values))
    loss = dampening(model)
    loss.backward()
    w = values.double().numpy()
    q = np.array([-1, -1, -1, -1 / 3, 1 / 3, 1 / 3, 1, 1, 1])  # 0 is a tie, which goes to the even number 2
    difference = np.where(np.abs(w) > 1, 0, w - q)
    assert float(loss.detach()) == pytest.approx((difference**2).sum(), rel=1e-5)
    np.testing.assert_allclose(model[0].weight.grad.flatten().numpy(), 2 * difference, atol=1e-6)


def test_dampening_changes_no_quantizer() -> None:
    """Nothing is counted and no basis updated, also in training."""
    model = nn.Sequential(layer(torch.linspace(-1, 1, 9), keywords="lq"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dampening(model).backward()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_dampening_grows_along_a_cosine() -> None:
    assert [round(dampening_factor(step, 5), 4) for step in range(5)] == [0, 0.1464, 0.5, 0.8536, 1]
    assert dampening_factor(0, 1) == 0


def run(model: nn.Sequential, freezing: Freezing, numbers: list[int]) -> list[int]:
    """Put the first weight on the levels of these numbers, one a step; the numbers that it then has."""
    found = []
    for step, number in enumerate(numbers):
        with torch.no_grad():
            model[0].weight[0] = -1 + 2 / 3 * number + 0.1  # not on the level itself
        freezing.after_step(step, weights(model))
        found.append(int(model[0].quant_weight.integers(model[0].weight).numbers.flatten()[0]))
    return found


def test_frequency_of_oscillation_is_the_formula() -> None:
    """A change counts when it goes back from where the last one came; m * o + (1 - m) * f."""
    model = nn.Sequential(layer(torch.zeros(3)))
    freezing = Freezing(model, (0.99,), 0.25, 100)
    run(model, freezing, [1, 2, 1, 1, 2, 3, 2])  # up, back, none, back, on, back
    frequency = 0.0
    for oscillates in (0, 1, 0, 1, 0, 1):
        frequency = 0.25 * oscillates + 0.75 * frequency
    state = freezing.state_dict()["0"]
    assert float(state["frequency"].flatten()[0]) == pytest.approx(frequency)
    assert not state["frequency"].flatten()[1:].any() and freezing.share() == 0


def test_a_weight_that_oscillates_is_frozen_at_its_mean() -> None:
    """It stays on the level that it was on most, exactly, and the others go on."""
    model = nn.Sequential(layer(torch.zeros(4)))
    freezing = Freezing(model, (0.15,), 0.1, 100)
    kept = run(model, freezing, [1, 2, 2, 1, 2, 2, 1, 2, 2, 1, 2, 1, 0, 3])
    assert kept[-3:] == [kept[-1]] * 3 and kept[-1] in (1, 2)
    level = -1 + 2 / 3 * kept[-1]
    assert float(model[0].weight[0].detach()) == pytest.approx(level, abs=1e-6)
    assert freezing.share() == 0.25


def test_the_threshold_falls_along_a_cosine() -> None:
    freezing = Freezing(nn.Identity(), (0.04, 0.01), 0.1, 101)
    assert [round(freezing.threshold(step), 4) for step in (0, 50, 100)] == [0.04, 0.025, 0.01]
    assert Freezing(nn.Identity(), (0.02,), 0.1, 101).threshold(37) == pytest.approx(0.02)


def test_frozen_weights_follow_their_range() -> None:
    """The level stays, its value is that of the clip value now."""
    model = nn.Sequential(layer(torch.zeros(2)))
    freezing = Freezing(model, (0.05,), 0.5, 100)
    number = run(model, freezing, [1, 2, 1, 2, 1])[-1]
    with torch.no_grad():
        model[0].quant_weight.clip_val.fill_(3.0)
    freezing.after_step(5, weights(model))
    assert float(model[0].weight[0].detach()) == pytest.approx(3 * (-1 + 2 / 3 * number), abs=1e-5)


def test_other_levels_begin_anew() -> None:
    """When a policy changes the levels, nothing stays frozen."""
    model = nn.Sequential(layer(torch.zeros(2)))
    freezing = Freezing(model, (0.05,), 0.5, 100)
    run(model, freezing, [1, 2, 1, 2, 1])
    assert freezing.share() > 0
    model[0].quant_weight.set_levels(8)
    freezing.after_step(5, weights(model))
    assert freezing.share() == 0


def test_another_range_begins_anew() -> None:
    """When a policy moves the levels into [0, c], their numbers mean other values."""
    model = nn.Sequential(layer(torch.zeros(2)))
    quantizer = model[0].quant_weight
    freezing = Freezing(model, (0.05,), 0.5, 100)
    run(model, freezing, [1, 2, 1, 2, 1])
    before = model[0].weight.clone()
    quantizer.config = dataclasses.replace(quantizer.config, half_range=True)
    freezing.after_step(5, weights(model))
    assert freezing.share() == 0 and model[0].weight.equal(before)


def test_a_layer_that_is_turned_off_begins_anew() -> None:
    """Nothing of it is frozen meanwhile, nor after."""
    model = nn.Sequential(layer(torch.zeros(2)))
    quantizer = model[0].quant_weight
    freezing = Freezing(model, (0.05,), 0.5, 100)
    run(model, freezing, [1, 2, 1, 2, 1])
    quantizer.enabled = False
    freezing.after_step(5, weights(model))
    assert freezing.share() == 0 and freezing.state_dict() == {}
    quantizer.enabled = True
    assert run(model, freezing, [3]) == [3]


def test_a_learned_scale_is_no_part_of_the_weights() -> None:
    """With `wt_gamma` the weights' own levels count, which the scale is multiplied onto."""
    plain, scaled = (nn.Sequential(layer(torch.linspace(-1.2, 1.2, 9), keywords=words))
                     for words in ("dorefa,lsq", "dorefa,lsq,wt_gamma"))  # fmt: skip
    with torch.no_grad():
        scaled[0].quant_weight.gamma.fill_(3.0)
    assert dampening(scaled).equal(dampening(plain))
    assert quantization_error(scaled).equal(quantization_error(plain))


def test_penalties_wait_for_the_warm_up() -> None:
    """While weights pass, their levels mean nothing."""
    model = nn.Sequential(layer(torch.linspace(-1, 1, 9)))
    model[0].quant_weight.stable = 5
    assert float(dampening(model).detach()) == float(quantization_error(model).detach()) == 0
    model[0].quant_weight.iteration.fill_(5)
    assert float(dampening(model).detach()) > 0 and float(quantization_error(model).detach()) > 0


def test_nothing_is_frozen_while_weights_pass() -> None:
    """In a warm-up the levels mean nothing."""
    model = nn.Sequential(layer(torch.zeros(2)))
    quantizer = model[0].quant_weight
    quantizer.stable = 10
    freezing = Freezing(model, (0.05,), 0.5, 100)
    run(model, freezing, [1, 2] * 5)
    assert freezing.share() == 0
    quantizer.iteration.fill_(10)
    run(model, freezing, [1, 2] * 5)
    assert freezing.share() > 0


def test_it_goes_on_from_its_state() -> None:
    """What is known of the weights continues."""
    numbers = [1, 2, 2, 1, 2, 2, 1, 2, 0, 3]
    whole = nn.Sequential(layer(torch.zeros(2)))
    wanted = run(whole, Freezing(whole, (0.2,), 0.2, 100), numbers)
    halves = nn.Sequential(layer(torch.zeros(2)))
    first, second = (Freezing(halves, (0.2,), 0.2, 100) for _ in range(2))
    found = run(halves, first, numbers[:4])
    second.load_state_dict(first.state_dict())
    assert found + run(halves, second, numbers[4:]) == wanted
    assert wanted[-2:] != numbers[-2:]


def test_another_networks_state_is_refused() -> None:
    one, two = nn.Sequential(layer(torch.zeros(2))), nn.Sequential(layer(torch.zeros(3)))
    freezing = Freezing(one, (0.2,), 0.2, 100)
    freezing.after_step(0, weights(one))
    with pytest.raises(UserError, match="frozen weights of 0 do not fit"):
        Freezing(two, (0.2,), 0.2, 100).load_state_dict(freezing.state_dict())


def late_jumps(dampen: float, threshold: tuple[float, ...]) -> int:
    """Changes of level in the last 50 of 300 steps, of 64 weights whose best values lie between levels."""
    torch.manual_seed(0)
    model = nn.Sequential(layer(torch.rand(64) * 1.6 - 0.8))
    model[0].quant_weight.clip_val.requires_grad_(False)
    best = torch.rand(64, 1, 1, 1) * 1.6 - 0.8
    optimizer = torch.optim.SGD([model[0].weight], lr=0.05)
    freezing, steps, jumps, before = Freezing(model, threshold, 0.1, 300), 300, [], None
    for step in range(steps):
        optimizer.zero_grad()
        loss = (model[0].quant_weight(model[0].weight) - best).square().sum()
        (loss + dampen * dampening_factor(step, steps) * dampening(model)).backward()
        optimizer.step()
        freezing.after_step(step, weights(model))
        numbers = model[0].quant_weight.integers(model[0].weight).numbers
        if before is not None:
            jumps.append(int((numbers != before).sum()))
        before = numbers
    return sum(jumps[-50:])


def test_effect_on_weights_between_two_levels() -> None:
    """Left alone they jump to the end; dampened and frozen they come to rest."""
    alone = late_jumps(0.0, ())
    assert alone > 100
    assert late_jumps(2.0, ()) < 0.1 * alone
    assert late_jumps(0.0, (0.02,)) < 0.1 * alone
