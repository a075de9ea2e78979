"""The operators of ONNX in the words of Core ML's programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from model.deploy.codes import Array
from model.deploy.steps import Step, Steps
from utils.errors import UserError

SCALED = "_scaled"  # ends the name of what a weight's factors are multiplied with
KINDS = {1: "fp32", 6: "int32", 7: "int32", 9: "bool", 10: "fp32", 11: "fp32"}  # ONNX's numbers of types


@dataclass(frozen=True)
class Scaled:
    """A weight whose factors, float32 [out], are multiplied behind the sums."""

    weight: Any
    factor: Array

    def times(self, value: Any, shape: Sequence[int]) -> Any:
        """The sums times the factors, which have a shape."""
        name = f"{self.weight.name}{SCALED}"
        return builder().mul(x=value, y=self.factor.reshape(shape), name=name)


def given_input(step: Step, place: int) -> str:
    """The name of an input; empty where it is left out."""
    return "".join(step.inputs[place : place + 1])


class Emitter:
    """The tensors of a program that is being built, by the names of the steps.

    Args:
        steps: the network.
        tensors: what there is.
    """

    def __init__(self, steps: Steps, tensors: dict[str, Any]) -> None:
        self.steps = steps
        self.tensors = tensors
        self._shared: dict[str, Any] = {}

    def shared(self, value: Any) -> Any:
        """A constant, of which all operators with the same one share a copy: an operator takes some 200 bytes."""
        key = repr(value)
        if key not in self._shared:
            self._shared[key] = builder().const(val=value)
        return self._shared[key]

    def shape(self, step: Step) -> tuple[int, ...]:
        """Of what a step makes."""
        return self.steps.shapes[step.outputs[0]]

    def constant(self, name: str) -> Array | None:
        """A constant; None for other tensors."""
        return self.steps.constants.get(name) if name else None

    def needed_constant(self, step: Step, place: int) -> Array:
        """An input of a step that has to be a constant; raises UserError."""
        found = self.constant(step.inputs[place])
        if found is None:
            raise _refused(step, f"whose input {place} is computed")
        return found

    def tensor(self, name: str) -> Any:
        """A tensor or a constant as the builder takes it: float32, int32 or truth values."""
        constant = self.constant(name)
        if constant is not None:
            kinds = {"f": np.float32, "i": np.int32, "u": np.int32, "b": np.bool_}
            found = constant.astype(kinds[constant.dtype.kind])
            if constant.dtype.kind in "iu" and (found != constant).any():
                raise UserError(f"{name}: Core ML files hold integers of 32 bits; export --to onnx")
            return found
        found = self.tensors[name]
        if isinstance(found, Scaled):  # another operator than a layer reads it
            shape = (-1,) + (1,) * (len(found.weight.shape) - 1)
            found = self.tensors[name] = found.times(found.weight, shape)
        return found


Emit = Callable[..., Any]


def builder() -> Any:
    """What makes operators."""
    from coremltools.converters.mil import mil

    return mil.Builder


def _refused(step: Step, why: str) -> UserError:
    return step.refused(f"Core ML files do not hold a {step.operator} {why}")


def _only(step: Step, **wanted: Any) -> None:
    """Refuse attributes with values that are not written."""
    for name, values in wanted.items():
        value = step.attributes.get(name, values[0])
        if value not in values:
            raise _refused(step, f"with {name} {value}")


def _pads(step: Step, rank: int) -> list[int]:
    """Padding as Core ML takes it, the begin and the end of each dimension in turn."""
    _only(step, auto_pad=(b"NOTSET", b"VALID"))
    found = step.attributes.get("pads", [0] * 2 * rank)
    return [int(value) for pair in zip(found[:rank], found[rank:], strict=True) for value in pair]


def _window(emitter: Emitter, step: Step) -> dict[str, Any]:
    """Padding and strides."""
    strides = list(step.attributes.get("strides", [1, 1]))
    found = {"pad_type": "custom", "pad": _pads(step, 2), "strides": strides}
    return {name: emitter.shared(value) for name, value in found.items()}


def _weighted(emitter: Emitter, step: Step, layer: Emit, channel: int, name: dict[str, str]) -> Any:
    """A layer with its bias. The factors of its weight are multiplied behind its sums, and the bias is added then."""
    weight = emitter.tensors.get(step.inputs[1])
    given = given_input(step, 2)
    bias = emitter.constant(given)
    scaled = weight if isinstance(weight, Scaled) else None
    weight = scaled.weight if scaled is not None else emitter.tensor(step.inputs[1])
    if scaled is None and (bias is not None or not given):
        both = {} if bias is None else {"bias": bias.astype(np.float32)}
        return layer(weight=weight, **both, **name)
    shape = [1] * len(emitter.shape(step))
    shape[channel] = -1
    value = layer(weight=weight)
    if scaled is not None:
        value = scaled.times(value, shape)
    if not given:
        return builder().identity(x=value, **name) if name else value
    added = emitter.tensor(given) if bias is None else bias.astype(np.float32).reshape(shape)
    return builder().add(x=value, y=added, **name)


def _conv(emitter: Emitter, step: Step, **name: str) -> Any:
    if len(emitter.shape(step)) != 4:
        raise _refused(step, f"of {len(emitter.shape(step)) - 2} dimensions")
    layer = partial(
        builder().conv, x=emitter.tensor(step.inputs[0]), groups=emitter.shared(step.attributes.get("group", 1)),
        dilations=emitter.shared(list(step.attributes.get("dilations", [1, 1]))), **_window(emitter, step),
    )  # fmt: skip
    return _weighted(emitter, step, layer, 1, name)


def _gemm(emitter: Emitter, step: Step, **name: str) -> Any:
    _only(step, alpha=(1.0,), beta=(1.0,), transA=(0,), transB=(1,))
    return _weighted(emitter, step, partial(builder().linear, x=emitter.tensor(step.inputs[0])), 1, name)


def _unary(word: str, emitter: Emitter, step: Step, **name: str) -> Any:
    return getattr(builder(), word)(x=emitter.tensor(step.inputs[0]), **name)


def _binary(word: str, emitter: Emitter, step: Step, **name: str) -> Any:
    x, y = (emitter.tensor(given) for given in step.inputs)
    return getattr(builder(), word)(x=x, y=y, **name)


def _clip(emitter: Emitter, step: Step, **name: str) -> Any:
    x, (low, high) = emitter.tensor(step.inputs[0]), [*step.inputs[1:], "", ""][:2]
    ends = [
        np.float32(end if not given else emitter.needed_constant(step, place))
        for place, (given, end) in enumerate(((low, -np.inf), (high, np.inf)), start=1)
    ]
    if np.isfinite(ends).all() and ends[0] >= ends[1]:  # which `clip` refuses
        return builder().minimum(x=builder().maximum(x=x, y=ends[0]), y=ends[1], **name)
    if np.isfinite(ends).all():
        return builder().clip(x=x, alpha=ends[0], beta=ends[1], **name)
    if np.isinf(ends[1]):
        return builder().maximum(x=x, y=ends[0], **name)
    return builder().minimum(x=x, y=ends[1], **name)


def _pool(word: str, emitter: Emitter, step: Step, **name: str) -> Any:
    _only(step, dilations=([1, 1],), storage_order=(0,))
    inside = {}
    if word == "avg_pool":
        _only(step, ceil_mode=(0,))
        inside["exclude_padding_from_average"] = not step.attributes.get("count_include_pad", 0)
    return getattr(builder(), word)(
        x=emitter.tensor(step.inputs[0]), kernel_sizes=list(step.attributes["kernel_shape"]),
        ceil_mode=bool(step.attributes.get("ceil_mode", 0)), **_window(emitter, step), **inside, **name,
    )  # fmt: skip


def _reduce(word: str, emitter: Emitter, step: Step, **name: str) -> Any:
    axes = step.attributes.get("axes")
    if axes is None and given_input(step, 1):
        axes = emitter.needed_constant(step, 1).tolist()
    if not axes:  # which means all
        _only(step, noop_with_empty_axes=(0,))
    both = {"axes": list(axes)} if axes else {}
    return getattr(builder(), word)(
        x=emitter.tensor(step.inputs[0]), keep_dims=bool(step.attributes.get("keepdims", 1)), **both, **name
    )


def _global_pool(emitter: Emitter, step: Step, **name: str) -> Any:
    return builder().reduce_mean(x=emitter.tensor(step.inputs[0]), axes=[2, 3], keep_dims=True, **name)


def _reshape(emitter: Emitter, step: Step, **name: str) -> Any:
    return builder().reshape(x=emitter.tensor(step.inputs[0]), shape=list(emitter.shape(step)), **name)


def _concat(emitter: Emitter, step: Step, **name: str) -> Any:
    values = [emitter.tensor(given) for given in step.inputs]
    return builder().concat(values=values, axis=step.attributes["axis"], **name)


def _transpose(emitter: Emitter, step: Step, **name: str) -> Any:
    order = step.attributes.get("perm", range(len(emitter.shape(step)))[::-1])
    return builder().transpose(x=emitter.tensor(step.inputs[0]), perm=list(order), **name)


def _pad(emitter: Emitter, step: Step, **name: str) -> Any:
    _only(step, mode=(b"constant",))
    pads, given = emitter.needed_constant(step, 1), given_input(step, 2)
    if given_input(step, 3):
        raise _refused(step, "of some axes")
    value = float(emitter.needed_constant(step, 2)) if given else 0.0
    turned = pads.reshape(2, -1).T.reshape(-1).tolist()
    return builder().pad(
        x=emitter.tensor(step.inputs[0]), pad=turned, mode="constant", constant_val=np.float32(value), **name
    )


def _gather(emitter: Emitter, step: Step, **name: str) -> Any:
    x, indices = (emitter.tensor(given) for given in step.inputs)
    return builder().gather(x=x, indices=indices, axis=step.attributes.get("axis", 0), **name)


def _where(emitter: Emitter, step: Step, **name: str) -> Any:
    """Core ML's `select` has the shape of its values alone, so that one of them must have the whole one."""
    cond, a, b = (emitter.tensor(given) for given in step.inputs)
    if emitter.shape(step) not in (a.shape, b.shape):
        zeros = builder().mul(x=builder().cast(x=cond, dtype="fp32"), y=np.float32(0))
        b = builder().add(x=zeros, y=b)
    return builder().select(cond=cond, a=a, b=b, **name)


