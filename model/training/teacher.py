"""The teacher of a distillation: a trained full-precision network that does not change."""

from __future__ import annotations

import zlib
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from model.networks import build
from model.pretrained import network_state
from utils.checkpoint import archive, case_files, weights
from utils.config.schema import DistillConfig
from utils.errors import UserError


class Teacher:
    """Computes the teacher's logits for the training images.

    Args:
        config: its network.
        path: the checkpoint, see `find_teacher`.

    Attributes:
        network: it, in evaluation mode.

    Raises:
        UserError: the checkpoint does not fit, or has values that are not finite.
    """

    def __init__(self, config: DistillConfig, path: Path) -> None:
        self._path = path
        try:
            self.network = build.build_network(config.teacher)
        except UserError as error:
            raise UserError(
                f"--distill_teacher: {error}; the teacher's own options are --distill_teacher, --distill_keyword and "
                "--distill_width_alpha"
            ) from error
        payload = archive.read(path)
        self.classes = weights.class_names_of(payload)
        self.max_value = weights.max_value_of(payload)
        try:
            state = network_state(payload, self.network, config.teacher, str(path))
            weights.load_weights(self.network, state, allow_missing=lambda name: False, source=str(path))
        except UserError as error:
            raise UserError(f"--distill_pretrained: {error}") from error
        own = self.network.state_dict().items()
        weights.check_finite(own, f"--distill_pretrained {path}", " of the teacher")
        self.network.eval().requires_grad_(False)

    def to(self, device: torch.device, layout: torch.memory_format) -> Teacher:
        """Move it to the network's device and memory format."""
        self.network.to(device=device).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """Logits, float32 [N, C], of images [N, 3, S, S]; computed under the network's autocast."""
        with torch.no_grad():
            return self.network(images.float()).float()

    @cached_property
    def fingerprint(self) -> int:
        """A checksum of its weights, to tell it from others."""
        return _checksum(self.network)

    def check_same(self, fingerprint: int) -> None:
        """Raise `UserError` unless its weights have this `fingerprint`."""
        if fingerprint != self.fingerprint:
            raise UserError(
                f"--distill_pretrained {self._path}: the run that goes on learned from other weights; bring its "
                "teacher back or start another case"
            )


def find_teacher(config: DistillConfig, weights_dir: Path) -> Path:
    """The teacher's checkpoint.

    Raises:
        UserError: there is none.
    """
    path = case_files.find_pretrained(
        config.pretrained, weights_dir, config.teacher.name, option="distill_pretrained"
    )
    assert path is not None  # `none` was refused with the options
    return path


def _checksum(network: nn.Module) -> int:
    value = 0
    for tensor in network.state_dict().values():
        value = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), value)
    return value
