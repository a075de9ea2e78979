"""Running exported files in the programs that they are for."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.deploy.c.engine import CRunner, read_description
from model.deploy.codes import Array
from model.deploy.litert.file import PACKAGE, read_texts
from model.deploy.packages import needed
from model.deploy.qonnx_thresholds import CODES
from model.deploy.runner import BaseRunner, Runner, read_numbers
from model.deploy.torch_engine import QUANTIZERS, TorchRunner, open_torch
from utils.checkpoint.exported import check_exported, kind_of
from utils.errors import UserError
from utils.text import closest

C_COMPILER = "cc"  # stands for whichever compiler is installed
_ONE_WAY = (
    "torch",
    "coremltools",
    "executorch",
    C_COMPILER,
)  # engines whose optimisation has no other setting
QONNX_DOMAINS = ("qonnx.custom_op.general", "onnx.brevitas")


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that an exported file holds: `classes` and `images`, as JSON; empty where there are none."""
    kind = kind_of(path)
    if kind == "c":
        return read_description(path).texts
    if kind == "litert":
        return read_texts(path)
    if kind == "mnn":
        from model.deploy.mnn.file import read_mnn

        return read_mnn(path).texts
    if kind == "executorch":
        from model.deploy.executorch.file import read_executorch

        return dict(read_executorch(path).texts)
    if kind == "coreml":
        from model.deploy.coreml.file import Package

        return Package(path).metadata
    if path.suffix == ".xml":
        needed("openvino")
        import openvino

        try:
            model = openvino.Core().read_model(path)
        except Exception as error:  # whatever its reader raises
            raise UserError(f"{path}: OpenVINO does not read it: {reason(error)}") from error
        if not model.has_rt_info(["lowbit"]):
            return {}
        return {name: str(value.value) for name, value in model.get_rt_info(["lowbit"]).astype(dict).items()}
    return {item.key: item.value for item in read_onnx(path).metadata_props}


@dataclass(frozen=True)
class Pixels:
    """Turns normalised images back into bytes, uint8 and of the same shape, for a file that normalises itself."""

    mean: Array
    std: Array

    @classmethod
    def of(cls, path: Path) -> Pixels:
        """By what the file says; raises UserError where it does not."""
        try:
            described = json.loads(read_metadata(path)["images"])
            parts = [np.array(described[name], np.float32).reshape(1, -1, 1, 1) for name in ("mean", "std")]
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{path}: takes bytes, and does not say how they are normalised; export it anew"
            ) from None
        return cls(*parts)

    def __call__(self, images: Array) -> Array:
        """See the class."""
        return np.clip(np.round((images * self.std + self.mean) * 255), 0, 255).astype(np.uint8)


def image_shape(texts: Mapping[str, str]) -> tuple[int, int, int] | None:
    """Channels, height and width of the images, as the texts of a file say; None where they do not."""
    try:
        described = json.loads(texts["images"])
        channels, height, width = (int(described[name]) for name in ("channels", "height", "width"))
    except (KeyError, TypeError, ValueError):
        return None
    return channels, height, width


