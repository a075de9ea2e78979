"""What a training consists of, as one record."""

from __future__ import annotations

from dataclasses import dataclass
from logging import Logger

import torch
from torch import nn

from model.training.policy import PolicyScheduler
from model.training.training_methods import TrainingMethods
from model.watch.probe import Probe
from utils.checkpoint.run_state import Output, RunState, save
from utils.config.schema import Config
from utils.step.precision import Precision


@dataclass(frozen=True)
class TrainingState:
    """What a training consists of.

    Attributes:
        model: the network.
        network: the same as it is trained: with several processes, its gradients are their mean.
        optimizer: of the network's parameters, or of its master weights.
        precision: how both compute.
        policy: the policy file's changes, and through it the learning rates and the optimizer's options.
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
    policy: PolicyScheduler
    methods: TrainingMethods
    device: torch.device
    layout: torch.memory_format
    config: Config
    logger: Logger
    probe: Probe | None = None

    def save(self, progress: RunState, output: Output, *, best: bool = False) -> None:
        """Start writing the checkpoints that are due; see `utils.checkpoint.run_state.save`."""
        save(
            progress, self.config, output, state_dict=self.precision.weights(self.model), optimizer=self.optimizer,
            amp=self.precision.state_dict(), rates=self.policy.rates, best=best,
        )  # fmt: skip

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, S, S] where and how the network takes them."""
        dtype = self.precision.image_dtype
        return images.to(self.device, dtype, non_blocking=True, memory_format=self.layout)
