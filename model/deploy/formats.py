"""The files that are written from a network's graph, by their words of `--to`.

Engines are imported where they are used: nobody needs all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.text import some_names

if TYPE_CHECKING:
    from model.deploy.graph import DeployGraph

Write = Callable[["DeployGraph", Path], str]
"""Writes a graph to a path; returns a line that the user should read, mostly empty."""


def _c(graph: DeployGraph, path: Path) -> str:
    """A C header with codes and plain loops, for programs without an engine."""
    from model.deploy.c.header import c_header

    path.write_text(c_header(graph), "utf-8")
    return ""


def _coreml(graph: DeployGraph, path: Path) -> str:
    """A package of Core ML."""
    from model.deploy.coreml.package import write_coreml

    write_coreml(graph, path)
    return ""


def _executorch(graph: DeployGraph, path: Path) -> str:
    """A file of ExecuTorch."""
    from model.deploy.executorch.write import executorch_file

    found = executorch_file(graph)
    path.write_bytes(found.data)
    if not found.float_weights:
        return ""
    names = some_names(found.float_weights)
    return f"float32, where a side has no codes of 8 bits right in front of the layer, or it is in groups: {names}"


def write_litert(graph: DeployGraph, path: Path, *, int8_weights: bool = False) -> str:
    """A file of LiteRT, with as few bits for each code of a weight as hold it, or with 8."""
    from model.deploy.litert.write import litert_file

    found = litert_file(graph, int8_weights=int8_weights)
    path.write_bytes(found.data)
    return _floats(found.float_weights)


def _mnn(graph: DeployGraph, path: Path) -> str:
    """A file of MNN."""
    from model.deploy.mnn.write import write_mnn

    return _floats(write_mnn(graph, path))


def _floats(names: Sequence[str]) -> str:
    """The line about quantized weights that a file holds in float32; empty where there are none."""
    if not names:
        return ""
    return f"float32 in this format, since they are no integers of 8 bits times a scale: {some_names(names)}"


def _onnx(graph: DeployGraph, path: Path) -> str:
    """ONNX with integer weights for onnxruntime, OpenVINO and browsers."""
    from model.deploy.onnx_qdq import qdq_model

    path.write_bytes(qdq_model(graph).SerializeToString())
    return ""


def _openvino(graph: DeployGraph, path: Path) -> str:
    """OpenVINO's IR."""
    from model.deploy.openvino_ir import write_openvino

    write_openvino(graph, path)
    return ""


def _qonnx(graph: DeployGraph, path: Path) -> str:
    """ONNX with the operators of qonnx."""
    from model.deploy.qonnx_quant import qonnx_model

    path.write_bytes(qonnx_model(graph).SerializeToString())
    return ""


def _thresholds(graph: DeployGraph, path: Path) -> str:
    """ONNX with integer weights and thresholds, which qonnx runs."""
    from model.deploy.qonnx_thresholds import thresholds_model

    found = thresholds_model(graph)
    path.write_bytes(found.model.SerializeToString())
    return str(found)


GRAPH_FORMATS: dict[str, Write] = {
    "c": _c,
    "coreml": _coreml,
    "executorch": _executorch,
    "litert": write_litert,
    "mnn": _mnn,
    "onnx": _onnx,
    "openvino": _openvino,
    "qonnx": _qonnx,
    "thresholds": _thresholds,
}

ENDINGS = {
    "c": ".h",
    "coreml": ".mlpackage",
    "executorch": ".pte",
    "litert": ".tflite",
    "mnn": ".mnn",
    "onnx": ".onnx",
    "openvino": ".xml",
    "qonnx": ".onnx",
    "thresholds": ".onnx",
}
"""The endings by which other words know these formats."""
