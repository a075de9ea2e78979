"""One graph for all engines: float operators as torch exports them, and a node for each quantizer.

The nodes `Activation` and `Weight` belong to the operator domain `lowbit`; each engine's file replaces them by what
that engine computes with integers. Batch norms behind a quantized convolution are part of its weight and its bias.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from model.deploy.codes import (
    MOST_COMPARISONS,
    NUDGE,
    ActivationCodes,
    WeightCodes,
    activation_codes,
    is_even,
    weight_codes,
)
from model.deploy.level_thresholds import by_thresholds, thresholds
from model.deploy.nodes import DOMAIN, initializers, node_key
from model.deploy.offsets import offset_metadata, place_offsets
from model.deploy.packages import needed
from model.layers.quantized import quantized_layers
from model.quantizers.frame import Quantizer
from model.quantizers.grid import Grid
from model.quantizers.numbered import numbered
from utils.errors import UserError

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 18  # the oldest that torch's exporter writes
INPUT, OUTPUT = "input", "logits"
MOST_IMAGES = 2**16  # of a batch


@dataclass(frozen=True, kw_only=True)
class DeployGraph:
    """A network in evaluation mode as a graph; see the file.

    Attributes:
        model: an ONNX model with one input `input`, float32 [batch, channels, height, width], and one output `logits`,
            float32 [batch, classes]; the batch's size is free.
        activations: the quantizers of inputs and outputs, by the attribute `key` of their node `Activation`.
        weights: the quantized weights, by the attribute `key` of their node `Weight`.
        metadata: what travels in the files: class names, mean and so on, as text.
    """

    model: ModelProto
    activations: dict[str, ActivationCodes]
    weights: dict[str, WeightCodes]
    metadata: dict[str, str] = field(default_factory=dict)


def deploy_graph(
    network: nn.Module, shape: Sequence[int], *, metadata: dict[str, str] | None = None
) -> DeployGraph:
    """The graph of a network, which is not changed.

    Args:
        network: with or without quantizers, from wherever; float32, its quantizers past their warm-up.
        shape: channels, height and width of an image.
        metadata: what shall travel in the files.

    Raises:
        UserError: a quantizer has no form that engines take, or torch cannot export the network.

    Example:
        >>> from torch import nn
        >>> from model.convert import quantize
        >>> from model.deploy.graph import deploy_graph
        >>> from model.quant import QuantConfig, QuantizerConfig
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(2, 2))
        >>> wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
        >>> _ = quantize(network, QuantConfig(wt=wt))
        >>> graph = deploy_graph(network, (3, 1, 1))
        >>> {name: codes.codes.shape for name, codes in graph.weights.items()}
        {'1.quant_weight': (2, 4, 1, 1)}
    """
    needed("onnx", "onnxscript")
    # Behind channels-last weights torch exports a pooling to one place as a computed gather.
    network = copy.deepcopy(network).eval().to(memory_format=torch.contiguous_format)
    if not shape or any(size < 1 for size in shape):
        raise UserError(
            f"shape {tuple(shape)}: give channels, height and width of an image, such as (3, 32, 32)"
        )
    device = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))
    example = torch.rand(2, *shape, device=device, generator=torch.Generator(device).manual_seed(0))
    activations: dict[str, ActivationCodes] = {}
    weights: dict[str, WeightCodes] = {}
    try:
        inputs = _inputs(network, example)
    except UserError:
        raise
    except Exception as error:  # whatever the network raises
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the network does not run on float32 images of {'x'.join(map(str, shape))}: {first}"
        ) from error
    for name, layer in quantized_layers(network):
        for part, quantizer in layer.quantizers():
            key = f"{name}.{part}" if name else part
            if not quantizer.enabled:
                continue
            if not bool(quantizer.warmed_up()):
                raise UserError(
                    f"{key} is still in its warm-up (--stable): its trained network computes in float; train on"
                )
            if key not in inputs:
                raise UserError(f"{key}: the network never uses this layer, so that it cannot be exported")
            if part == "quant_weight":
                weights[key] = weight_codes(key, quantizer, inputs[key])
                mark = partial(_mark, "Weight", key)
                # What a weight is computed from is no part of the graph.
                vars(quantizer)["forward"] = (
                    partial(_constant, mark, inputs[key]) if layer.computes_weight() else mark
                )
            else:
                activations[key] = activation_codes(key, quantizer, inputs[key])
                vars(quantizer)["forward"] = _activation(quantizer, activations[key], inputs[key])
    model = _exported(network, example)
    _name_logits(model)
    weights = _fold_norms(model, weights)
    place_offsets(model, activations, weights)
    metadata = (metadata or {}) | offset_metadata(activations)
    return DeployGraph(model=model, activations=activations, weights=weights, metadata=metadata)


def _inputs(network: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """What each quantizer gets when the network runs."""
    found: dict[str, Tensor] = {}

    def keep(key: str, quantizer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if key in found and quantizer.enabled:
            raise UserError(
                f"{key}: the network uses this layer more than once, and files name each quantizer once; give each "
                "place a layer of its own, or export --to program"
            )
        found[key] = arguments[0].detach().float()

    hooks = [
        quantizer.register_forward_pre_hook(partial(keep, f"{name}.{part}" if name else part))
        for name, layer in quantized_layers(network)
        for part, quantizer in layer.quantizers()
    ]
    with torch.no_grad():
        network(example)
    for hook in hooks:
        hook.remove()
    return found


def _mark(operator: str, key: str, x: Tensor) -> Tensor:
    """A node of the own domain, of the shape of `x`."""
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{operator}", [x], attrs={"key": key}, dtype=torch.float32, shape=x.shape, version=1
    )


def _constant(mark: Callable[[Tensor], Tensor], value: Tensor, _: Tensor) -> Tensor:
    """A node for a constant, whatever the quantizer gets."""
    return mark(value)


def _activation(quantizer: Quantizer, codes: ActivationCodes, example: Tensor) -> Callable[[Tensor], Tensor]:
    """What stands for a quantizer of activations while the network is exported: x to a node `Activation`.

    The node gets x itself where its levels are evenly spaced multiples of a step, the codes where they are other
    integers, otherwise the levels in float. Codes with uneven distances, or uneven thresholds between them, come by
    comparisons, where these are not too many.
    """
    mark = partial(_mark, "Activation", codes.name)
    if codes.integer and codes.step is not None:
        return lambda x: mark(quantizer.normalise(x))
    grid = quantizer.search_grid()
    if codes.integer and not codes.signs and is_even(grid):
        nudge = _nudge(quantizer, grid, example)

        def code(x: Tensor) -> Tensor:
            numbers, _ = numbered(quantizer, x + nudge if nudge else x)
            return mark(numbers.float() * codes.gap + codes.lowest)

        return code
    if codes.integer and not codes.signs and codes.levels - 1 <= MOST_COMPARISONS:
        places, levels = thresholds(codes.name, quantizer, quantizer.normalise(example))
        numbers = (levels / codes.scale).round()
        return lambda x: mark(by_thresholds(quantizer.normalise(x), places, numbers))
    if codes.integer and not codes.signs:
        zero = quantizer.integers(example).zero_point
        return lambda x: mark((quantizer.integers(x).codes - zero).float())
    found = quantizer.integers(example)
    if found.scale is not None and not codes.signs:
        return lambda x: mark(_value(quantizer, x))
    places, levels = thresholds(codes.name, quantizer, quantizer.normalise(example))
    levels = levels.sign() if codes.signs else levels
    return lambda x: mark(by_thresholds(quantizer.normalise(x), places, levels))


def _nudge(quantizer: Quantizer, grid: Grid, example: Tensor) -> float:
    """What moves zero off the middle between two levels, to the side that it is rounded to; 0 for normalised values.

    Zeros are frequent, behind a ReLU and as padding. OpenVINO adds before it divides, where the formula divides before
    it adds, and so comes out on either side of the middle.
    """
    if quantizer.config.adaptive != "none":
        return 0.0
    zero = quantizer.integers(torch.zeros_like(example[:1]))
    assert zero.scale is not None
    clip = grid.top * float(zero.scale.detach().reshape(-1)[0])
    return float(zero.codes.reshape(-1)[0].sign()) * clip * NUDGE


def _value(quantizer: Quantizer, x: Tensor) -> Tensor:
    """The quantized activation by its codes and scales."""
    found = quantizer.integers(x)
    assert found.scale is not None
    value = (found.codes - found.zero_point).float() * found.scale
    value = value if found.offset is None else value + found.offset
    if found.deviation is not None and found.mean is not None:
        value = value * found.deviation + found.mean
    return value if found.gamma is None else value * found.gamma


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress on standard output, and its warnings about itself."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _exported(network: nn.Module, example: Tensor) -> ModelProto:
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                network, (example,), dynamo=True, opset_version=OPSET, dynamic_shapes=({0: batch},),
                input_names=[INPUT], output_names=[OUTPUT], verbose=False,
            )  # fmt: skip
    except (torch.onnx.OnnxExporterError, RuntimeError, TypeError, ValueError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        first = str(cause).strip().splitlines() or [type(cause).__name__]
        raise UserError(f"torch cannot export this network: {first[0]}") from error
    assert program is not None
    return program.model_proto


def _name_logits(model: ModelProto) -> None:
    """Give logits that a quantizer makes a node of their own, since a quantizer's tensor has the quantizer's name."""
    from onnx import helper

    for node in [node for node in model.graph.node if node.domain == DOMAIN and OUTPUT in node.output]:
        node.output[0] = f"{OUTPUT}.levels"
        model.graph.node.append(helper.make_node("Identity", list(node.output), [OUTPUT]))


def with_byte_input(graph: DeployGraph, mean: Sequence[float], std: Sequence[float]) -> DeployGraph:
    """The graph with an input of bytes, uint8 [batch, channels, height, width], which it normalises itself.

    Args:
        graph: with an input of normalised images.
        mean: per channel, of images in [0, 1].
        std: per channel, likewise.
    """
    from onnx import TensorProto, helper, numpy_helper

    model = copy.deepcopy(graph.model)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == INPUT:
                node.input[i] = "normalised"
    deviation, shape = np.array(std, np.float32), (1, -1, 1, 1)
    constants = {
        "pixel_factor": 1 / (255 * deviation),
        "pixel_shift": -np.array(mean, np.float32) / deviation,
    }
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32).reshape(shape), name))
    nodes = [
        helper.make_node("Cast", [INPUT], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["pixels", "pixel_factor"], ["scaled_pixels"]),
        helper.make_node("Add", ["scaled_pixels", "pixel_shift"], ["normalised"]),
    ]
    for i, node in enumerate(nodes):
        model.graph.node.insert(i, node)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    return replace(graph, model=model)


def _fold_norms(model: ModelProto, weights: dict[str, WeightCodes]) -> dict[str, WeightCodes]:
    """Take batch norms into the scales of the quantized convolutions in front of them, and into their biases."""
    from onnx import numpy_helper

    graph = model.graph
    constants = initializers(model)
    made = {node.output[0]: node for node in graph.node}
    uses: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    folded = dict(weights)
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        conv = made.get(norm.input[0])
        if conv is None or conv.op_type != "Conv" or uses[norm.input[0]] != 1:
            continue
        weight = made.get(conv.input[1])
        statistics = [constants.get(name) for name in norm.input[1:5]]
        if weight is None or weight.op_type != "Weight" or uses[weight.output[0]] != 1:
            continue
        key = node_key(weight)
        if not folded[key].scaled or any(value is None for value in statistics):
            continue
        gamma, beta, mean, variance = (np.asarray(value, np.float64) for value in statistics)
        epsilon = next((item.f for item in norm.attribute if item.name == "epsilon"), 1e-5)
        factor = gamma / np.sqrt(variance + epsilon)
        old = constants.get(conv.input[2]) if len(conv.input) > 2 else np.zeros(1)
        if old is None:
            continue  # a bias that is computed
        bias = (old - mean) * factor + beta
        folded[key] = folded[key].times(factor)
        name = f"{key.removesuffix('.quant_weight')}.folded_bias"
        graph.initializer.append(numpy_helper.from_array(bias.astype(np.float32), name))
        del conv.input[2:]
        conv.input.append(name)
        conv.output[0] = norm.output[0]
        graph.node.remove(norm)
    return folded
