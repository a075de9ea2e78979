"""A network as a list of steps, for files that are written operator by operator."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from model.deploy.codes import ActivationCodes, Array, WeightCodes
from model.deploy.graph import OPSET, OUTPUT, DeployGraph
from model.deploy.nodes import DOMAIN, initializers, node_key, tensor_attributes
from utils.errors import UserError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

ACTIVATION, WEIGHT = "Activation", "Weight"  # operators of the own domain
SCOPES = "pkg.torch.onnx.name_scopes"  # where torch notes the modules that a node comes from


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operator.

    Attributes:
        operator: its name in ONNX, of opset 18; `Activation` and `Weight` are quantizers.
        layer: the module that it comes from, for messages; empty where torch does not say.
        inputs: the names of its tensors; empty names stand for inputs that are left out.
        outputs: the names of its results.
        attributes: those of ONNX.
        activation: the quantizer of an `Activation`.
        weight: the quantized weight of a `Weight`.
    """

    operator: str
    layer: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    activation: ActivationCodes | None = None
    weight: WeightCodes | None = None

    def refused(self, why: str) -> UserError:
        """The error that says of its layer why a file cannot hold it, and what to write instead."""
        where = f"{self.layer}: " if self.layer else ""
        return UserError(f"{where}{why}; export --to onnx")


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A network for images of one size, from `input` to `logits`.

    Attributes:
        steps: in an order in which they can run.
        constants: the tensors that do not depend on the image, but for quantized weights.
        shapes: of every other tensor, with one image as the batch.
        metadata: what travels in the file.
    """

    steps: tuple[Step, ...]
    constants: Mapping[str, Array]
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class WrittenFile:
    """A file that is written operator by operator.

    Attributes:
        data: its bytes.
        float_weights: the names of quantized weights that it holds as float32.
    """

    data: bytes
    float_weights: tuple[str, ...]


def steps_of(graph: DeployGraph, taken: Collection[str], engine: str) -> Steps:
    """The steps of a graph.

    Batch norms that are no part of a weight are a factor and a sum, identities are left out, and what follows from
    constants and shapes is a constant.

    Args:
        graph: the network.
        taken: the operators that the file can hold.
        engine: its name, for messages.

    Raises:
        UserError: an operator is not taken.

    Example:
        >>> from torch import nn
        >>> from model.deploy.graph import deploy_graph
        >>> from model.deploy.steps import steps_of
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        >>> found = steps_of(deploy_graph(network, (3, 4, 4)), {"Conv", "Relu", "Reshape", "Gemm"}, "an engine")
        >>> [(step.operator, found.shapes[step.outputs[0]]) for step in found.steps]
        [('Conv', (1, 4, 4, 4)), ('Relu', (1, 4, 4, 4)), ('Reshape', (1, 64)), ('Gemm', (1, 2))]
    """
    constants = initializers(graph.model)
    shapes = shapes_of(graph.model)
    renamed: dict[str, str] = {}
    steps: list[Step] = []
    for node in graph.model.graph.node:
        inputs = tuple(renamed.get(name, name) for name in node.input)
        own = node.domain == DOMAIN
        step = Step(
            operator=node.op_type, layer=_layer(node), inputs=inputs, outputs=tuple(node.output),
            attributes=tensor_attributes(node),
            activation=graph.activations[node_key(node)] if own and node.op_type == ACTIVATION else None,
            weight=graph.weights[node_key(node)] if own and node.op_type == WEIGHT else None,
        )  # fmt: skip
        if node.op_type == "Identity" and OUTPUT not in step.outputs:
            renamed[step.outputs[0]] = inputs[0]
        elif node.op_type == "Shape":
            sizes, parts = np.array(shapes[inputs[0]], np.int64), step.attributes
            constants[step.outputs[0]] = sizes[parts.get("start", 0) : parts.get("end")]
        elif _is_constant(node, inputs, constants):
            _fold(node, dict(zip(node.input, inputs, strict=True)), constants)
        elif node.op_type == "BatchNormalization" and all(name in constants for name in inputs[1:]):
            steps += _norm(step, constants, shapes)
        else:
            steps.append(step)
    if OUTPUT in constants:
        raise UserError("the logits do not depend on the image")
    read = {OUTPUT, *(name for step in steps for name in step.inputs)}
    for step in steps:
        if step.operator not in taken and step.operator not in (ACTIVATION, WEIGHT):
            raise step.refused(f"{engine} files do not hold the operator {step.operator}")
        if any(0 in shapes.get(name, (0,)) for name in read.intersection(step.outputs)):
            raise step.refused(f"the size of what {step.operator} makes is not known")
    return Steps(steps=tuple(steps), constants=constants, shapes=shapes, metadata=graph.metadata)


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


def _layer(node: NodeProto) -> str:
    """The innermost module of a node, without the node's own name."""
    import ast

    scopes = next((item.value for item in node.metadata_props if item.key == SCOPES), "[]")
    return next(iter(ast.literal_eval(scopes)[-2:-1]), "")


def _is_constant(node: NodeProto, inputs: Sequence[str], constants: Mapping[str, Array]) -> bool:
    """Whether an operator's results follow from constants."""
    known = all(name in constants or not name for name in inputs)
    return node.domain != DOMAIN and known and bool(inputs or node.op_type == "Constant")


def _fold(node: NodeProto, names: Mapping[str, str], constants: dict[str, Array]) -> None:
    """Add what a node makes of constants, whose names it has by those of its inputs."""
    from onnx.reference import ReferenceEvaluator

    given = {name: constants[source] for name, source in names.items() if name}
    made = ReferenceEvaluator(node, opsets={"": OPSET}).run(None, given)
    constants.update(zip(node.output, map(np.asarray, made), strict=True))


def _norm(step: Step, constants: dict[str, Array], shapes: dict[str, tuple[int, ...]]) -> list[Step]:
    """A batch norm in evaluation as y = x * factor + shift, whose constants and shapes are added."""
    gamma, beta, mean, variance = (np.asarray(constants[name], np.float64) for name in step.inputs[1:])
    factor = gamma / np.sqrt(variance + step.attributes.get("epsilon", 1e-5))
    y = step.outputs[0]
    shape = (1, -1, *[1] * (len(shapes[y]) - 2))
    constants[f"{y}.factor"] = factor.astype(np.float32).reshape(shape)
    constants[f"{y}.shift"] = (beta - mean * factor).astype(np.float32).reshape(shape)
    shapes[f"{y}.scaled"] = shapes[y]
    plain = replace(step, attributes={}, operator="Mul")
    return [
        replace(plain, inputs=(step.inputs[0], f"{y}.factor"), outputs=(f"{y}.scaled",)),
        replace(plain, inputs=(f"{y}.scaled", f"{y}.shift"), outputs=(y,), operator="Add"),
    ]


def shapes_of(model: ModelProto) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a graph, with one image as the batch."""
    from onnx import shape_inference

    model = copy.deepcopy(model)
    for node in model.graph.node:
        if node.domain == DOMAIN:  # of the shape of its input
            node.domain, node.op_type = "", "Identity"
            del node.attribute[:]
    del model.graph.value_info[:]
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    found = shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*found.value_info, *found.input, *found.output)
    }
