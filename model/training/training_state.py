"""The record of everything that the training loop works with."""

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
from utils.data.transform import ImageTransform
from utils.step.precision import Precision


@dataclass(frozen=True)
class TrainingState:
    """Everything that the training loop works with.

    Attributes:
        model: the network.
        compiled: the same, compiled if asked for.
        network: that, wrapped for training: gradients are averaged over several processes.
        optimizer: of the network's parameters, or of its master weights.
        precision: the floating types they compute in.
        policy: the policy file's changes, and through it the learning rates and the optimizer's options.
        methods: the loss, averaged weights and frozen weights.
        device: of all of it.
        layout: memory format of images.
        config: the configuration.
        logger: the log.
        probe: records tensors of layers at some iterations, if asked to.
        classes: names of the classes; empty where they have none.
        max_value: the value of 16-bit images that becomes white; None without such images.
        transform: how an image becomes the network's input.
        reference: an evaluation's other network; None without one.
    """

    model: nn.Module
    compiled: nn.Module
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
    classes: tuple[str, ...] = ()
    max_value: int | None = None
    transform: ImageTransform | None = None
    reference: nn.Module | None = None

    def save(self, progress: RunState, output: Output, *, best: bool = False) -> None:
        """Start writing the checkpoints that are due; see `utils.checkpoint.run_state.save`."""
        save(
            progress, self.config, output, state_dict=self.precision.weights(self.model), optimizer=self.optimizer,
            amp=self.precision.state_dict(), rates=self.policy.rates, best=best,
            classes=self.classes, max_value=self.max_value,
            images=None if self.transform is None else self.transform.to_dict(),
        )  # fmt: skip

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, S, S] on the network's device, in its dtype and memory format."""
        dtype = self.precision.image_dtype
        return images.to(self.device, dtype, non_blocking=True, memory_format=self.layout)
