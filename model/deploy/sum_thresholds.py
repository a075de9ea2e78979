"""Thresholds on the integer sums of a layer, which stand for all that lies between the layer and a quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from model.deploy.codes import ActivationCodes, Array
from model.deploy.graph import OPSET
from model.deploy.nodes import tensor_attributes
from model.deploy.onnx_qdq import PRODUCTS

if TYPE_CHECKING:
    from onnx import NodeProto

SAMPLES = 4096  # sums of a channel that are compared with its thresholds; all, where there are no more
NEIGHBOURS = 8  # how far from each threshold two of them lie besides
# Operators on single elements; whether what they do together is increasing is computed.
ELEMENTWISE = frozenset(
    {
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Relu",
        "LeakyRelu",
        "PRelu",
        "Clip",
        "Max",
        "Min",
        "HardSigmoid",
        "HardSwish",
    }
    | {
        "Sigmoid",
        "Tanh",
        "Softplus",
        "Elu",
        "Erf",
        "Round",
        "Floor",
        "Ceil",
        "Sign",
        "Cast",
        "BatchNormalization",
    }
    | {"Where", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "Not", "And", "Or", "Neg", "Abs"}
    | {"Shape", "Expand"}  # zeros of the same shape, from which codes are counted
)


class NoThresholds(Exception):
    """Why thresholds on integers do not stand for what lies in between; for the user."""


@dataclass(frozen=True, kw_only=True)
class Between:
    """What lies between the sums of a layer and a quantizer.

    Attributes:
        source: the tensor of the sums.
        result: the quantizer's input.
        nodes: operators on single elements, pools for maxima and paddings by zeros, in an order in which they run.
        constants: by name.
        rank: of the tensors.
    """

    source: str
    result: str
    nodes: tuple[NodeProto, ...]
    constants: Mapping[str, Array]
    rank: int

    @property
    def pools(self) -> tuple[NodeProto, ...]:
        """The pools, which commute with what is increasing."""
        return tuple(node for node in self.nodes if node.op_type == "MaxPool")

    @property
    def padding(self) -> NodeProto | None:
        """The padding, if there is one that adds places."""
        found = (node for node in self.nodes if node.op_type == "Pad" and self.constants[node.input[1]].any())
        return next(found, None)

    def __call__(self, sums: Array) -> tuple[Array, Array]:
        """The quantizer's input for sums, int [n, out] and increasing along n, and for padded places, [out].

        Raises:
            NoThresholds: a pool does not commute, or channels are no channels.
        """
        # The last is a padded place.
        values = np.concatenate([sums, np.zeros_like(sums[:1])]).astype(np.float32)
        values = values.reshape(*values.shape, *[1] * (self.rank - 2))
        shape, known = values.shape, {self.source: values}
        for node in self.nodes:
            given = next(known[name] for name in node.input if name in known)
            if node.op_type == "MaxPool":
                if (np.diff(given[:-1], axis=0) < 0).any():
                    raise NoThresholds("a pooling is behind a function that is not increasing")
                found = given
            elif node.op_type == "Pad":
                found = given.copy()
                found[-1] = 0
            else:
                inputs = {name: known.get(name, self.constants.get(name)) for name in node.input if name}
                found = _computed(node, inputs)
            if found.shape != shape and node.op_type != "Shape":
                raise NoThresholds(f"behind {node.op_type}, which is not alike at all places")
            known[node.output[0]] = found
        last = known[self.result].reshape(shape[0], -1)
        return last[:-1], last[-1]


def between(
    result: str,
    made: Mapping[str, NodeProto],
    ranks: Mapping[str, int],
    constants: Mapping[str, Array],
) -> Between:
    """What lies between a tensor and the sums that it comes from.

    Args:
        result: the tensor.
        made: the node that makes a tensor, by its name.
        ranks: of the tensors of sums, by their names.
        constants: by name.

    Raises:
        NoThresholds: it comes from something else too, or by an operator that mixes elements.
    """
    nodes: dict[str, NodeProto] = {}  # by their outputs, in an order in which they run
    found: set[str] = set()
    waiting = [result]
    while waiting:
        name = waiting[-1]
        if name in nodes or name in found or name in constants or not name:
            waiting.pop()
        elif name in ranks or (name in made and made[name].op_type in PRODUCTS):
            found.add(name)
        else:
            node = made.get(name)
            if node is None:
                raise NoThresholds("behind the image")
            _check_passed(node, constants)
            missing = [other for other in node.input if other not in (*nodes, *found, *constants, "")]
            if missing:
                waiting += missing
            else:
                nodes[name] = node
    if len(found) != 1:
        raise NoThresholds("behind a sum of several layers")
    (source,) = found
    if source not in ranks:
        raise NoThresholds(f"behind {made[source].op_type} in float")
    order = list(nodes.values())
    places = [i for i, node in enumerate(order) if node.op_type in ("Pad", "MaxPool")]
    for i in places:
        # It moves to another place, which is right only where all that follows comes from it.
        if {source, *nodes}.difference(list(nodes)[i:]).intersection(
            name for node in order[i + 1 :] for name in node.input
        ):
            raise NoThresholds(f"behind {order[i].op_type} of one branch")
        if order[i].op_type == "Pad" and i != places[-1]:
            raise NoThresholds("behind a padding, which thresholds do not pass")
    return Between(source=source, result=result, nodes=tuple(order), constants=constants, rank=ranks[source])


def _check_passed(node: NodeProto, constants: Mapping[str, Array]) -> None:
    operator = node.op_type
    if operator == "MultiThreshold":
        raise NoThresholds("behind another quantizer")
    pads = operator == "Pad" and _pads_zeros(node, constants)
    if node.domain or not (operator in ELEMENTWISE or operator == "MaxPool" or pads) or len(node.output) != 1:
        raise NoThresholds(f"behind {operator}, which thresholds do not pass")


def _pads_zeros(node: NodeProto, constants: Mapping[str, Array]) -> bool:
    """Whether a node `Pad` surrounds its input by zeros."""
    if tensor_attributes(node).get("mode", b"constant") != b"constant" or any(node.input[3:]):
        return False
    value, pads = node.input[2] if len(node.input) > 2 else "", constants.get(node.input[1])
    if pads is None or pads.reshape(2, -1)[:, :2].any():  # of the batch or of channels
        return False
    return not (value and constants.get(value, np.ones(1)).any())


def _computed(node: NodeProto, inputs: Mapping[str, Array | None]) -> Array:
    """What an operator makes of its inputs."""
    from onnx.reference import ReferenceEvaluator

    with np.errstate(all="ignore"):
        (found,) = ReferenceEvaluator(node, opsets={"": OPSET}).run(None, dict(inputs))
    return np.asarray(found)


def integer_thresholds(
    function: Between, lowest: Array, highest: Array, codes: ActivationCodes
) -> tuple[Array, int]:
    """The least sums whose codes are above the lowest one, by 1, by 2 and so on.

    They are found by bisection, and compared with the codes of `SAMPLES` sums and of those around each threshold.

    Args:
        function: what lies in between.
        lowest: the lowest sum of each channel, int64 [out].
        highest: the highest sum, likewise.
        codes: of the quantizer.

    Returns:
        Thresholds, int64 [out, levels - 1], `highest` + 1 where no sum has such a code; and the code of padded places.

    Raises:
        NoThresholds: codes do not increase with the sum, or padded places have no common code.
    """
    edges = real_thresholds(codes)
    numbers = np.arange(1, len(edges) + 1)[:, None]
    low = np.broadcast_to(lowest, (len(edges), len(lowest)))
    high = np.broadcast_to(highest + 1, low.shape)
    while (low < high).any():
        middle = (low + high) // 2
        reached = np.searchsorted(edges, function(middle)[0], side="right") >= numbers
        low, high = np.where(reached, low, middle + 1), np.where(reached, middle, high)
    share = np.linspace(0, 1, min(SAMPLES, int((highest - lowest).max()) + 1))[:, None]
    sums = np.round(lowest + share * (highest - lowest)).astype(np.int64)
    sides = [low + apart for apart in (-NEIGHBOURS, -1, 0, NEIGHBOURS)]
    sums = np.sort(np.concatenate([sums, *(np.clip(side, lowest, highest) for side in sides)]), axis=0)
    found, padded = function(sums)
    wanted = np.searchsorted(edges, found, side="right")
    for channel in range(len(lowest)):
        got = np.searchsorted(np.sort(low[:, channel]), sums[:, channel], side="right")
        if (got != wanted[:, channel]).any():
            raise NoThresholds("its codes do not increase with the sum")
    outside = np.searchsorted(edges, padded, side="right")
    if function.padding is not None and np.ptp(outside):
        raise NoThresholds("its padding has other codes in each channel")
    return low.T, codes.lowest + int(outside[0]) * (2 if codes.signs else 1)


def real_thresholds(codes: ActivationCodes) -> Array:
    """The least float32 numbers whose codes are above the lowest one, by 1, by 2 and so on, float32 [levels - 1].

    Example:
        >>> from model.deploy.codes import ActivationCodes
        >>> from model.deploy.sum_thresholds import real_thresholds
        >>> real_thresholds(ActivationCodes(name="a", levels=4, highest=3, step=1.0))  # ties to even
        array([0.50000006, 1.5       , 2.5000002 ], dtype=float32)
    """
    if codes.signs:
        return np.zeros(1, np.float32)
    numbers = np.arange(codes.lowest + 1, codes.highest + 1)
    if codes.step is None:  # codes come in
        return (numbers - 0.5).astype(np.float32)
    step = np.float32(codes.step)
    place = ((numbers - 0.5) * float(step)).astype(np.float32)
    for _ in range(4):  # a quotient of float32 numbers is rounded, so that the place may be some numbers off
        below = np.nextafter(place, np.float32(-np.inf))
        place = np.where(np.round(below / step) >= numbers, below, place)
        place = np.where(np.round(place / step) < numbers, np.nextafter(place, np.float32(np.inf)), place)
    return place.astype(np.float32)