def reason(error: Exception) -> str:
    """The line of an exception that says most; OpenVINO's first lines are places in its code."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check "))]
    return (telling or lines or [type(error).__name__])[0]


@dataclass(frozen=True)
class Engine:
    """A program that runs exported files.

    Attributes:
        name: the package's, or its short form.
        optimised: with the optimisation that it has by default, otherwise with the least.
    """

    name: str
    optimised: bool = True

    def __str__(self) -> str:
        return (
            f"{self.name}, {'default' if self.optimised else 'basic'}"
            if self.name not in _ONE_WAY
            else self.name
        )

    def check_installed(self) -> None:
        """Raise UserError where there is no such engine, or, with the command that installs it, where it is missing."""
        if self.name not in _RUNNERS:
            raise UserError(
                f"{self.name}: no engine; use one of {', '.join(sorted(_RUNNERS))}{closest(self.name, _RUNNERS)}"
            )
        needed(*_PACKAGES.get(self.name, (self.name,)))

    def open(self, path: Path | str, *, tensors: bool = False, threads: int | None = None) -> Runner:
        """Load a file.

        Args:
            path: of a format that the engine reads.
            tensors: return the quantized tensors too, which may change what the engine optimises.
            threads: of a run; None: as the engine likes.

        Raises:
            UserError: the engine is not installed, or does not take the file.
        """
        self.check_installed()
        path = Path(path)
        try:
            return _RUNNERS[self.name](path, self.optimised, tensors, threads)
        except UserError:
            raise
        except Exception as error:  # each engine has exceptions of its own
            raise UserError(f"{path}: {self.name} does not load it: {reason(error)}") from error


def engines_of(path: Path) -> list[Engine]:
    """The engines that read a file, each with its default optimisation and, where it has another, with the least.

    Raises:
        UserError: there is none, or the file is missing or damaged.
    """
    kind = check_exported(path)
    if kind == "openvino":
        return [Engine("openvino"), Engine("openvino", False)]
    if kind in ("litert", "mnn"):
        return [Engine(kind), Engine(kind, False)]
    if kind in ("packed", "program"):
        return [Engine("torch")]
    if kind == "executorch":
        return [Engine("executorch")]
    if kind == "c":
        return [Engine(C_COMPILER)]
    if kind == "coreml":
        return [Engine("coremltools")]
    if any(node.domain in QONNX_DOMAINS for node in read_onnx(path).graph.node):
        return [Engine("qonnx")]
    return [Engine(name, optimised) for name in ("onnxruntime", "openvino") for optimised in (True, False)]


def read_onnx(path: Path) -> Any:
    """An ONNX model.

    Raises:
        UserError: it is missing or damaged, or not of this project's form: one input with images, one output `logits`.
    """
    needed("onnx")
    import onnx

    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except (
        Exception
    ) as error:  # protobuf, the checker and the reader of external data have exceptions of their own
        raise UserError(f"{path}: not a valid ONNX file: {reason(error)}") from error
    names = [item.name for item in (*model.graph.input, *model.graph.output)]
    if names != ["input", "logits"]:
        raise UserError(
            f"{path}: not a file that this tool exports: its inputs and outputs are {', '.join(names)}, not input and "
            "logits"
        )
    return model


def _offsets(path: Path, names: Sequence[str]) -> Mapping[str, float]:
    """What is missing in the tensors of a file, which reads its metadata only if there are such."""
    return read_numbers(read_metadata(path), path) if names else {}


def _quantized(name: str) -> bool:
    return name.endswith(QUANTIZERS)


class _Onnxruntime(BaseRunner):
    """A session on the CPU. Integer codes are read in front of their DequantizeLinear, which engines move."""

    def __init__(self, path: Path, optimised: bool, tensors: bool, threads: int | None) -> None:
        import onnx
        import onnxruntime
        from onnx import helper, numpy_helper

        self.path = path
        model = read_onnx(path)
        levels = onnxruntime.GraphOptimizationLevel
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_ENABLE_BASIC
        if threads is not None:
            options.intra_op_num_threads = threads
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._decoding: dict[str, tuple[str, float, int]] = {}
        wanted = [node for node in model.graph.node if tensors and _quantized(node.output[0])]
        for node in wanted:
            kind, source = onnx.TensorProto.FLOAT, node.output[0]
            codes = constants[node.input[2]].data_type if node.op_type == "DequantizeLinear" else kind
            if codes in (onnx.TensorProto.UINT8, onnx.TensorProto.INT8):
                kind, source = codes, node.input[0]
                scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
                self._decoding[source] = node.output[0], float(scale), int(zero)
            model.graph.output.append(helper.make_tensor_value_info(source, kind, None))
        self.tensors = tuple(node.output[0] for node in wanted)
        self._offsets = _offsets(path, self.tensors)
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = os.path.join(folder, "optimised.onnx")
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            names = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
        products = [name for name in names if any(kind in name for kind in ("Conv", "Gemm", "MatMul"))]
        self.layers = len(products)
        self.integer = sum("QLinear" in name or "Integer" in name or name == "QGemm" for name in products)
        self._input = self._session.get_inputs()[0]
        self._names = [output.name for output in self._session.get_outputs()]
        self._pixels = Pixels.of(path) if self._input.type == "tensor(uint8)" else None

    def run(self, images: Array) -> dict[str, Array]:
        outputs = self._session.run(None, {self._input.name: images})
        found = {name: np.asarray(value) for name, value in zip(self._names, outputs, strict=True)}
        for source, (name, scale, zero) in self._decoding.items():
            found[name] = (found.pop(source).astype(np.float32) - zero) * np.float32(scale)
        return found


class _Openvino(BaseRunner):
    """A compiled network on the CPU, in float32 where it is not integer."""

    def __init__(self, path: Path, optimised: bool, tensors: bool, threads: int | None) -> None:
        import openvino

        self.path = path
        core = openvino.Core()
        model = core.read_model(path)
        self._pixels = Pixels.of(path) if model.input().get_element_type() == openvino.Type.u8 else None
        self.tensors: tuple[str, ...] = ()
        if tensors:
            names = [name for op in model.get_ordered_ops() for out in op.outputs() for name in out.names]
            self.tensors = tuple(dict.fromkeys(name for name in names if _quantized(name)))
            model.add_outputs(list(self.tensors))
        self._offsets = _offsets(path, self.tensors)
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if not optimised:  # without low-precision transformations everything but BinaryConvolution is float
            settings["LP_TRANSFORMS_MODE"] = False
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        size = model.input().get_partial_shape()[0]
        self._batch = size.get_length() if size.is_static else None
        self._network = core.compile_model(model, "CPU", settings)
        kinds = [
            (op.get_rt_info()["layerType"].astype(str), op.get_rt_info()["runtimePrecision"].astype(str))
            for op in self._network.get_runtime_model().get_ordered_ops()
        ]
        counted = [
            precision
            for kind, precision in kinds
            if kind in ("Convolution", "FullyConnected", "MatMul", "BinaryConvolution")
        ]
        self.layers = len(counted)
        self.integer = sum(precision in ("u8", "i8", "u1") for precision in counted)

    def run(self, images: Array) -> dict[str, Array]:
        size = self._batch or len(images)
        parts = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            missing = size - len(part)
            found = self._network(np.concatenate([part, np.repeat(part[:1], missing, axis=0)]))
            parts.append({name: found[name][: len(part)] for name in ("logits", *self.tensors)})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class _Qonnx(BaseRunner):
    """qonnx's executor, a node at a time."""

    integer = None

    def __init__(self, path: Path, optimised: bool, tensors: bool, threads: int | None) -> None:
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.transformation.infer_shapes import InferShapes

        self.path = path
        self._model = ModelWrapper(str(path)).transform(InferShapes())
        nodes = self._model.graph.node
        self.layers = sum(node.op_type in ("Conv", "Gemm", "MatMul") for node in nodes)
        names = [node.output[0] for node in nodes]
        values = read_numbers(read_metadata(path), path, CODES) if tensors else {}
        self._values = {name: value for name, value in values.items() if f"{name}.codes" in names}
        found = [name for name in names if _quantized(name) and name not in values] if tensors else []
        self.tensors = (*found, *self._values)
        self._offsets = _offsets(path, self.tensors)

    def run(self, images: Array) -> dict[str, Array]:
        from qonnx.core.onnx_exec import execute_onnx

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shapes that it has not inferred
            rows = [
                execute_onnx(self._model, {"input": images[i : i + 1]}, return_full_exec_context=True)
                for i in range(len(images))
            ]
        for row in rows:
            row |= {name: row[f"{name}.codes"] * value for name, value in self._values.items()}
        return {name: np.concatenate([row[name] for row in rows]) for name in ("logits", *self.tensors)}


