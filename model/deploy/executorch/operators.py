"""The operators of a network's graph that ExecuTorch's files hold in another form than LiteRT's.

XNNPACK multiplies integers and gives floats where the activations of a layer are quantized dynamically: it takes the
lowest and the highest value of an image for the codes -128 and 127, and adds a bias in float. Our activations have
codes already. Therefore they get one more channel that holds 255, or two that hold 127 and -128, with weights of zero.
Then XNNPACK's scale is exactly 1, its codes are ours, and the sums of products are exact integers, which become float32
behind the sum. Layers whose sums could pass 2^31 are multiplied in float.
"""

from __future__ import annotations

import numpy as np

from model.deploy.codes import ActivationCodes, Array, WeightCodes, sum_range
from model.deploy.executorch.nodes import GraphBuilder, rounded, scalar
from model.deploy.executorch.nodes import step as node
from model.deploy.litert import operators as litert
from model.deploy.litert.network import LitertNetwork, arranged
from model.deploy.steps import Step, Steps

BOTTOM, TOP = -128, 127  # of XNNPACK's codes
LARGEST_SUM = 2**31 - 1


class ExecutorchNetwork(LitertNetwork):
    """The graph under construction, and what is known of the steps that become its nodes.

    Attributes:
        graph: gets values and nodes.
        activations: the quantizers of activations whose codes are tensors of the graph, by the name of their values.
    """

    engine = "ExecuTorch"

    def __init__(self, steps: Steps) -> None:
        self.graph = GraphBuilder()
        super().__init__(steps, self.graph)
        self.activations: dict[str, ActivationCodes] = {}
        self._quantizers = {
            step.outputs[0]: step.activation for step in steps.steps if step.activation is not None
        }

    def factors(self, x: str, filters: str) -> tuple[str, str] | None:
        """The codes of an activation and of a weight, quantized for XNNPACK; None where a side has none of 8 bits."""
        activation, weight = self.activations.get(x), self.weight(filters)
        if activation is None or weight is None or not multiplies_codes(weight):
            return None
        ends = (TOP, BOTTOM) if activation.lowest < 0 else (TOP - BOTTOM,)
        if activation.lowest < BOTTOM or activation.highest > ends[0]:
            return None
        lowest, highest = sum_range(weight, activation)
        if max(-lowest.min(), highest.max()) > LARGEST_SUM:
            return None
        source, shape = f"{x}.codes", list(self.physical(self.shape(x)))
        for end in ends:
            shape[-1] += 1
            name = f"{source}.{end}"
            if name not in self.graph.ids:
                after = [0] * (len(shape) - 1) + [1]
                node(
                    self.graph, "StaticConstantPad", [source], name, shape, pre_paddings=[0] * len(shape),
                    post_paddings=after, padding_value=float(end),
                )  # fmt: skip
            source = name
        stored = arranged(with_channels(weight.codes, len(ends)), False)
        scale = np.broadcast_to(weight.scale.reshape(-1), len(stored)) * np.float64(activation.scale)
        codes = self.graph.codes(f"{weight.name}.codes", stored, scale, 0)
        return self.graph.dynamic(f"{x}.quantized", source, len(shape) - 1), codes

    def operand(self, name: str, rank: int = 0) -> str:
        """A tensor for a node's input; codes are multiplied by their scale where something reads the product."""
        if self.weight(name) is not None:
            return self.float_filters(name, False)
        step = self._quantizers.get(name)
        if step is None or name in self.graph.ids:
            return super().operand(name, rank)
        scale = step.scale if step.integer else 1.0
        return self.add("MUL", [f"{name}.codes", scalar(self.graph, scale)], name)

    def float_filters(self, name: str, depthwise: bool) -> str:
        """A weight as float32; empty where it is computed."""
        weight = self.weight(name)
        if weight is not None:
            self.float_weights.append(weight.name)
            return self.graph.constant(weight.name, arranged(weight.values(), depthwise))
        value = self.known(name)
        return (
            "" if value is None else self.graph.constant(name, arranged(value.astype(np.float32), depthwise))
        )


def multiplies_codes(weight: WeightCodes) -> bool:
    """Whether a weight is integers of 8 bits times a scale for each output channel."""
    per_channel = weight.scale.size == 1 or weight.scale.shape[0] == weight.scale.size == len(weight.codes)
    return weight.scaled and per_channel and np.abs(weight.codes).max() <= TOP


