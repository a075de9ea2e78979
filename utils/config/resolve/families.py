"""The families of networks, which decide what acts on a network."""

from __future__ import annotations

FAMILIES = ("resnet", "pytorch", "torchvision", "timm", "mobilenet", "classic")
CLASSICS = {"mobilenetv1": "mobilenet", "mobilenetv2": "mobilenet", "vgg_small": "classic", "nin": "classic"}


def family_of(model: str) -> str:
    """The family of networks, which decides the keywords that act on `model`; "own" for a user's network."""
    if model.startswith("pytorch-"):
        return "pytorch"
    source, colon, _ = model.partition(":")
    if colon and source in FAMILIES:
        return source
    return "resnet" if model.startswith("resnet") else CLASSICS.get(model, "own")