def _cast(emitter: Emitter, step: Step, **name: str) -> Any:
    _only(step, to=tuple(KINDS))
    return builder().cast(x=emitter.tensor(step.inputs[0]), dtype=KINDS[step.attributes["to"]], **name)


def _split(emitter: Emitter, step: Step, **name: str) -> Sequence[Any]:
    axis = step.attributes.get("axis", 0)
    sizes = [emitter.steps.shapes[output][axis] for output in step.outputs]
    return builder().split(x=emitter.tensor(step.inputs[0]), split_sizes=sizes, axis=axis, **name)


def _slice(emitter: Emitter, step: Step, **name: str) -> Any:
    x, rank = emitter.tensor(step.inputs[0]), len(emitter.shape(step))
    starts, ends = (emitter.needed_constant(step, place).tolist() for place in (1, 2))
    places = [emitter.needed_constant(step, i).tolist() if given_input(step, i) else None for i in (3, 4)]
    axes, strides = places[0] or list(range(len(starts))), places[1] or [1] * len(starts)
    begin, end, stride = [0] * rank, list(x.shape), [1] * rank
    for axis, first, last, step_size in zip(axes, starts, ends, strides, strict=True):
        size = x.shape[axis]
        begin[axis], end[axis], stride[axis] = slice(first, last, step_size).indices(size)
    if min(stride) < 1:
        raise _refused(step, "that runs backwards")
    return builder().slice_by_index(x=x, begin=begin, end=end, stride=stride, **name)


