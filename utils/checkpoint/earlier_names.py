"""The names that layers of MobileNets and VGG-Small have in files of an earlier implementation of these methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

_V = TypeVar("_V")
_MOBILENETV1 = {"depthwise.conv": "depth_conv.0", "depthwise.bn": "bn1.0", "pointwise.conv": "point_conv.0",
                "pointwise.bn": "bn2.0"}  # fmt: skip
_MOBILENETS = {"mobilenetv1": 13, "mobilenetv2": 17}  # blocks
NETWORKS = (*_MOBILENETS, "vgg_small")


def earlier_layers(network: str, names: Iterable[str]) -> dict[str, str]:
    """The layers of a network by our names, each with its earlier one; empty for a network that has none.

    Args:
        network: the name of `--model`.
        names: of the network's state.

    Example:
        >>> from utils.checkpoint.earlier_names import earlier_layers
        >>> earlier_layers("vgg_small", ["features.0.conv.weight", "fc.weight"])
        {'fc': 'classifier', 'features.0.conv': 'conv1', 'features.0.bn': 'bn1'}
    """
    if network == "vgg_small":
        places = {
            int(name.split(".")[1]) for name in names if name.startswith("features.") and ".conv." in name
        }
        found = {"fc": "classifier"}
        for number, place in enumerate(sorted(places), 1):
            found |= {f"features.{place}.{part}": f"{part}{number}" for part in ("conv", "bn")}
        return found
    if network not in _MOBILENETS:
        return {}
    blocks = _MOBILENETS[network]
    if network == "mobilenetv1":
        found = {"stem.conv": "root.0", "stem.bn": "root.1"}
        for i in range(blocks):
            found |= {f"blocks.{i}.{ours}": f"model.{i}.{theirs}" for ours, theirs in _MOBILENETV1.items()}
    else:
        found = {}
        for ours, place in (("stem", 0), (f"blocks.{blocks}", blocks + 1)):
            found |= {f"{ours}.conv": f"features.{place}.0", f"{ours}.bn": f"features.{place}.1"}
        for i in range(blocks):
            parts = ("expand", "depthwise", "project")[0 if i else 1 :]  # the first block has no `expand`
            for number, part in enumerate(parts, 1):
                found |= {
                    f"blocks.{i}.{part}.{kind}": f"features.{i + 1}.{kind}{number}" for kind in ("conv", "bn")
                }
    return found | {"fc": "classifier.0"}


def with_layers(state: Mapping[str, _V], layers: Mapping[str, str]) -> dict[str, _V]:
    """Entries with the names of their layers replaced; those of other layers stay.

    Example:
        >>> from utils.checkpoint.earlier_names import with_layers
        >>> with_layers({"fc.weight": 1, "bn.weight": 2}, {"fc": "classifier.0"})
        {'classifier.0.weight': 1, 'bn.weight': 2}
    """
    return {_renamed(name, layers): value for name, value in state.items()}


def _renamed(name: str, layers: Mapping[str, str]) -> str:
    parts = name.split(".")
    for i in range(1, len(parts)):
        layer = ".".join(parts[:i])
        if layer in layers:
            return ".".join([layers[layer], *parts[i:]])
    return name


def from_earlier(state: Mapping[str, _V], network: str, own: Iterable[str]) -> dict[str, _V]:
    """Weights under our names, where they have the earlier ones.

    Args:
        state: of a file.
        network: the name of `--model`.
        own: the names of the network's state.
    """
    own = list(own)
    theirs = {earlier: ours for ours, earlier in earlier_layers(network, own).items()}
    if not set(own).isdisjoint(state):  # ours, of which `features.0` may be both
        return dict(state)
    return with_layers(state, theirs)
