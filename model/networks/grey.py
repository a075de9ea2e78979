"""Networks for grey images out of those for colours: the weights of the first layer are summed over the colours.

The network then computes from a grey image what it did from one with three equal channels.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from model.layers.space_to_depth import SpaceToDepthConv
from utils.config.schema import ModelConfig


def take_grey(network: nn.Module) -> None:
    """Let convolutions of three channels, the one that reads the images, take one."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 3:
            layer.in_channels = 1
            layer.weight = nn.Parameter(layer.weight.detach().sum(1, keepdim=True))


def grey_state(
    state: Mapping[str, Tensor], network: nn.Module, config: ModelConfig
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights of a network for colours, as `network` takes them where it is for grey images.

    A weight [O, 3 * P, kh, kw] becomes [O, P, kh, kw]; P is 1, or the pixels of a block behind space-to-depth. That of
    a layer with quantizers in `state` stays, since their ranges are not those of a sum.

    Args:
        state: the weights by name.
        network: to load them into.
        config: its configuration.

    Returns:
        The weights, and the names of those that were summed.
    """
    found = dict(state)
    if config.channels != 1:
        return found, ()
    own: dict[str, Tensor] = network.state_dict()
    summed = []
    for name, weight in state.items():
        layer = name.rpartition(".")[0]
        if name not in own or weight.ndim != 4 or any(other.startswith(f"{layer}.quant_") for other in state):
            continue
        wide, pixels, *kernel = own[name].shape
        if tuple(weight.shape) != (wide, 3 * pixels, *kernel):
            continue
        # Space-to-depth: torch's `pixel_unshuffle` keeps a colour's pixels together, timm's layers a pixel's colours.
        ours = isinstance(network.get_submodule(layer.rpartition(".")[0]), SpaceToDepthConv)
        found[name] = weight.unflatten(1, (3, -1)).sum(1) if ours else weight.unflatten(1, (-1, 3)).sum(2)
        summed.append(name)
    return found, tuple(summed)
