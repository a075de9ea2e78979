"""ExecuTorch's files (.pte) from a network's graph.

The file is written from our own graph by ExecuTorch's schemas. Its exporter takes a minute for a small network, and its
quantizers choose levels themselves.
"""

from __future__ import annotations

import json

from model.deploy.executorch.file import QUANTIZERS, RUN, Content
from model.deploy.executorch.graph import INPUT, OUTPUT
from model.deploy.executorch.library import part
from model.deploy.executorch.operators import OPERATORS, ExecutorchNetwork
from model.deploy.graph import DeployGraph
from model.deploy.quiet import quiet
from model.deploy.steps import WrittenFile, steps_of, with_names_of_quantizers
from utils.errors import UserError

UNBOUNDED = ("Exp", "Log", "Sqrt", "Reciprocal", "Pow")  # give infinity or NaN of finite numbers


def executorch_file(graph: DeployGraph) -> WrittenFile:
    """The network as a file of ExecuTorch.

    Its method `forward` takes an image, float32 [1, channels, height, width], and returns `logits` [1, classes].

    Raises:
        UserError: ExecuTorch is not installed, or does not take a layer.

    Example:
        >>> from torch import nn
        >>> from model.deploy.executorch.write import executorch_file
        >>> from model.deploy.graph import deploy_graph
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        >>> executorch_file(deploy_graph(network, (3, 4, 4))).data[4:8]
        b'ET12'
    """
    steps = with_names_of_quantizers(steps_of(graph, OPERATORS, "ExecuTorch"))
    network = ExecutorchNetwork(steps)
    unbounded: set[str] = set()  # tensors that may hold numbers that are not finite
    for step in steps.steps:
        if step.operator == "Where" and unbounded.intersection(step.inputs[1:]):
            raise step.refused("it chooses between numbers one of which may be infinite")  # c x + (1 - c) y
        divides = step.operator == "Div" and step.inputs[1] not in steps.constants
        if divides or step.operator in UNBOUNDED:
            unbounded.update(step.outputs)
        if step.operator == "Div" and not network.is_float(step.inputs):
            raise network.refuse(step, "it divides whole numbers")
        OPERATORS[step.operator](network, step)
    made = network.graph
    places = {
        codes.name: [made.ids[f"{codes.name}.codes"], codes.scale if codes.integer else 1.0]
        for codes in (step.activation for step in steps.steps)
        if codes is not None
    }
    content = Content(
        graph=made.finished(), image=steps.shapes[INPUT], outputs=(steps.shapes[OUTPUT],), named=made.named,
        texts={**steps.metadata, QUANTIZERS: json.dumps(places)},
    )  # fmt: skip
    data = content.file()
    check_runs(data, content)
    return WrittenFile(data=data, float_weights=tuple(network.float_weights))


def check_runs(data: bytes, content: Content) -> None:
    """Check that ExecuTorch takes a file, and computes an output of the shape that the file declares.

    Raises:
        UserError: it does not.
    """
    import torch

    runtime = part("runtime")
    try:
        with quiet(2):
            program = runtime.Runtime.get().load_program(data)
            made = program.load_method(RUN).execute([torch.zeros(content.image)])
    except RuntimeError as error:
        raise UserError(f"ExecuTorch does not take this network ({error}); export --to onnx") from error
    shapes = tuple(tuple(one.shape) for one in made)
    assert shapes == content.outputs, shapes
