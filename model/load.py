"""A trained network from its checkpoint alone, for other programs and for the way to engines (`model.deploy`)."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.layers.quantized import keep_full_precision, quantizers
from model.networks import build
from model.pretrained import load_payload
from model.training.policy import initialise
from utils.checkpoint import archive, weights
from utils.checkpoint.case_files import CheckpointFiles
from utils.checkpoint.recorded import config_of
from utils.config.schema import Config
from utils.data.loaders import Loaders
from utils.data.sources import open_data, refuse_root, transform_by_name
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


def load(
    path: str | os.PathLike[str], *, ema_weights: bool = False, own_file: str | None = None
) -> tuple[nn.Module, ImageTransform, tuple[str, ...]]:
    """Rebuild a trained network from its checkpoint alone.

    No code in the file runs (`weights_only`). The network computes what `main.py -e --pretrained PATH` evaluates: the
    weights after the last step, as the training's validation did, and not the averaged ones of `--ema_decay`, unless
    `ema_weights` asks for them.

    Args:
        path: a checkpoint that `main.py` or `tools.py --keyword import` has written.
        ema_weights: take the averaged weights.
        own_file: the file with networks, methods and words of your own that the training ran with (`--keyword_file`).

    Returns:
        The network (CPU, float32, evaluation mode; float32 [N, C, H, W] in, logits [N, classes] out); the transform,
        which turns a Pillow image or the path of one into float32 [C, H, W]; the names of the classes in the order
        of the logits, empty where the checkpoint has none.

    Raises:
        UserError: the file is missing, damaged or holds no configuration, or the training's own file is needed.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from PIL import Image
        >>> from model.load import load
        >>> from model.networks.build import build_network
        >>> from utils.checkpoint import archive
        >>> from utils.config.schema import Config, ModelConfig, to_dict
        >>> from utils.data.transform import ImageTransform
        >>> config = Config(model=ModelConfig(num_classes=2, input_size=16, width_alpha=0.25))
        >>> images = ImageTransform(size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "small.pth.tar"  # a training writes the like
        ...     archive.save(path, {
        ...         "state_dict": build_network(config.model).state_dict(), "config": to_dict(config),
        ...         "classes": ["cat", "dog"], "images": images.to_dict(),
        ...     })
        ...     network, transform, classes = load(path)
        >>> logits = network(transform(Image.new("RGB", (40, 30)))[None])
        >>> classes, logits.shape
        (('cat', 'dog'), torch.Size([1, 2]))
    """
    trained = load_trained(path, ema_weights=ema_weights, own_file=own_file)
    return trained.network, trained.transform, trained.classes


def load_trained(
    path: str | os.PathLike[str], *, ema_weights: bool = False, own_file: str | None = None
) -> Trained:
    """As `load`, with the configuration of the training."""
    return trained_from(archive.read(Path(path)), Path(path), ema_weights=ema_weights, own_file=own_file)


def trained_from(
    payload: dict[str, Any], path: Path, *, ema_weights: bool = False, own_file: str | None = None
) -> Trained:
    """As `load_trained`, of a file that was read already."""
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


def data_of(trained: Trained, root: Path | None = None, *, train: bool = False) -> Loaders:
    """The images of a training, as its checkpoint's network takes them.

    Args:
        trained: the network; its classes, normalisation and range of 16-bit images are those of the images.
        root: the folder of images; None: that of the training.
        train: open the training images too.

    Raises:
        UserError: the images have other classes, or another order of them, than the checkpoint; a root that the data
            set does not read; or as `open_data`.
    """
    config, images = trained.config.data, trained.transform
    refuse_root(root, config.dataset)
    config = dataclasses.replace(
        config, train=train, rank=0, world_size=1, root=root or config.root, classes=trained.classes,
        mean=images.mean, std=images.std, max_value=images.max_value,
    )  # fmt: skip
    loaders = open_data(config)
    weights.check_class_names(trained.classes, loaders.classes, str(trained.source))
    return loaders