def _softmax(emitter: Emitter, step: Step, **name: str) -> Any:
    x = emitter.tensor(step.inputs[0])
    return builder().softmax(x=x, axis=step.attributes.get("axis", -1), **name)


def _prelu(emitter: Emitter, step: Step, **name: str) -> Any:
    """One slope for each channel, [C, 1, 1]; or one for all."""
    x, slope = emitter.tensor(step.inputs[0]), emitter.needed_constant(step, 1).astype(np.float32)
    return builder().prelu(x=x, alpha=np.broadcast_to(slope.reshape(-1), x.shape[1:2]).copy(), **name)


def _leaky(emitter: Emitter, step: Step, **name: str) -> Any:
    alpha = np.float32(step.attributes.get("alpha", 0.01))
    return builder().leaky_relu(x=emitter.tensor(step.inputs[0]), alpha=alpha, **name)


def _hard_sigmoid(emitter: Emitter, step: Step, **name: str) -> Any:
    ends = [np.float32(step.attributes.get(part, value)) for part, value in (("alpha", 0.2), ("beta", 0.5))]
    return builder().sigmoid_hard(x=emitter.tensor(step.inputs[0]), alpha=ends[0], beta=ends[1], **name)


def _hard_swish(emitter: Emitter, step: Step, **name: str) -> Any:
    x = emitter.tensor(step.inputs[0])
    gate = builder().sigmoid_hard(x=x, alpha=np.float32(1 / 6), beta=np.float32(0.5))
    return builder().mul(x=x, y=gate, **name)


