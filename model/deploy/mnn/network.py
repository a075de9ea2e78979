"""A network on its way to MNN: its operators in the words of MNN's schema, tensors by their places.

Images are [N, channels, height, width]. MNN's convolutions and poolings take them with four channels beside each other
(NC4HW4), which is called packed here; others take what their inputs are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from model.deploy.codes import Array, WeightCodes
from model.deploy.graph import INPUT, OUTPUT
from model.deploy.mnn.codes import encoded, fits
from model.deploy.mnn.file import business_code
from model.deploy.steps import WEIGHT, Step, Steps
from utils.errors import UserError

TYPES = {"float32": "DT_FLOAT", "int32": "DT_INT32"}
LAYERS = ("Convolution", "ConvolutionDepthwise")
IMAGES = 4  # dimensions


class MnnNetwork:
    """The file under construction, and what is known of the steps that become its operators.

    Attributes:
        float_weights: the names of quantized weights that are stored as float32.
    """

    def __init__(self, steps: Steps) -> None:
        self.float_weights: list[str] = []
        self._steps = steps
        self._weights = {
            step.outputs[0]: step.weight for step in steps.steps if step.operator == WEIGHT and step.weight
        }
        self._named = {INPUT, OUTPUT} | {s.activation.name for s in steps.steps if s.activation is not None}
        self._readers = Counter(name for step in steps.steps for name in set(step.inputs))
        self._operators: list[dict[str, Any]] = []
        self._makers: dict[str, dict[str, Any]] = {}
        self._largest: dict[str, float] = {}
        self._tensors: list[str] = []
        self._places: dict[str, int] = {}
        self._packed: set[str] = set()
        self._whole: set[str] = set()  # tensors of whole numbers and truth values
        dims = [-1, *self.shape(INPUT)[1:]]
        self.add("Input", [], INPUT, "Input", {"dims": dims, "dtype": "DT_FLOAT", "dformat": "NCHW"})

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the graph."""
        value = self.known(name)
        return tuple(value.shape) if value is not None else tuple(self._steps.shapes[name])

    def known(self, name: str) -> Array | None:
        """A constant of the graph; None for other tensors."""
        return self._steps.constants.get(name)

    def weight(self, name: str) -> WeightCodes | None:
        """The quantized weight that a tensor is; None for others."""
        return self._weights.get(name)

    def add(
        self,
        operator: str,
        inputs: Sequence[str],
        output: str | Sequence[str],
        parameter: str = "",
        value: Mapping[str, Any] | None = None,
        *,
        packed: bool = False,
        whole: bool = False,
        name: str = "",
    ) -> str:
        """An operator of MNN.

        Args:
            operator: a word of `OpType`.
            inputs: tensors, as `flat` and `packed` give them.
            output: the tensor that it makes, or several.
            parameter: the table of `value`, a word of `OpParameter`.
            value: its entries.
            packed: whether its output is packed.
            whole: whether its numbers are whole ones or truth values.
            name: of the operator.

        Returns:
            The first output.
        """
        outputs = [output] if isinstance(output, str) else list(output)
        for made in outputs:
            self._places[made] = len(self._tensors)
            self._tensors.append(made if made in self._named else str(len(self._tensors)))
        self._packed.update(outputs if packed else ())
        self._whole.update(outputs if whole else ())
        entry: dict[str, Any] = {"type": operator, "outputIndexes": [self._places[made] for made in outputs]}
        if inputs:
            entry["inputIndexes"] = [self._places[given] for given in inputs]
        if parameter:
            entry |= {"main_type": parameter, "main": dict(value or {})}
        if name:
            entry["name"] = name
        self._operators.append(entry)
        self._makers[outputs[0]] = entry
        return outputs[0]

    def rename(self, name: str, output: str) -> bool:
        """Let another name stand for a tensor, or say that this cannot be: its own name is written in the file."""
        if output in self._named or name not in self._places:
            return False
        self._places[output] = self._places[name]
        for kind in (self._packed, self._whole):
            kind.update([output] if name in kind else [])
        return True

    def without_negative(self, name: str, output: str) -> bool:
        """Let the operator that makes a tensor leave out what is below zero, if it can, and is read by nothing else."""
        entry = self._makers.get(name)
        if entry is None or self._readers[name] != 1 or name in self._named:
            return False
        layer = entry["type"] in LAYERS
        if not (layer or entry.get("main", {}).get("opType") == "ADD") or not self.rename(name, output):
            return False
        if layer:
            entry["main"]["common"]["relu"] = True
        else:
            entry["main"]["activationType"] = 1
        return True

    def limit(self, name: str, largest: float) -> None:
        """Keep that no number of a tensor is larger."""
        self._largest[name] = largest

    def is_small(self, name: str, largest: float) -> bool:
        """Whether no number of a tensor is larger."""
        return self._largest.get(name, np.inf) <= largest

    def constant(self, name: str, value: Array) -> str:
        """A constant, by its name; the same name stands for the same value."""
        if name not in self._places:
            value = value.astype(np.float32 if value.dtype.kind == "f" else np.int32)
            blob = {"dims": list(value.shape), "dataFormat": "NCHW", "dataType": TYPES[str(value.dtype)]}
            entries = "float32s" if value.dtype.kind == "f" else "int32s"
            self.add(
                "Const", [], name, "Blob", blob | {entries: numbers(value)}, whole=value.dtype.kind != "f"
            )
        return name

    def scalar(self, value: float) -> str:
        """A constant of float32."""
        return self.constant(f"scalar_{np.float32(value)!s}", np.array(value, np.float32))

    def whole_numbers(self, value: Sequence[int]) -> str:
        """A constant of int32."""
        return self.constant(f"whole_{'_'.join(map(str, value))}", np.array(value, np.int32))

    def flat(self, name: str, rank: int = 0) -> str:
        """A tensor in the order of its dimensions; constants get at least `rank` of these."""
        value = self.known(name)
        if value is not None:
            if value.dtype.kind not in "fbiu" or (
                value.dtype.kind in "iu" and (value != value.astype(np.int32)).any()
            ):
                raise UserError(f"{name}: MNN files hold float32 and integers of 32 bits; export --to onnx")
            value = (
                value.reshape((1,) * (rank - value.ndim) + value.shape) if 0 < value.ndim < rank else value
            )
            return self.constant(f"{name}.{value.ndim}", value)
        return self._arranged(name, "flat") if name in self._packed else name

    def packed(self, name: str) -> str:
        """Images as convolutions take them."""
        if name in self._packed:
            return name
        return self._arranged(self.flat(name), "packed")

    def _arranged(self, name: str, how: str) -> str:
        """A tensor in the other order; made once."""
        made = f"{name}.{how}"
        if made not in self._places:
            orders = ("NC4HW4", "NCHW") if how == "flat" else ("NCHW", "NC4HW4")
            value = {"source": orders[0], "dest": orders[1]}
            self.add("ConvertTensor", [name], made, "TensorConvertInfo", value, packed=how == "packed")
        return made

    def is_packed(self, name: str) -> bool:
        """Whether a tensor is packed already."""
        return name in self._packed

    def together(self, names: Sequence[str], output: str, *, packs: bool = True) -> tuple[list[str], bool]:
        """Inputs of an operator on elements, and whether they, and so its output, are packed; never without `packs`."""
        shape = self.shape(output)
        whole = any(self.known(name) is None and self.shape(name) == shape for name in names)
        single = {name: self._single(name) for name in names} if whole else {}
        like = [name for name in names if single.get(name) is None]
        packed = packs and len(shape) == IMAGES and any(map(self.is_packed, like))
        packed = packed and all(self.shape(name) == shape and self.known(name) is None for name in like)
        arranged = self.packed if packed else partial(self.flat, rank=len(shape))
        return [single.get(name) or arranged(name) for name in names], packed

    def _single(self, name: str) -> str | None:
        """A constant whose entries are all the same as one number; None for others."""
        value = self.known(name)
        if value is None or not self.is_single(name):
            return None
        first = value.reshape(-1)[0]
        return (
            self.scalar(first) if value.dtype.kind == "f" else self.constant(f"one_{first}", np.array(first))
        )

    def is_single(self, name: str) -> bool:
        """Whether a tensor is a constant whose entries are all the same."""
        value = self.known(name)
        return value is not None and value.size > 0 and bool((value == value.reshape(-1)[0]).all())

    def is_whole(self, name: str) -> bool:
        """Whether a tensor has whole numbers or truth values."""
        value = self.known(name)
        return name in self._whole if value is None else value.dtype.kind != "f"

    def refuse(self, step: Step, why: str) -> UserError:
        """The line about a step that MNN does not take."""
        return step.refused(f"MNN files do not hold this {step.operator}: {why}")

    def add_reshape(self, x: str, output: str, shape: Sequence[int]) -> str:
        """A tensor in another shape, of the same order; one side may be -1."""
        whole = self.is_whole(x)
        return self.add(
            "Reshape", [x, self.whole_numbers(shape)], output, "Reshape", {"dimType": "NCHW"}, whole=whole
        )

    @staticmethod
    def floats(value: Array) -> list[float]:
        """The entries of an array as float32."""
        return [float(number) for number in numbers(value.astype(np.float32))]

    def filters(self, name: str) -> dict[str, Any]:
        """A layer's weight: codes with a scale for each output channel, or float32."""
        weight = self.weight(name)
        if weight is not None and weight.scaled and fits(weight.codes):
            data, long = encoded(weight.codes)
            scale = np.broadcast_to(weight.scale.reshape(-1), len(weight.codes))
            codes = {"type": 1, "quantScale": 1.0, "shapeInt32": long, "alpha": numbers(scale)}
            return {"quanParameter": codes | {"buffer": data.view(np.int8).tolist()}}
        if weight is not None:
            self.float_weights.append(weight.name)
            return {"weight": numbers(weight.values())}
        return {"weight": numbers(self._steps.constants[name])}

    def numbers(self) -> list[bytes]:
        """The bytes of all constants, weights in full precision and biases; see `MnnFile.numbers`."""
        fields = {"Blob": ("float32s",), "Convolution2D": ("weight", "bias")}
        return [
            np.array(entry["main"].get(field, []), np.float32).tobytes()
            for entry in self._operators
            for field in fields.get(entry.get("main_type", ""), ())
        ]

    def finished(self) -> dict[str, Any]:
        """The entries of a file."""
        return {
            "bizCode": business_code(dict(self._steps.metadata)), "oplists": self._operators,
            "outputName": [OUTPUT], "tensorName": self._tensors, "sourceType": "ONNX", "usage": "INFERENCE",
        }  # fmt: skip


def numbers(value: Array) -> list[int] | list[float]:
    """The entries of an array, which as text of nine digits are the same float32 again."""
    if value.dtype.kind != "f":
        return value.reshape(-1).astype(int).tolist()
    if not np.isfinite(value).all():
        raise UserError("MNN files hold no infinite numbers; export --to onnx")
    return [float(f"{number:.9g}") for number in value.reshape(-1).astype(np.float32).tolist()]
