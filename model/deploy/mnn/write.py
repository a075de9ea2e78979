"""MNN's files (.mnn) from a network's graph.

The network is described in the words of MNN's schema, and MNN's converter makes the file of that description. Of an
ONNX file it would make another network: divisions by constants become products, Round takes ties away from zero, and
weights are quantized anew, which moves trained levels (findings/mnn-onnx-round.sh).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from model.deploy.graph import INPUT, DeployGraph
from model.deploy.mnn.convert import convert
from model.deploy.mnn.file import MnnFile, read_mnn
from model.deploy.mnn.network import MnnNetwork
from model.deploy.mnn.operators import ANY_KIND, OPERATORS
from model.deploy.mnn.run import MnnInterpreter
from model.deploy.steps import steps_of, with_names_of_quantizers
from model.deploy.torch_engine import QUANTIZERS
from utils.errors import UserError


def write_mnn(graph: DeployGraph, path: Path) -> tuple[str, ...]:
    """The network as a file of MNN, whose quantized tensors have the names of their quantizers.

    Its input is `input` [batch, channels, height, width], its output `logits` [batch, classes].

    Returns:
        The names of quantized weights that the file holds as float32.

    Raises:
        UserError: MNN is not installed, or does not take a layer; or the file is not what it should be.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from torch import nn
        >>> from model.deploy.graph import deploy_graph
        >>> from model.deploy.mnn.file import read_mnn
        >>> from model.deploy.mnn.write import write_mnn
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "x.mnn"
        ...     floats = write_mnn(deploy_graph(network, (3, 4, 4)), path)
        ...     print(floats, read_mnn(path).layers)
        () 2
    """
    steps = with_names_of_quantizers(steps_of(graph, OPERATORS, "MNN"))
    network = MnnNetwork(steps)
    for step in steps.steps:
        if step.operator not in ANY_KIND and any(map(network.is_whole, step.inputs[:1])):
            raise network.refuse(step, "its numbers are no floats")
        OPERATORS[step.operator](network, step)
    convert(network.finished(), path)
    try:
        found = read_mnn(path)
        if found.numbers() != network.numbers():
            raise UserError("MNN's converter has changed numbers of the network; export --to onnx")
        _check_weights(found, graph)
        _check_shapes(path, steps.shapes)
    except UserError:
        path.unlink()
        raise
    return tuple(network.float_weights)


def _check_weights(found: MnnFile, graph: DeployGraph) -> None:
    """Check that the weights in a file are those of the network, bit by bit."""
    for name, weight in graph.weights.items():
        stored = found.weight(name)
        codes, scale = weight.codes.reshape(len(weight.codes), -1), weight.scale.reshape(-1)
        if stored.codes is None:
            same = np.array_equal(stored.values, weight.values().reshape(-1))
        else:
            same = np.array_equal(stored.codes, codes)
            same = same and np.array_equal(stored.values, np.broadcast_to(scale, len(codes)))
        if not same:
            raise UserError(f"{name}: MNN's file does not hold the weight that was trained; export --to onnx")


def _check_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that MNN runs a file, with two images at once, and makes tensors of the shapes that the network has."""
    runner = MnnInterpreter(path, True, QUANTIZERS, 1)
    try:
        found = runner.run(np.zeros((2, *shapes[INPUT][1:]), np.float32))
    except RuntimeError as error:
        raise UserError(f"MNN does not run this network ({error}); export --to onnx") from error
    for name, value in found.items():
        shape = (2 * shapes[name][0], *shapes[name][1:])
        if value.shape != shape:
            raise UserError(
                f"{name}: MNN makes a tensor of {value.shape} of two images, the network {shape}; export --to onnx"
            )