class _Litert(BaseRunner):
    """LiteRT's interpreter on the CPU: with XNNPACK, or by its own kernels. All products are float."""

    integer = 0

    def __init__(self, path: Path, optimised: bool, tensors: bool, threads: int | None) -> None:
        from model.deploy.litert.run import LitertInterpreter

        self.path = path
        self._interpreter = LitertInterpreter(path, optimised, QUANTIZERS if tensors else (), threads)
        self.tensors, self.layers = self._interpreter.tensors, self._interpreter.layers
        self._offsets = _offsets(path, self.tensors)
        self._pixels = Pixels.of(path) if self._interpreter.bytes_in else None
        _, *sizes = self._interpreter.input_shape  # channels last
        self._shape = (sizes[-1], *sizes[:-1])

    def run(self, images: Array) -> dict[str, Array]:
        return self._interpreter.run(images)


class _Mnn(BaseRunner):
    """MNN on the CPU: with Winograd's sums, or with plain ones. All products are float."""

    integer = 0

    def __init__(self, path: Path, optimised: bool, tensors: bool, threads: int | None) -> None:
        from model.deploy.mnn.run import MnnInterpreter

        self.path = path
        self._interpreter = MnnInterpreter(path, optimised, QUANTIZERS if tensors else (), threads)
        self.tensors, self.layers = self._interpreter.tensors, self._interpreter.layers
        self._offsets = _offsets(path, self.tensors)
        self._shape = image_shape(self._interpreter.texts)

    def run(self, images: Array) -> dict[str, Array]:
        return self._interpreter.run(images)


def _torch(path: Path, optimised: bool, tensors: bool, threads: int | None) -> TorchRunner:
    return open_torch(path, tensors)


def _c(path: Path, optimised: bool, tensors: bool, threads: int | None) -> CRunner:
    return CRunner(path, tensors)


def _coreml(path: Path, optimised: bool, tensors: bool, threads: int | None) -> Runner:
    from model.deploy.coreml.engine import CoremlRunner

    return CoremlRunner(path, tensors)


def _executorch(path: Path, optimised: bool, tensors: bool, threads: int | None) -> Runner:
    from model.deploy.executorch.run import ExecutorchRunner

    return ExecutorchRunner(path, tensors, threads)


_PACKAGES = {C_COMPILER: (), "litert": (PACKAGE,), "mnn": ("MNN", "flatbuffers")}
"""The packages of an engine, where these are not the one of its name."""

_RUNNERS: dict[str, Any] = {
    C_COMPILER: _c,
    "coremltools": _coreml,
    "executorch": _executorch,
    "litert": _Litert,
    "mnn": _Mnn,
    "onnxruntime": _Onnxruntime,
    "openvino": _Openvino,
    "qonnx": _Qonnx,
    "torch": _torch,
}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The installed versions of packages."""
    from importlib.metadata import version

    return {name: version(name) for name in packages}
