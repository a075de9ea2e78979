"""The memory of a network's tensors while it runs: the largest sum of those that are alive at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.layers.quantized import quantized_layers
from model.observe import observing
from model.quantizers.frame import Quantizer
from model.watch.cost import describe_quantizer
from utils.config.image_size import InputSize, sides
from utils.report.cost_record import stored_bytes

_PADS = (torch.ops.aten.constant_pad_nd, torch.ops.aten.reflection_pad2d, torch.ops.aten.replication_pad2d)


def peak_bytes(model: nn.Module, input_size: InputSize, channels: int = 3) -> int:
    """The largest sum of bytes of tensors that are alive at once while one image runs through the network.

    Operators run one after the other as the network calls them, none fused with another. A tensor is alive from the
    operator that makes it to the last one that reads it, the image and the logits included. Quantized inputs and
    outputs of layers have their bits, all others those of their type; views take nothing, nor does padding, which
    engines do inside a convolution. Parameters, and what operators need besides, are not counted.

    Args:
        model: on any device; it is left as it was.
        input_size: of an image.
        channels: of it.
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, channels, *sides(input_size), device=parameter.device, dtype=parameter.dtype)
    fixed = {_place(tensor) for tensor in (*model.parameters(), *model.buffers())}
    with observing(model), _Alive() as alive, _codes(model, alive):
        alive.note([], image)
        output = model(image)
        alive.note([x for x in tree_leaves(output) if isinstance(x, Tensor)])
    return alive.peak(fixed)


def _place(x: Tensor) -> int:
    """What tensors that share their memory have in common."""
    return x.untyped_storage()._cdata


class _Alive(TorchDispatchMode):
    """Notes what each operator reads and makes; keeps all tensors, so that no memory is used twice."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """See `model.observe.ParameterProducts`."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[list[int]] = []  # places that an operator touches
        self._sizes: dict[int, int] = {}
        self._same: dict[int, int] = {}  # place of a padded tensor -> that of the tensor
        self._kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        result = func(*args, **(kwargs or {}))
        read = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if func.overloadpacket in _PADS:
            self._same[_place(made[0])] = self._same.get(_place(read[0]), _place(read[0]))
        self.note(read, *made)
        return result

    def note(self, read: list[Tensor], *made: Tensor) -> None:
        """One operator."""
        for x in (*read, *made):
            self._sizes.setdefault(_place(x), x.untyped_storage().nbytes())
        self._kept += [*read, *made]
        self._steps.append([self._same.get(place, place) for place in map(_place, (*read, *made))])

    def resize(self, x: Tensor, bits: int) -> None:
        """A tensor of codes of so many bits."""
        self._sizes[_place(x)] = stored_bytes(x.numel(), bits)

    def peak(self, fixed: set[int]) -> int:
        """The largest sum, without the places `fixed`."""
        first = {place: i for i, step in reversed([*enumerate(self._steps)]) for place in step}
        last = {place: i for i, step in enumerate(self._steps) for place in step}
        change = [0] * (len(self._steps) + 1)
        for place in first.keys() - fixed:
            change[first[place]] += self._sizes[place]
            change[last[place] + 1] -= self._sizes[place]
        found = total = 0
        for one in change:
            total += one
            found = max(found, total)
        return found


@contextlib.contextmanager
def _codes(model: nn.Module, alive: _Alive) -> Iterator[None]:
    """Let each quantizer make a tensor of its bits and do nothing else, that of a weight nothing at all."""

    def codes(bits: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            y = x.clone()
            alive.resize(y, bits)
            return y

        return forward

    replaced: list[Quantizer] = []
    try:
        for _, layer in quantized_layers(model):
            for part, quantizer in layer.quantizers():
                if not quantizer.enabled:
                    continue
                bits = describe_quantizer(quantizer)[1]
                vars(quantizer)["forward"] = (lambda x: x) if part == "quant_weight" else codes(bits)
                replaced.append(quantizer)
        yield
    finally:
        for quantizer in replaced:
            del vars(quantizer)["forward"]