def with_channels(codes: Array, count: int) -> Array:
    """The codes of a weight [out, in, ...] with further channels of zeros.

    Example:
        >>> import numpy as np
        >>> from model.deploy.executorch.operators import with_channels
        >>> with_channels(np.array([[1, -1]]), 2)
        array([[ 1, -1,  0,  0]])
    """
    return np.pad(codes, [(0, 0), (0, count), *[(0, 0)] * (codes.ndim - 2)])


def activation(network: ExecutorchNetwork, step: Step) -> None:
    """A quantizer: x / step, rounded with ties to even, within its levels, times the scale."""
    codes, graph = step.activation, network.graph
    assert codes is not None
    x, name = network.operand(step.inputs[0]), step.outputs[0]
    shape = network.physical(network.shape(name))
    if codes.integer and codes.step is not None:
        x = node(graph, "Div", [x, scalar(graph, codes.step)], f"{name}.steps", shape)
        rounded(graph, x, graph.tensor(f"{name}.codes", shape), (codes.lowest, codes.highest))
    else:
        node(graph, "Copy", [x], f"{name}.codes", shape)
    if codes.integer:
        network.activations[name] = codes


def convolution(network: ExecutorchNetwork, step: Step) -> None:
    """A convolution: of codes where both sides have some and there is one group."""
    shape, found = network.shape(step.inputs[1]), step.attributes
    if len(shape) != 4 or found.get("auto_pad", b"NOTSET") not in (b"NOTSET", "NOTSET"):
        raise network.refuse(
            step, "its images have other than two dimensions, or its padding depends on them"
        )
    channels, group = network.shape(step.inputs[0])[1], found.get("group", 1)
    depthwise = group > 1 and group == channels
    factors = network.factors(step.inputs[0], step.inputs[1]) if group == 1 else None
    if factors is None:
        factors = network.operand(step.inputs[0]), network.float_filters(step.inputs[1], depthwise)
    if not factors[1]:
        raise network.refuse(step, "its weight is computed")
    top, left, bottom, right = found.get("pads", [0] * 4)
    strides, dilations = (found.get(name, [1, 1]) for name in ("strides", "dilations"))
    network.file.tensor(step.outputs[0], network.physical(network.shape(step.outputs[0])))
    network.graph.node(
        "DepthwiseConv2d" if depthwise else "Conv2d", [*factors, litert.bias(network, step, shape[0])], step.outputs[0],
        padding_top=top, padding_right=right, padding_bottom=bottom, padding_left=left, kernel_height=shape[2],
        kernel_width=shape[3], subsampling_height=strides[0], subsampling_width=strides[1],
        dilation_height=dilations[0], dilation_width=dilations[1],
        group_input_channels=network.graph.shapes[factors[0]][-1] // group, group_output_channels=shape[0] // group,
        groups=group, adjustment_height=0, adjustment_width=0,
    )  # fmt: skip


def linear(network: ExecutorchNetwork, step: Step) -> None:
    """A linear layer: of codes where both sides have some."""
    form = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | dict(step.attributes)
    if form != {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}:
        raise network.refuse(step, "it is no linear layer")
    factors = network.factors(step.inputs[0], step.inputs[1])
    if factors is None:
        factors = network.operand(step.inputs[0]), network.float_filters(step.inputs[1], False)
    if not factors[1]:
        raise network.refuse(step, "its weight is computed")
    bias = litert.bias(network, step, network.shape(step.inputs[1])[0])
    network.file.tensor(step.outputs[0], network.shape(step.outputs[0]))
    network.graph.node("FullyConnected", [*factors, bias], step.outputs[0])


def cast(network: ExecutorchNetwork, step: Step) -> None:
    """Numbers of another kind, which are all floats here: whole ones without their fraction."""
    kind, x, name = litert.KINDS.get(step.attributes["to"]), step.inputs[0], step.outputs[0]
    if kind == "int32" and network.is_float([x]):
        shape, source = network.physical(network.shape(name)), network.operand(x)
        size = network.add("ABS", [source], f"{name}.size", shape)
        whole = network.add("FLOOR", [size], f"{name}.whole", shape)
        sign = network.add("SIGN", [source], f"{name}.sign", shape)
        network.add("MUL", [whole, sign], name, kind=kind)
        return
    litert.cast(network, step)


OPERATORS = litert.OPERATORS | {"Activation": activation, "Cast": cast, "Conv": convolution, "Gemm": linear}
"""Operator of the graph -> what writes it; see `model.deploy.steps`."""
