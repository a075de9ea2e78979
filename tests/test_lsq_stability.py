"""LSQ's clip value may reach zero or cross it; a quantizer written straight from the formula breaks there."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.lsq import LSQ
from model.quant import TensorSite
from utils.config import QuantizerConfig

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
    config = QuantizerConfig(tag="fm", enable=True, method="lsq", levels=4, half_range=True, boundary=start)
    return LSQ(config, TensorSite(name="layer", channels=8, channel_dim=1, ndim=4, fan=72))


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
