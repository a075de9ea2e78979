"""LSQ's clip value may reach zero or cross it; a quantizer written straight from the formula breaks there."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from model.calibrate import initialise_ranges
from model.layers.convolution import QuantConv2d
from model.quantizers.lsq import LSQ
from model.quantizers.site import LayerSite
from utils.config.schema import QuantConfig, QuantizerConfig

STEPS = 200


class NaiveLSQ(nn.Module):
    """c * round(n * clamp(x / c, 0, 1)) / n by autograd with a straight-through rounding, no precautions."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.clip_val = nn.Parameter(torch.tensor([start]))

    def forward(self, x: Tensor) -> Tensor:
        ratio = (x / self.clip_val).clamp(0, 1) * 3
        return (ratio + (ratio.round() - ratio).detach()) / 3 * self.clip_val


def robust(start: float) -> LSQ:
    config = QuantizerConfig(tag="fm", enable=True, method="lsq", levels=4, half_range=True)
    made = LSQ(config, LayerSite(name="layer", channels=8, channel_dim=1, ndim=4, fan=72))
    nn.init.constant_(made.clip_val, start)  # training may bring it there, the options do not
    return made


def train(quantizer: nn.Module, learning_rate: float) -> tuple[list[float], float]:
    """A 2-bit network from scratch on a fixed task with a clip value that moves fast."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    first, last = nn.Conv2d(1, 8, 3), nn.Linear(8, 4)
    x = torch.randn(64, 1, 8, 8, generator=generator)
    target = (x.mean(dim=(1, 2, 3)) * 20).long().clamp(-1, 2) + 1
    model = nn.ModuleList([first, quantizer, last])
    optimizer = torch.optim.SGD(
        [
            {"params": [*first.parameters(), *last.parameters()]},
            {"params": quantizer.parameters(), "lr": learning_rate},
        ],
        lr=0.1, momentum=0.9,
    )  # fmt: skip
    losses = []
    for _ in range(STEPS):
        hidden = quantizer(functional.relu(first(x))).mean(dim=(2, 3))
        loss = functional.cross_entropy(last(hidden), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    del model
    return losses, float(next(iter(quantizer.parameters())).detach())


def test_a_run_that_throws_its_clip_value_across_zero_by_itself() -> None:
    """From an ordinary start, large steps cross zero; the formula alone never learns again from there."""
    naive, naive_clip = train(NaiveLSQ(0.5), 5.0)
    losses, clip = train(robust(0.5), 5.0)
    assert naive_clip < 0 and clip < 0  # both did
    chance = naive[-1]  # what the last layer's biases alone can reach
    assert naive[-20:] == [chance] * 20 or max(naive[-20:]) - min(naive[-20:]) < 1e-3
    assert losses[-1] < 0.5 * chance


def test_a_run_whose_clip_value_starts_at_zero() -> None:
    """Written straight from the formula it is NaN at once (0 / 0); here it grows and the loss falls."""
    naive, _ = train(NaiveLSQ(0.0), 0.1)
    assert not torch.tensor(naive).isfinite().all()
    losses, clip = train(robust(0.0), 0.1)
    assert torch.tensor(losses).isfinite().all()
    assert abs(clip) > 0.05
    assert losses[-1] < losses[0]


def test_a_run_whose_clip_value_crosses_zero() -> None:
    """A high rate throws the clip value across zero; the formula alone then passes nothing on for good."""
    naive, naive_clip = train(NaiveLSQ(-0.05), 0.1)
    losses, clip = train(robust(-0.05), 0.1)
    assert torch.tensor(losses).isfinite().all()
    assert abs(clip) > 0.1
    assert losses[-1] < 0.95 * losses[0]
    # x >= 0 over a negative clip value is clamped to zero everywhere: no signal, no gradient to recover by.
    assert naive_clip == torch.tensor(-0.05).item()
    assert naive[-1] > losses[-1]


# A network of 2-bit weights and activations -------------------------------------------------------


class TextbookLSQ(nn.Module):
    """LSQ as its paper has it (arXiv 1902.08153): a step, its first value and gradient scale, no precautions."""

    def __init__(self, lowest: int, highest: int) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(math.nan))
        self.lowest, self.highest = lowest, highest

    def forward(self, x: Tensor) -> Tensor:
        if self.step.isnan():
            self.step.data = 2 * x.detach().abs().mean() / math.sqrt(self.highest)
        scale = 1 / math.sqrt(x.numel() * self.highest)
        step = self.step * scale + (self.step - self.step * scale).detach()
        codes = (x / step).clamp(self.lowest, self.highest)
        return (codes + (codes.round() - codes).detach()) * step


class Textbook(nn.Conv2d):
    """A convolution of 2-bit activations and weights."""

    def __init__(self) -> None:
        super().__init__(16, 16, 3, padding=1)
        self.quant_activation, self.quant_weight = TextbookLSQ(0, 3), TextbookLSQ(-2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.quant_activation(x), self.quant_weight(self.weight), self.bias)


def ours() -> QuantConv2d:
    """The same, by the project's options for the same grids and gradients."""
    fields = {"enable": True, "method": "lsq", "levels": 4, "grad_scale": "paper", "quant_group": 1}
    conv = QuantConv2d(16, 16, 3, padding=1)
    config = QuantConfig(
        fm=QuantizerConfig(tag="fm", half_range=True, **fields),
        wt=QuantizerConfig(tag="wt", grid="midtread", **fields),
    )
    conv.build_quantizers(config, "conv")
    return conv


class Block(nn.Module):
    """x + conv(relu(conv(x))), which starts as the identity when the last convolution starts at zero."""

    def __init__(self, make: Callable[[], nn.Conv2d], starts_at_zero: bool) -> None:
        super().__init__()
        self.first, self.last = make(), make()
        if starts_at_zero:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.last(functional.relu(self.first(x))))


def train_digits(make: Callable[[], nn.Conv2d], starts_at_zero: bool) -> list[float]:
    """The losses of 100 steps from scratch on images of digits; stops at one that is not finite."""
    torch.manual_seed(0)
    blocks = [Block(make, starts_at_zero) for _ in range(2)]
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    targets = torch.from_numpy(digits.target)
    initialise_ranges(
        model, images[:64]
    )  # nothing to do for the textbook's, which begin with their first batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    while len(losses) < 100 and all(map(math.isfinite, losses)):
        batch = torch.randint(len(images), (32,), generator=generator)
        loss = functional.cross_entropy(model(images[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def learned(losses: list[float]) -> bool:
    return all(map(math.isfinite, losses)) and sum(losses[-10:]) < 0.3 * sum(losses[:10])


@pytest.mark.parametrize("starts_at_zero", [False, True])
def test_a_residual_network_of_two_bits_learns(starts_at_zero: bool) -> None:
    """With the last convolution of each block at zero, as Fixup and zero-init-residual start, too."""
    assert learned(train_digits(ours, starts_at_zero))


def test_the_textbook_form_learns_only_where_no_tensor_starts_at_zero() -> None:
    """The step of weights that are zero is zero, and 0 / 0 no number: the first loss is NaN already."""
    assert learned(train_digits(Textbook, starts_at_zero=False))
    assert math.isnan(train_digits(Textbook, starts_at_zero=True)[-1])
