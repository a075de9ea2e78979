"""A trained network rebuilt from its checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.layers.quantized import keep_full_precision, quantizers
from model.networks import build
from model.pretrained import load_payload
from model.training.policy import initialise
from utils.checkpoint import weights
from utils.checkpoint.case_files import CheckpointFiles
from utils.checkpoint.recorded import config_of
from utils.config.schema import Config
from utils.data.sources import transform_by_name
from utils.data.transform import ImageTransform
from utils.errors import UserError
from utils.step.precision import memory_format


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A network as it is evaluated, and what its checkpoint says about it.

    Attributes:
        network: on the CPU, float32, in evaluation mode.
        transform: turns an image, or the path of one, into the network's input.
        classes: names of the classes in the order of the logits; empty where the checkpoint has none.
        config: the configuration of its training.
        source: the checkpoint.
    """

    network: nn.Module
    transform: ImageTransform
    classes: tuple[str, ...]
    config: Config
    source: Path

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes, or where there are none their numbers."""
        return self.classes or tuple(map(str, range(self.config.model.num_classes)))

    @property
    def run_folder(self) -> Path | None:
        """The folder of the run that has written the checkpoint; None where that is not here."""
        run = self.config.run
        folder = run.log_dir / run.case
        own = CheckpointFiles(run.weights_dir, self.config.model.name, run.case).existing()
        is_own = self.source.resolve() in {path.resolve() for path in own}
        return folder if is_own and (folder / "config.yaml").is_file() else None


def trained_from(
    payload: dict[str, Any], path: Path, *, ema_weights: bool = False, own_file: str | None = None
) -> Trained:
    """The network of a checkpoint that was read already, as `model.load.load_trained` returns it.

    Raises:
        UserError: as `model.load.load`.
    """
    config = config_of(payload, str(path), own_file)
    run = dataclasses.replace(config.run, evaluate=True, ema_weights=ema_weights, unresume_scope=())
    config = dataclasses.replace(config, run=run)
    classes = weights.class_names_of(payload)
    if classes and len(classes) != config.model.num_classes:
        raise UserError(
            f"{path} is damaged: it has the names of {len(classes)} classes, and its network has "
            f"{config.model.num_classes}; use another file"
        )
    images = payload.get("images")
    transform = (
        transform_by_name(config.data) if images is None else ImageTransform.from_dict(images, str(path))
    )
    if transform.channels != config.model.channels:
        raise UserError(
            f"{path} is damaged: its images have {transform.channels} channels, and its network takes "
            f"{config.model.channels}; use another file"
        )
    network = build.build_network(config.model)
    initialise(network, config.policy)
    build.set_stable(network, 0)
    load_payload(network, payload, path, config)
    for _, quantizer in quantizers(network):
        if not quantizer.enabled:
            keep_full_precision(quantizer, "is switched off by --policy or --full_precision")
    layout = memory_format(network, config.precision, torch.device("cpu"))
    network = network.to(memory_format=layout).eval()  # pyright: ignore[reportCallIssue]
    return Trained(network=network, transform=transform, classes=classes, config=config, source=path)