def _reciprocal(emitter: Emitter, step: Step, **name: str) -> Any:
    return builder().real_div(x=np.float32(1), y=emitter.tensor(step.inputs[0]), **name)


def _negative(emitter: Emitter, step: Step, **name: str) -> Any:
    return builder().mul(x=emitter.tensor(step.inputs[0]), y=np.float32(-1), **name)


def _is_infinite(emitter: Emitter, step: Step, **name: str) -> Any:
    _only(step, detect_negative=(1,), detect_positive=(1,))
    size = builder().abs(x=emitter.tensor(step.inputs[0]))
    return builder().greater(x=size, y=np.finfo(np.float32).max, **name)


def _is_nan(emitter: Emitter, step: Step, **name: str) -> Any:
    x = emitter.tensor(step.inputs[0])
    return builder().not_equal(x=x, y=x, **name)


UNARY = {
    "Abs": "abs", "Ceil": "ceil", "Erf": "erf", "Exp": "exp", "Floor": "floor", "Identity": "identity",
    "Not": "logical_not", "Relu": "relu", "Round": "round", "Sigmoid": "sigmoid", "Sign": "sign",
    "Softplus": "softplus", "Sqrt": "sqrt", "Tanh": "tanh",
}  # fmt: skip
BINARY = {
    "Add": "add", "And": "logical_and", "Div": "real_div", "Equal": "equal", "Greater": "greater",
    "GreaterOrEqual": "greater_equal", "Less": "less", "LessOrEqual": "less_equal", "MatMul": "matmul",
    "Max": "maximum", "Min": "minimum", "Mul": "mul", "Or": "logical_or", "Pow": "pow", "Sub": "sub",
}  # fmt: skip
REDUCTIONS = {
    "ReduceMax": "reduce_max",
    "ReduceMean": "reduce_mean",
    "ReduceMin": "reduce_min",
    "ReduceSum": "reduce_sum",
}

OPERATORS: dict[str, Emit] = {
    **{name: partial(_unary, word) for name, word in UNARY.items()},
    **{name: partial(_binary, word) for name, word in BINARY.items()},
    **{name: partial(_reduce, word) for name, word in REDUCTIONS.items()},
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "AveragePool": partial(_pool, "avg_pool"), "Cast": _cast, "Clip": _clip, "Concat": _concat, "Conv": _conv,
    "Gather": _gather, "Gemm": _gemm, "GlobalAveragePool": _global_pool, "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "IsInf": _is_infinite, "IsNaN": _is_nan, "LeakyRelu": _leaky,
    "MaxPool": partial(_pool, "max_pool"), "Neg": _negative,
    "PRelu": _prelu, "Pad": _pad, "Reciprocal": _reciprocal, "Slice": _slice, "Softmax": _softmax, "Split": _split,
    "Transpose": _transpose, "Where": _where,
}  # fmt: skip
"""What a package can hold: operator of ONNX -> what adds it, given an `Emitter`, the step, and perhaps a name."""
