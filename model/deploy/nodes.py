"""Reading nodes and constants of ONNX graphs, those of the own operator domain too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.deploy.codes import Array

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

DOMAIN = "lowbit"


def node_key(node: NodeProto) -> str:
    """The attribute `key` of a node of the own domain."""
    return next(attribute.s.decode() for attribute in node.attribute if attribute.name == "key")


def initializers(model: ModelProto) -> dict[str, Array]:
    """The constants of a model by name."""
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def tensor_attributes(node: NodeProto) -> dict[str, Any]:
    """The attributes of a node as Python values."""
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
