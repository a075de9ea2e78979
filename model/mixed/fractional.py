"""Training with numbers of bits that are no whole ones; see `model.mixed.learned`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.calibrate import initialise_ranges
from model.convert import below_zero, quantize
from model.layers.quantized import QuantLayer, quantizers
from model.load import Trained, data_of
from model.quant import QuantConfig, QuantizerConfig
from model.quantizers.frame import Quantizer
from model.selection import Selection
from utils.config.methods import EVEN
from utils.errors import UserError
from utils.report.progress import progress
from utils.report.sensitivity_record import Sensitivity
from utils.text import some_names

START = 6.0  # bits of every layer at the beginning, whose ranges have the least squared error
CLIP = 1.0  # most of the gradient's norm
DECAY = 1e-4  # of weights
RATE = 0.02  # of Adam for the bits: its steps do not depend on how large a layer is
PENALTY = 5.0  # on the cost above the budget, over the budget


class Between(nn.Module):
    """A quantizer with a number of bits that is no whole one.

    Args:
        quantizer: its range is learned, and is the same for all numbers of bits.
        bits: float32 []; its gradient is <g, q(b + 1) - q(b)>, where b is the whole number below it.
        most: bits.
    """

    def __init__(self, quantizer: Quantizer, bits: nn.Parameter, most: int) -> None:
        super().__init__()
        self.quantizer, self.bits, self.most = quantizer, bits, most

    def forward(self, x: Tensor) -> Tensor:
        """Float32 of any shape, between the values of two numbers of bits."""
        fewer = min(int(self.bits.detach()), self.most - 1)
        self.quantizer.set_levels(2**fewer)
        below = self.quantizer(x)
        self.quantizer.set_levels(2 ** (fewer + 1))
        return torch.lerp(below, self.quantizer(x), self.bits - fewer)


def cost(record: Sensitivity, bits: Mapping[str, Tensor], *, size: bool) -> Tensor:
    """What bits cost, float32 []: bytes of all weights where `size`, else bit operations of an image."""
    names = [layer.name for layer in record.layers]
    numbers = torch.stack([bits[name] for name in names])
    none = dict.fromkeys(names, 0)
    if size:
        counts = torch.tensor([float(layer.weights) for layer in record.layers])
        return record.bytes_with(none) + (counts * numbers).sum() / 8
    counts = torch.tensor([float(layer.macs) for layer in record.layers])
    return record.bit_operations_with(none) + (counts * numbers.square()).sum()


def learn(
    trained: Trained,
    record: Sensitivity,
    budget: int,
    *,
    size: bool,
    ends: tuple[int, int],
    epochs: int,
    root: Path | None = None,
) -> dict[str, float]:
    """Train a network in full precision with fractional bits; its weights are changed.

    Batches, label smoothing and seed are those of its training, the rate is half of that training's and falls to zero
    along a cosine. The data are its training images.

    Args:
        trained: the network and its configuration.
        record: of its layers.
        budget: on `cost`.
        size: see `cost`.
        ends: the fewest and the most bits.
        epochs: passes over the images.
        root: the folder of images; None: that of the training.

    Returns:
        Name of a layer -> bits of its weight and input.

    Raises:
        UserError: too few epochs, or the loss is not finite.
    """
    network, config = trained.network, trained.config
    torch.manual_seed(config.run.seed)
    loader = data_of(trained, root, train=True).train
    steps, least = len(loader), math.ceil((_start(ends) - ends[0]) / RATE)
    if steps * epochs < least:
        raise UserError(
            f"--epochs {epochs}: {steps * epochs} batches are too few for bits to change; write at least "
            f"{math.ceil(least / steps)}"
        )
    loader.set_epoch(0)
    images = next(iter(loader))[0].float()
    bits = _fractional(network, images, record, config.model.quant.depthwise, ends)
    own = {id(parameter) for parameter in bits.values()}
    others = [parameter for parameter in network.parameters() if id(parameter) not in own]
    optimizer = torch.optim.SGD(others, config.optim.lr / 2, momentum=0.9, weight_decay=DECAY, nesterov=True)
    bit_optimizer = torch.optim.Adam(bits.values(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    network.train()
    for epoch in progress(range(epochs), epochs, "epochs", True):
        loader.set_epoch(epoch)
        for images, target in loader:
            logits = network(images.float())
            loss = functional.cross_entropy(logits, target, label_smoothing=config.loss.label_smooth)
            loss = loss + PENALTY * functional.relu(cost(record, bits, size=size) / budget - 1)
            if not bool(loss.isfinite()):
                raise UserError(
                    f"{trained.source}: the loss is not finite in epoch {epoch + 1}: its training's rate, "
                    f"--lr {config.optim.lr:g}, of which half is taken, is too high for quantized layers"
                )
            optimizer.zero_grad()
            bit_optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(others, CLIP)
            optimizer.step()
            bit_optimizer.step()
            with torch.no_grad():
                for parameter in bits.values():
                    parameter.clamp_(*ends)
        schedule.step()
    return {name: float(parameter.detach()) for name, parameter in bits.items()}


def _start(ends: tuple[int, int]) -> float:
    return min(max(START, ends[0]), ends[1])


def _fractional(
    network: nn.Module, images: Tensor, record: Sensitivity, depthwise: bool, ends: tuple[int, int]
) -> dict[str, nn.Parameter]:
    """Quantize the layers of a record, each with a number of bits of its own."""
    if any(True for _ in quantizers(network)):
        raise UserError(f"{record.checkpoint} is quantized by now: measure a network in full precision")
    start = _start(ends)
    levels = 2 ** int(start)
    fm = QuantizerConfig(tag="fm", enable=True, method=EVEN, levels=levels, half_range=True)
    wt = QuantizerConfig(tag="wt", enable=True, method=EVEN, levels=levels)
    config = QuantConfig(fm=fm, wt=wt, first_last=True, depthwise=depthwise, re_init_range="mse")
    signed = tuple(name for name, share in below_zero(network, images).items() if share > 0)
    replaced = quantize(network, config, select=Selection(signed=signed), example=(images[:1],)).replaced
    if other := {layer.name for layer in record.layers} ^ {*replaced}:
        raise UserError(
            f"{record.checkpoint} has other layers than its record ({some_names(sorted(other))}): measure again"
        )
    initialise_ranges(network, images, config)
    bits = {layer.name: nn.Parameter(torch.tensor(start)) for layer in record.layers}
    for name, parameter in bits.items():
        layer = network.get_submodule(name)
        assert isinstance(layer, QuantLayer)
        for part, quantizer in list(layer.quantizers()):
            setattr(layer, part, Between(quantizer, parameter, ends[1]))
    return bits
