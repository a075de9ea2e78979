"""ONNX with integer weights and thresholds instead of scales and roundings, for FPGA tools.

A quantizer of activations is qonnx's `MultiThreshold`: its code is the lowest one plus the number of thresholds that
the input has reached. Behind a convolution of codes the input is the integer sum of products itself. Scale, bias, norm
and activation in between move into the thresholds, which are integers for each channel:

    code = lowest + #{k : sum >= threshold[channel, k]}

This is what FINN calls streamlining (Umuroglu and Jahre, arXiv 1709.04060, section 4). Here each threshold is found by
computing what lies in between for all sums that can occur.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from model.deploy.codes import ActivationCodes, Array, WeightCodes, sum_range
from model.deploy.graph import DeployGraph
from model.deploy.nodes import DOMAIN, initializers, node_key, tensor_attributes
from model.deploy.onnx_qdq import Builder, complete_model
from model.deploy.qonnx_quant import QONNX, quant_bits
from model.deploy.steps import ACTIVATION, shapes_of
from model.deploy.sum_thresholds import NoThresholds, between, integer_thresholds, real_thresholds
from utils.errors import UserError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

CODES = "codes"  # entry of the metadata: the values of codes, by the name of the quantizer
DATATYPE = "finn_datatype"  # the key by which qonnx finds a tensor's datatype
RANKS = (2, 4)  # dimensions of a tensor that MultiThreshold takes
MOST_VALUES = (
    2**24
)  # integers that float32 holds, and sums of all channels that are computed to find thresholds


@dataclass(frozen=True, kw_only=True)
class ThresholdsModel:
    """A network by thresholds.

    Attributes:
        model: an ONNX model; see `thresholds_model`.
        integer: names of the quantizers whose thresholds are integers.
        real: those with thresholds on float values, and why.
        unchanged: those whose levels are computed in float, and why.
    """

    model: ModelProto
    integer: tuple[str, ...]
    real: Mapping[str, str]
    unchanged: Mapping[str, str]

    def __str__(self) -> str:
        """For the user: how many are integers, and the first reasons why others are not."""
        count = len(self.integer) + len(self.real) + len(self.unchanged)
        line = f"integer thresholds: {len(self.integer)} of {count} quantizers of activations"
        others = [f"{name} ({why})" for name, why in (*self.real.items(), *self.unchanged.items())]
        more = f" and {len(others) - 2} more" if len(others) > 2 else ""
        return line if not others else f"{line}; in float: {', '.join(others[:2])}{more}"


def thresholds_model(graph: DeployGraph) -> ThresholdsModel:
    """The network by integer weights and thresholds.

    The codes of a quantizer NAME are the tensor `NAME.codes`, in float32 as all tensors are; the entry `codes` of the
    metadata has the value of the code 1. Datatypes of weights, sums, codes and thresholds are annotated. A batch is one
    image, since qonnx takes fixed shapes alone.

    Raises:
        UserError: a quantizer's tensor is neither images nor a row of numbers, which MultiThreshold does not take.

    Example:
        >>> from torch import nn
        >>> from model.convert import quantize
        >>> from model.deploy.graph import deploy_graph
        >>> from model.deploy.qonnx_thresholds import thresholds_model
        >>> from model.quant import QuantConfig, QuantizerConfig
        >>> network = nn.Sequential(
        ...     nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 2)
        ... )
        >>> parts = {tag: QuantizerConfig(tag=tag, enable=True, method="lsq", levels=4) for tag in ("fm", "wt")}
        >>> _ = quantize(network, QuantConfig(**parts))
        >>> thresholds_model(deploy_graph(network, (3, 1, 1))).integer
        ('3.quant_activation',)
    """
    model, shapes = copy.deepcopy(graph.model), shapes_of(graph.model)
    made = _Streamlined(graph)
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type == ACTIVATION and len(shapes[node.output[0]]) not in RANKS:
            raise UserError(
                f"{node_key(node)}: thresholds files hold images and rows of numbers, and this tensor has "
                f"{len(shapes[node.output[0]])} dimensions; export --to qonnx"
            )
        made.take(node)
    scales = {name: codes.scale for name, codes in graph.activations.items() if codes.integer}
    complete = complete_model(model, made.builder, graph.metadata | {CODES: json.dumps(scales)})
    for value in (*complete.graph.input, *complete.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    _annotate(complete, made.kinds)
    return ThresholdsModel(
        model=complete, integer=tuple(made.integer), real=made.real, unchanged=made.unchanged
    )


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """The integer sums of a layer: between what they lie, int64 [out], and the rank of their tensor."""

    lowest: Array
    highest: Array
    rank: int


class _Streamlined:
    """Takes the nodes of a graph in their order, and adds to `builder` what stands for them."""

    def __init__(self, graph: DeployGraph) -> None:
        self.graph, self.builder = graph, Builder()
        self.constants = initializers(graph.model)
        self.made: dict[str, NodeProto] = {}  # in the new graph, by their outputs
        self.sums: dict[str, _Sums] = {}  # by their tensor
        self.codes: dict[str, ActivationCodes] = {}  # by the tensor of the values
        self.weights: dict[str, WeightCodes] = {}  # by their tensor
        self.kinds: dict[str, str] = {}  # qonnx's datatypes, by tensor
        self.integer: list[str] = []
        self.real: dict[str, str] = {}
        self.unchanged: dict[str, str] = {}
        self._renamed: dict[str, str] = {}

    def take(self, node: NodeProto) -> None:
        """Add what stands for one node."""
        for i, name in enumerate(node.input):
            node.input[i] = self._renamed.get(name, name)
        if node.domain == DOMAIN and node.op_type == "Weight":
            weight = self.graph.weights[node_key(node)]
            self.weights[weight.name] = weight
            self._renamed[node.output[0]] = self.builder.constant(weight.name, weight.values(), np.float32)
        elif node.domain == DOMAIN:
            self._renamed[node.output[0]] = self._activation(node)
        elif self._product(node):
            self._layer(node)
        else:
            self._add_node(node)

    def _add_node(self, node: NodeProto) -> None:
        self.builder.nodes.append(node)
        self.made.update((name, node) for name in node.output)

    def _add(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.builder.add(operator, inputs, output, **attributes)
        self.made[output] = self.builder.nodes[-1]
        return output

    def _constant(self, name: str, value: Array) -> str:
        self.constants[name] = np.asarray(value, np.float32)
        return self.builder.constant(name, value, np.float32)

    def _product(self, node: NodeProto) -> bool:
        """Whether a node multiplies codes by integers."""
        if node.op_type not in ("Conv", "Gemm") or node.input[0] not in self.codes:
            return False
        weight, attributes = self.weights.get(node.input[1]), tensor_attributes(node)
        if weight is None or not weight.scaled or weight.scale.size not in (1, len(weight.codes)):
            return False
        if any(self.constants.get(name, np.empty(())).ndim != 1 for name in node.input[2:] if name):
            return False  # a bias that is computed
        plain = node.op_type == "Conv" or (
            attributes.get("transB") == 1 and not attributes.get("transA")
            and attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        )  # fmt: skip
        lowest, highest = sum_range(weight, self.codes[node.input[0]])
        return plain and max(-lowest.min(), highest.max()) < MOST_VALUES

    def _layer(self, node: NodeProto) -> None:
        """The sums of products of codes, and behind them scale and bias."""
        weight, codes = self.weights[node.input[1]], self.codes[node.input[0]]
        base = weight.name.removesuffix(".quant_weight")
        matrix = node.op_type == "Gemm"  # which qonnx cannot convert without a bias
        operator, attributes = ("MatMul", {}) if matrix else (node.op_type, tensor_attributes(node))
        integers = self._constant(f"{weight.name}.codes", weight.codes.T if matrix else weight.codes)
        self.kinds[integers] = _kind(weight.lowest, int(weight.codes.max()), odd=weight.gap == 2)
        lowest, highest = sum_range(weight, codes)
        sums = self._add(operator, [f"{codes.name}.codes", integers], f"{base}.sums", **attributes)
        self.kinds[sums] = _kind(int(lowest.min()), int(highest.max()))
        shape = (1, -1, *[1] * (weight.codes.ndim - 2))
        scale = np.broadcast_to(weight.scale.reshape(-1) * np.float32(codes.scale), len(weight.codes))
        self.sums[sums] = _Sums(lowest=lowest, highest=highest, rank=weight.codes.ndim)
        factor = self._constant(f"{base}.sum_scale", scale.reshape(shape))
        if len(node.input) < 3 or not node.input[2]:
            self._add("Mul", [sums, factor], node.output[0])
            return
        scaled = self._add("Mul", [sums, factor], f"{base}.scaled")
        bias = self._constant(f"{base}.sum_bias", self.constants[node.input[2]].reshape(shape))
        self._add("Add", [scaled, bias], node.output[0])

    def _activation(self, node: NodeProto) -> str:
        codes = self.graph.activations[node_key(node)]
        name, x = codes.name, node.input[0]
        if not codes.integer:
            self.unchanged[name] = codes.reason
            return self._add("Identity", [x], name)
        self.codes[name] = codes
        padding: tuple[NodeProto, int] | None = None
        try:
            x, places, padding = self._integer_thresholds(x, codes)
        except NoThresholds as reason:
            self.real[name], places = str(reason), real_thresholds(codes).reshape(1, -1)
        else:
            self.integer.append(name)
        steps = self._constant(f"{name}.thresholds", places)
        kind = _kind(codes.lowest, codes.highest, odd=codes.signs)
        if name not in self.real:
            self.kinds[steps] = _kind(int(places.min()), int(places.max()))
        gap = 2 if codes.signs else 1
        self.kinds[f"{name}.codes"] = kind
        output = f"{name}.codes" if padding is None else f"{name}.unpadded"
        self.kinds[output] = kind
        result = self._add(
            "MultiThreshold", [x, steps], output, domain=QONNX,
            out_dtype=kind, out_scale=float(gap), out_bias=float(codes.lowest),
        )  # fmt: skip
        if padding is not None:
            node, code = padding
            value = self.builder.constant(f"{name}.padding", code, np.float32)
            result = self._add("Pad", [result, node.input[1], value], f"{name}.codes")
        scale = self._constant(f"{name}.scale", np.array(codes.scale))
        return self._add("Mul", [result, scale], name)

    def _integer_thresholds(
        self, x: str, codes: ActivationCodes
    ) -> tuple[str, Array, tuple[NodeProto, int] | None]:
        """An integer tensor that stands for `x`, its thresholds, and a padding by a code behind them."""
        ranks = {name: sums.rank for name, sums in self.sums.items()}
        function = between(x, self.made, ranks, self.constants)
        sums = self.sums[function.source]
        places, code = integer_thresholds(function, sums.lowest, sums.highest, codes)
        source = function.source
        for node in function.pools:
            source = self._pooled(node, source)
        return source, places, None if function.padding is None else (function.padding, code)

    def _pooled(self, node: NodeProto, source: str) -> str:
        """The largest sums of a pooling's windows."""
        name = f"{node.output[0]}.sums"
        if name not in self.made:
            self._add("MaxPool", [source], name, **tensor_attributes(node))
            self.kinds[name] = self.kinds[source]
        return name


