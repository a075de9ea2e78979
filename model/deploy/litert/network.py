"""A network on its way to LiteRT: tensors with channels last, constants, and the weights of layers.

Images are [N, height, width, channels] here, as LiteRT's convolutions need them; all tensors with four dimensions are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from model.deploy.codes import Array, WeightCodes
from model.deploy.litert.file import INPUT
from model.deploy.steps import WEIGHT, Step, Steps
from utils.errors import UserError

LAST = (0, 2, 3, 1)  # the dimensions of [N, channels, height, width] in their order here
FIRST = (0, 3, 1, 2)  # and back
NARROWER = {np.dtype(np.float64): np.dtype(np.float32), np.dtype(np.int64): np.dtype(np.int32)}
WIDTHS = (2, 4, 8)  # bits of a stored code
DEQUANTIZE_VERSIONS = {(False, False): 2, (True, False): 5, (False, True): 6, (True, True): 6}
"""The first that knows scales of channels, and codes below 8 bits."""


class Builder(Protocol):
    """What writes tensors and operators; see `FileBuilder`."""

    def tensor(self, name: str, shape: Sequence[int], kind: str = "float32") -> str:
        """A tensor that an operator makes, or the input."""
        ...

    def constant(
        self, name: str, value: Array, kind: str = "", scale: Array | None = None, axis: int = 0
    ) -> str:
        """A constant."""
        ...

    def operator(
        self, name: str, inputs: Iterable[str], outputs: Iterable[str], version: int = 1, **options: Any
    ) -> None:
        """An operator."""
        ...


class LitertNetwork:
    """The file under construction, and what is known of the steps that become its operators.

    Args:
        steps: of the network.
        file: see the attribute.
        input_kind: of the input's numbers.
        narrowest: the fewest bits of a stored code.

    Attributes:
        file: gets tensors and operators.
        float_weights: the names of quantized weights that are stored as float32.
    """

    engine = "LiteRT"

    def __init__(
        self, steps: Steps, file: Builder, input_kind: str = "float32", narrowest: int = WIDTHS[0]
    ) -> None:
        self.file = file
        self._narrowest = narrowest
        self.float_weights: list[str] = []
        self._steps = steps
        self._constants = steps.constants
        self._weights = {
            step.outputs[0]: step.weight for step in steps.steps if step.operator == WEIGHT and step.weight
        }
        self._kinds: dict[str, str] = {}
        self._sizes: dict[str, tuple[int, ...]] = {}
        self.file.tensor(INPUT, self.physical(self.shape(INPUT)), input_kind)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in the graph, with channels first."""
        value = self.known(name)
        return tuple(value.shape) if value is not None else tuple(self._steps.shapes[name])

    @staticmethod
    def physical(shape: Sequence[int]) -> tuple[int, ...]:
        """The same with channels last."""
        return tuple(shape[i] for i in LAST) if len(shape) == 4 else tuple(shape)

    @staticmethod
    def axis(axis: int, rank: int) -> int:
        """Where a dimension of the graph lies here."""
        axis %= rank
        return LAST.index(axis) if rank == 4 else axis

    def known(self, name: str) -> Array | None:
        """A constant of the graph, channels first; None for other tensors."""
        return self._constants.get(name)

    def weight(self, name: str) -> WeightCodes | None:
        """The quantized weight that a tensor is; None for others."""
        return self._weights.get(name)

    def operand(self, name: str, rank: int = 0) -> str:
        """A tensor of the file for an operator's input; constants get at least `rank` dimensions."""
        value = self.known(name)
        if value is None:
            return name
        narrow = value.astype(NARROWER.get(value.dtype, value.dtype))
        if value.dtype == np.int64 and (narrow != value).any():
            raise UserError(f"{name}: {self.engine} files hold integers of 32 bits; export --to onnx")
        value = narrow
        value = value.reshape((1,) * (rank - value.ndim) + value.shape) if 0 < value.ndim < rank else value
        value = value.transpose(LAST) if value.ndim == 4 else value
        return self.file.constant(f"{name}.{value.ndim}", value)

    def numbers(self, name: str, value: Sequence[int]) -> str:
        """A constant of whole numbers, int32."""
        return self.file.constant(name, np.array(value, np.int32))

    def add(
        self,
        operator: str,
        inputs: Sequence[str],
        output: str,
        shape: Sequence[int] | None = None,
        *,
        kind: str = "float32",
        version: int = 1,
        **options: Any,
    ) -> str:
        """An operator with one output, of the shape that the graph says, or of `shape` with channels last."""
        self._kinds[output] = kind
        size = self._sizes[output] = tuple(self.physical(self.shape(output)) if shape is None else shape)
        self.file.tensor(output, size, kind)
        self.file.operator(operator, inputs, [output], version, **options)
        return output

    def is_float(self, names: Sequence[str]) -> bool:
        """Whether all tensors have numbers of float32."""
        return all(self._kinds.get(name, "float32") == "float32" for name in names)

    def kind(self, names: Sequence[str]) -> str:
        """What an operator makes of tensors that are all of one kind."""
        return next((self._kinds[name] for name in names if name in self._kinds), "float32")

    def refuse(self, step: Step, why: str) -> UserError:
        """The line about a step that the engine does not take."""
        return step.refused(f"{self.engine} files do not hold this {step.operator}: {why}")

    def filters(
        self, x: str, weight: WeightCodes, *, grouped: bool = False, depthwise: bool = False
    ) -> tuple[str, str]:
        """A layer's input and its weight, as the layer reads them.

        Codes are signed and of 2, 4 or 8 bits, and DEQUANTIZE multiplies them by their scale when a file is loaded.
        Even levels without a zero, -3 -1 1 3 times a scale, are s (2 q + 1) for the codes q = -2 .. 1, and no
        operator but DEQUANTIZE is done once: an addition would run with every image. Therefore half the sum of all
        channels becomes one more channel of the input, with the code 1 as its weight:

            sum s (2 q + 1) x = 2 s (sum q x + 1 * sum x / 2)

        where that makes the file smaller, but for convolutions in groups, whose channels do not meet. Weights that are
        no integers times a scale are float32.
        """
        name, codes = weight.name, weight.codes
        direct, halved = width(codes, self._narrowest), 0
        if not grouped and (codes % 2).all():
            halved = width((codes - 1) // 2, self._narrowest)
        if not weight.scaled or not direct + halved:
            self.float_weights.append(name)
            return x, self.file.constant(name, arranged(weight.values(), depthwise))
        codes, scale, bits = arranged(codes, depthwise), weight.scale, direct
        if halved and (not direct or halved < direct):
            codes, scale, bits = (codes - 1) // 2, 2 * scale, halved
            codes = np.concatenate([codes, np.ones_like(codes[..., :1])], axis=-1)
            x = self._with_half_sum(x)
        axis = codes.ndim - 1 if depthwise else 0
        version = DEQUANTIZE_VERSIONS[scale.size > 1, bits < 8]
        packed = self.file.constant(
            f"{name}.codes", codes.astype(np.int8), f"int{bits}", scale.reshape(-1), axis
        )
        return x, self.add("DEQUANTIZE", [packed], name, codes.shape, version=version)

    def _with_half_sum(self, x: str) -> str:
        """`x` with one more channel, half the sum of the others; made once."""
        name = f"{x}.and_half_sum"
        if name in self._kinds:
            return name
        shape = self._sizes.get(x) or self.physical(self.shape(x))
        half, one, several = f"{x}.half_sum", (*shape[:-1], 1), (*shape[:-1], shape[-1] + 1)
        if len(shape) == 4:
            ones = self.file.constant(f"halves_{shape[-1]}", np.full((1, 1, 1, shape[-1]), 0.5, np.float32))
            self.add("CONV_2D", [x, ones, self.zeros(1)], half, one, **window([1, 1]))
        else:
            ones = self.file.constant(f"half_row_{shape[-1]}", np.full((1, shape[-1]), 0.5, np.float32))
            self.add("FULLY_CONNECTED", [x, ones, self.zeros(1)], half, one)
        return self.add("CONCATENATION", [x, half], name, several, axis=len(shape) - 1)

    def zeros(self, count: int) -> str:
        """A bias of zeros."""
        return self.file.constant(f"zeros_{count}", np.zeros(count, np.float32))


def window(
    strides: Sequence[int], dilations: Sequence[int] = (1, 1), *, same: bool = False
) -> dict[str, Any]:
    """The options of a convolution."""
    return {
        "padding": 0 if same else 1, "strideH": int(strides[0]), "strideW": int(strides[1]),
        "dilationHFactor": int(dilations[0]), "dilationWFactor": int(dilations[1]),
    }  # fmt: skip


def arranged(value: Array, depthwise: bool) -> Array:
    """A weight [out, in, height, width] as LiteRT reads it: [out, height, width, in], or [1, height, width, out]."""
    if value.ndim != 4:
        return value
    value = value.transpose(0, 2, 3, 1)
    return value.transpose(3, 1, 2, 0) if depthwise else value


def width(codes: Array, narrowest: int) -> int:
    """The bits of the narrowest signed integers that hold the codes, at least `narrowest`; 0 where none do."""
    widths = (bits for bits in WIDTHS if bits >= narrowest)
    return next(
        (bits for bits in widths if codes.min() >= -(2 ** (bits - 1)) and codes.max() < 2 ** (bits - 1)), 0
    )
