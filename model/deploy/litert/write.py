"""LiteRT's files (.tflite) from a network's graph.

The file is written from our own graph by LiteRT's schema. Its converters (litert-torch, ai-edge-quantizer) bind a
version of torch and quantize by themselves, which keeps trained levels by one of their algorithms alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from model.deploy.graph import DeployGraph
from model.deploy.litert.network import LitertNetwork
from model.deploy.litert.operators import OPERATORS
from model.deploy.steps import Steps, steps_of

BYTES = 2  # an ONNX tensor's kind: uint8


@dataclass(frozen=True, kw_only=True)
class LitertFile:
    """A file of LiteRT.

    Attributes:
        data: its bytes.
        float_weights: the names of quantized weights that it holds as float32.
    """

    data: bytes
    float_weights: tuple[str, ...]


def litert_file(graph: DeployGraph) -> LitertFile:
    """The network as a file of LiteRT, whose quantized tensors have the names of their quantizers.

    Its input is `input` [batch, height, width, channels], its output `logits` [batch, classes].

    Raises:
        UserError: LiteRT is not installed, or does not take a layer.

    Example:
        >>> from torch import nn
        >>> from model.deploy.graph import deploy_graph
        >>> from model.deploy.litert.write import litert_file
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        >>> litert_file(deploy_graph(network, (3, 4, 4))).data[4:8]
        b'TFL3'
    """
    kind = graph.model.graph.input[0].type.tensor_type.elem_type
    steps = with_names_of_quantizers(steps_of(graph, OPERATORS, "LiteRT"))
    network = LitertNetwork(steps, "uint8" if kind == BYTES else "float32")
    for step in steps.steps:
        OPERATORS[step.operator](network, step)
    return LitertFile(data=network.file.finished(steps.metadata), float_weights=tuple(network.float_weights))


def with_names_of_quantizers(steps: Steps) -> Steps:
    """The steps with the outputs of quantizers called by the quantizers' names."""
    names: dict[str, str] = {}
    for step in steps.steps:
        quantizer = step.activation or step.weight
        if quantizer is not None:
            names[step.outputs[0]] = quantizer.name
    renamed = tuple(
        replace(
            step,
            inputs=tuple(names.get(name, name) for name in step.inputs),
            outputs=tuple(names.get(name, name) for name in step.outputs),
        )
        for step in steps.steps
    )
    shapes = {names.get(name, name): shape for name, shape in steps.shapes.items()}
    return replace(steps, steps=renamed, shapes=shapes)