def _kind(lowest: int, highest: int, *, odd: bool = False) -> str:
    """Qonnx's name of the smallest datatype from `lowest` to `highest`.

    Example:
        >>> from model.deploy.qonnx_thresholds import _kind
        >>> [_kind(*ends) for ends in ((0, 3), (0, 1), (-2, 1), (-1, 2), (-300, 5))]
        ['UINT2', 'BINARY', 'INT2', 'INT3', 'INT10']
        >>> _kind(-1, 1, odd=True), _kind(-1, 1)
        ('BIPOLAR', 'TERNARY')
    """
    if (lowest, highest) == (-1, 1):
        return "BIPOLAR" if odd else "TERNARY"
    bits, signed, _ = quant_bits(lowest, highest)
    return "BINARY" if (bits, signed) == (1, False) else f"{'INT' if signed else 'UINT'}{bits}"


def _annotate(model: ModelProto, kinds: Mapping[str, str]) -> None:
    """Say of which datatypes tensors are, where qonnx looks for it."""
    from onnx import StringStringEntryProto, TensorAnnotation

    used = {name for node in model.graph.node for name in (*node.input, *node.output)}
    for name, kind in kinds.items():
        if name in used:
            entry = StringStringEntryProto(key=DATATYPE, value=kind)
            model.graph.quantization_annotation.append(
                TensorAnnotation(tensor_name=name, quant_parameter_tensor_names=[entry])
            )
