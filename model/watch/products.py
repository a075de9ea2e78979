"""Checks the factors of convolutions and matrix products in quantized layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.layers.quantized import QuantLayer
from model.observe import PRODUCTS, first_input
from model.quantizers.frame import Quantizer


@dataclass
class _Call:
    """One call of a quantized layer: the outputs of its quantizers so far, its products and their first problem.

    The scale is the layer's argument of this name, by which it may multiply such an output.
    """

    scale: float = 1.0
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    products: int = 0
    problem: str = ""


class Products(TorchDispatchMode):
    """Checks the factors of convolutions and matrix products in quantized layers, and the layers' outputs.

    A layer may multiply only outputs of its quantizers: in every product, the values of one factor are those of the
    activation quantizer (or zeros of padding), and the values of the other are those of the weight quantizer.

    Attributes:
        problems: layer -> its first problem.
    """

    def __init__(self) -> None:
        super().__init__()
        self.problems: dict[str, str] = {}
        self._calls: list[tuple[QuantLayer, _Call] | None] = []  # nested; None: inside a quantizer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = PRODUCTS.get(func.overloadpacket)
        if places is not None and self._calls and self._calls[-1] is not None:
            layer, call = self._calls[-1]
            call.products += 1
            call.problem = call.problem or _multiplied(layer, call, [args[place] for place in places])
        return func(*args, **(kwargs or {}))

    def enter_layer(self, layer: QuantLayer, inputs: object, named: dict[str, Any]) -> None:
        """A hook before a quantized layer."""
        self._calls.append((layer, _Call(scale=named.get("scale", 1.0))))

    def leave_layer(
        self, name: str, layer: QuantLayer, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> None:
        """A hook after a quantized layer."""
        entry = self._calls.pop()
        assert entry is not None
        call, problem = entry[1], entry[1].problem
        if first_input(inputs, named).numel() == 0:  # then only the weight is quantized
            return
        if not problem and call.products == 0:
            problem = "has no convolution and no matrix product that could be looked at"
        if not problem and "quant_output" in dict(layer.quantizers()):
            outputs = call.outputs.get("quant_output", [])
            problem = "" if _among(output, outputs) else "puts out values that quant_output did not"
        if problem:
            self.problems.setdefault(name, problem)

    def enter_quantizer(self, quantizer: Quantizer, inputs: object) -> None:
        """A hook before a quantizer, whose own products are not checked."""
        self._calls.append(None)

    def leave_quantizer(self, part: str, quantizer: Quantizer, inputs: object, output: Tensor) -> None:
        """A hook after a quantizer."""
        self._calls.pop()
        if self._calls and self._calls[-1] is not None:
            call = self._calls[-1][1]
            call.outputs.setdefault(part, []).append(output)
            if call.scale != 1:
                call.outputs[part].append(output * call.scale)


def _multiplied(layer: QuantLayer, call: _Call, factors: Sequence[Tensor]) -> str:
    """Say what is wrong with the two factors of a product; empty when they are outputs of the quantizers."""
    parts = [part for part, _ in layer.quantizers() if part != "quant_output"]
    of_part = {part: [_among(factor, call.outputs.get(part, [])) for factor in factors] for part in parts}
    if any(
        all(of_part[part][i] for part, i in zip(parts, order, strict=False)) for order in ((0, 1), (1, 0))
    ):
        return ""
    wrong = [part for part in parts if not any(of_part[part])] or parts
    return f"multiplies values that {' and '.join(wrong)} did not put out"


def _among(factor: Tensor, outputs: Sequence[Tensor]) -> bool:
    """Whether all values of `factor` are values of the outputs, or zero."""
    # Autocast multiplies in a lower precision.
    rounded = [output.detach().to(factor.dtype) for output in outputs]
    for output, view in itertools.product(rounded, (factor, factor.mT if factor.ndim > 1 else factor)):
        if output.numel() == view.numel() and torch.equal(output.reshape(view.shape), view):
            return True
    values = torch.cat([factor.new_zeros(1), *(output.unique() for output in rounded)])
    return bool(torch.isin(factor, values).all())
