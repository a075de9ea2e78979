"""A trained network from its checkpoint alone, for other programs and for the way to engines (`model.deploy`)."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from torch import nn

from model.training.rebuilt import Trained, trained_from
from utils.checkpoint import archive, weights
from utils.data.loaders import Loaders
from utils.data.sources import open_data, refuse_root
from utils.data.transform import ImageTransform


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
        >>> from utils.config.recorded import to_dict
        >>> from utils.config.schema import Config, ModelConfig
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
    if root is not None and config.dataset == "shards":  # another root may be a folder; imagenet finds out
        config = dataclasses.replace(config, dataset="imagenet")
    config = dataclasses.replace(
        config, train=train, rank=0, world_size=1, root=root or config.root, classes=trained.classes,
        mean=images.mean, std=images.std, max_value=images.max_value,
    )  # fmt: skip
    loaders = open_data(config)
    weights.check_class_names(trained.classes, loaders.classes, str(trained.source))
    return loaders
