"""Computes what a Core ML package says, from the files of the package alone: torch in place of Core ML's operators."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import coremltools
import numpy as np
import torch
from coremltools.libmilstoragepython import _BlobStorageReader
from torch import Tensor
from torch.nn import functional

KINDS = {"FLOAT32": "float", "UINT8": "uint8", "INT32": "int32"} | {
    f"UINT{bits}": f"uint{bits}" for bits in (1, 2, 3, 4, 6)
}
IMMEDIATE = {"floats": np.float32, "ints": np.int64, "bools": np.bool_}


class Interpreter:
    """A package; called with images, float32 [N, C, H, W], it gives all tensors of quantizers and the logits."""

    def __init__(self, path: Path) -> None:
        tools: Any = coremltools
        spec = tools.utils.load_spec(str(path))
        self._folder = path / "Data" / "com.apple.CoreML"
        ((self.opset, block),) = spec.mlProgram.functions["main"].block_specializations.items()
        self._operators, self._outputs = block.operations, list(block.outputs)
        self.metadata = dict(spec.description.metadata.userDefined)
        (array,) = spec.description.input
        self.name, self.shape = array.name, tuple(array.type.multiArrayType.shape)
        self.names: dict[str, str] = json.loads(self.metadata["quantizers"])
        self.words = [operator.type for operator in self._operators]
        self._constants: dict[str, Any] = {}
        self._constants = self._run({})

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        rows = [self._run({self.name: torch.from_numpy(image[None])}) for image in images]
        kept = {name: tensor for name, tensor in self.names.items() if not name.endswith("weight")}
        offsets = json.loads(self.metadata.get("offsets", "{}"))
        return {
            name: torch.cat([row[tensor] for row in rows]).numpy() + np.float32(offsets.get(name, 0))
            for name, tensor in {**kept, self._outputs[0]: self._outputs[0]}.items()
        }

    def weights(self) -> dict[str, np.ndarray]:
        """The unpacked tables of quantized weights, before factors of channels."""
        return {
            name: self._constants[tensor].numpy()
            for name, tensor in self.names.items()
            if tensor in self._constants
        }

    def _run(self, given_tensors: dict[str, Any]) -> dict[str, Any]:
        """The tensors that follow from an image; without one, from the constants."""
        values = {**self._constants, **given_tensors}
        for operator in self._operators:
            if operator.outputs[0].name in values:
                continue
            given: dict[str, Any] = {key: self._constant(value) for key, value in operator.attributes.items()}
            missing = False
            for key, value in operator.inputs.items():
                found = [
                    values.get(item.name) if item.name else self._constant(item.value)
                    for item in value.arguments
                ]
                missing |= any(item is None for item in found)
                given[key] = found if key == "values" else found[0]
            if missing:
                continue
            given.pop("name")
            made = OPERATORS[operator.type](**given)
            for output, value in zip(
                operator.outputs, made if isinstance(made, tuple) else (made,), strict=True
            ):
                values[output.name] = value
                if isinstance(value, Tensor):
                    sizes = tuple(dim.constant.size for dim in output.type.tensorType.dimensions)
                    assert sizes == value.shape, (operator.type, sizes, value.shape)
        return values

    def _constant(self, value: Any) -> Any:
        tensor_type = value.type.tensorType
        shape = tuple(dim.constant.size for dim in tensor_type.dimensions)
        kind = (
            type(tensor_type)
            .DESCRIPTOR.file.enum_types_by_name["DataType"]
            .values_by_number[tensor_type.dataType]
        )
        if value.WhichOneof("value") == "blobFileValue":
            file = self._folder / value.blobFileValue.fileName.removeprefix("@model_path/")
            reader = _BlobStorageReader(str(file))
            found = np.array(getattr(reader, f"read_{KINDS[kind.name]}_data")(value.blobFileValue.offset))
        else:
            tensor = value.immediateValue.tensor
            which = tensor.WhichOneof("value")
            if which == "strings":
                return tensor.strings.values[0]
            if which == "bytes":  # of few elements
                assert kind.name in ("UINT8", "UINT32")
                found = np.frombuffer(tensor.bytes.values, {"UINT32": "<u4"}.get(kind.name, "u1"))
            else:
                found = np.array(getattr(tensor, which).values, IMMEDIATE[which])
        return torch.from_numpy(found.copy().reshape(shape))


class Interpreted:
    """The interpreter in the place of an engine."""

    name, optimised = "coremltools", False

    def __str__(self) -> str:
        return "interpreted"

    def open(self, path: Path, *, tensors: bool) -> Interpreter:
        assert tensors
        return Interpreter(path)


def _look_up_flat(indices: Tensor, lut: Tensor, shape: Tensor) -> Tensor:
    """The form of iOS 16: numbers of log2(entries) bits, the lowest bit first."""
    sizes, bits = shape.tolist(), len(lut).bit_length() - 1
    stream = [int(byte) >> place & 1 for byte in indices for place in range(8)]
    count = int(np.prod(sizes))
    numbers = [sum(stream[i * bits + j] << j for j in range(bits)) for i in range(count)]
    return lut[numbers].reshape(sizes)


def _look_up(lut: Tensor, indices: Tensor, shape: Tensor | None = None) -> Tensor:
    """The form of iOS 18 has a table for each block of the tensor."""
    if shape is not None:
        return _look_up_flat(indices, lut, shape)
    assert lut.shape[-1] == 1 and all(size == 1 for size in lut.shape[1:-2])
    tables = lut.reshape(lut.shape[0], -1)
    each = indices.shape[0] // len(tables)
    found = [tables[i // each][indices[i].long()] for i in range(indices.shape[0])]
    return torch.stack(found)


def _padded(x: Tensor, pad: Tensor, value: float) -> Tensor:
    top, bottom, left, right = pad.tolist()
    return functional.pad(x, (left, right, top, bottom), value=value)


def _conv(
    x: Tensor, weight: Tensor, strides: Tensor, pad_type: str, pad: Tensor, dilations: Tensor, groups: Tensor,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert pad_type == "custom"
    x = _padded(x, pad, 0)
    return functional.conv2d(x, weight, bias, strides.tolist(), 0, dilations.tolist(), int(groups))


def _max_pool(
    x: Tensor, kernel_sizes: Tensor, strides: Tensor, pad_type: str, pad: Tensor, ceil_mode: Tensor
) -> Tensor:
    assert pad_type == "custom" and not ceil_mode
    return functional.max_pool2d(_padded(x, pad, -torch.inf), kernel_sizes.tolist(), strides.tolist())


def _avg_pool(
    x: Tensor, kernel_sizes: Tensor, strides: Tensor, pad_type: str, pad: Tensor, ceil_mode: Tensor,
    exclude_padding_from_average: Tensor,
) -> Tensor:  # fmt: skip
    assert pad_type == "custom" and not ceil_mode
    found = functional.avg_pool2d(_padded(x, pad, 0), kernel_sizes.tolist(), strides.tolist())
    if exclude_padding_from_average:
        inside = _padded(torch.ones_like(x), pad, 0)
        found = found / functional.avg_pool2d(inside, kernel_sizes.tolist(), strides.tolist())
    return found


def _pad(x: Tensor, pad: Tensor, mode: str, constant_val: Tensor) -> Tensor:
    assert mode == "constant"
    pairs = pad.reshape(-1, 2).flip(0).reshape(-1).tolist()
    return functional.pad(x, pairs, value=float(constant_val))


def _reduced(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, keep_dims: Tensor, axes: Tensor | None = None) -> Tensor:
        every = list(range(x.ndim)) if axes is None else axes.tolist()
        return reduce(x, dim=every, keepdim=bool(keep_dims))

    return run


def _slices(x: Tensor, begin: Tensor, end: Tensor, stride: Tensor) -> Tensor:
    def parts() -> Iterator[slice]:
        for first, last, step in zip(begin.tolist(), end.tolist(), stride.tolist(), strict=True):
            yield slice(first, last, step)

    return x[tuple(parts())]


def _gather(x: Tensor, indices: Tensor, axis: Tensor, batch_dims: Tensor | None = None, **_: Any) -> Tensor:
    assert indices.ndim == 1 and not batch_dims
    return x.index_select(int(axis), indices.long())


CASTS = {"fp32": torch.float32, "int32": torch.int32, "bool": torch.bool}
OPERATORS: dict[str, Callable[..., Any]] = {
    "const": lambda val: val,
    "constexpr_lut_to_dense": _look_up,
    "conv": _conv,
    "linear": lambda x, weight, bias=None: functional.linear(x, weight, bias),
    "matmul": lambda x, y, transpose_x, transpose_y: (
        (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)
    ),
    "real_div": lambda x, y: x / y,
    "round": lambda x: x.round(),  # half to even
    "clip": lambda x, alpha, beta: x.clamp(float(alpha), float(beta)),
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "pow": lambda x, y: x**y,
    "maximum": lambda x, y: torch.maximum(x, y),
    "minimum": lambda x, y: torch.minimum(x, y),
    "greater_equal": lambda x, y: x >= y,
    "greater": lambda x, y: x > y,
    "less": lambda x, y: x < y,
    "select": lambda cond, a, b: torch.where(cond.bool(), a, b),
    "cast": lambda x, dtype: x.to(CASTS[dtype]),
    "relu": lambda x: x.relu(),
    "sigmoid": lambda x: x.sigmoid(),
    "tanh": lambda x: x.tanh(),
    "sqrt": lambda x: x.sqrt(),
    "abs": lambda x: x.abs(),
    "sign": lambda x: x.sign(),
    "floor": lambda x: x.floor(),
    "identity": lambda x: x,
    "sigmoid_hard": lambda x, alpha, beta: (x * alpha + beta).clamp(0, 1),
    "prelu": lambda x, alpha: functional.prelu(x, alpha),
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "pad": _pad,
    "reduce_mean": _reduced(torch.mean),
    "reduce_max": _reduced(torch.amax),
    "reduce_min": _reduced(torch.amin),
    "reduce_sum": _reduced(torch.sum),
    "reshape": lambda x, shape: x.reshape(shape.tolist()),
    "concat": lambda values, axis, interleave=None: torch.cat(values, dim=int(axis)),
    "transpose": lambda x, perm: x.permute(perm.tolist()),
    "gather": _gather,
    "slice_by_index": _slices,
    "split": lambda x, split_sizes, axis: torch.split(x, split_sizes.tolist(), int(axis)),
}
