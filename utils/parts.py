"""What a training consists of."""

from __future__ import annotations

from dataclasses import dataclass
from logging import Logger

import torch
from torch import nn

from utils.config import Config
from utils.methods import Methods
from utils.policy import Steering
from utils.precision import Precision
from utils.probe import Probe


@dataclass(frozen=True)
class Parts:
    """What a training consists of.

    Attributes:
        model: the network.
        network: the same as it is trained: with several processes, its gradients are their mean.
        optimizer: of the network's parameters, or of its master weights.
        precision: how both compute.
        steering: the policy, and through it the learning rates and the optimizer's options.
        methods: the loss, and what is done with the weights after each step.
        device: where all of it is.
        layout: memory format of images.
        config: the configuration.
        logger: the log.
        probe: looks into layers at some iterations, if asked to.
    """

    model: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    steering: Steering
    methods: Methods
    device: torch.device
    layout: torch.memory_format
    config: Config
    logger: Logger
    probe: Probe | None = None

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, S, S] where and how the network takes them."""
        dtype = self.precision.image_dtype
        return images.to(self.device, dtype, non_blocking=True, memory_format=self.layout)
