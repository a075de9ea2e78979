"""Running Core ML packages, which macOS alone does, and comparing them with their checkpoint everywhere."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.deploy.codes import Array
from model.deploy.coreml.file import DATA, Package
from model.deploy.coreml.folder import predicts
from model.deploy.graph import INPUT, OUTPUT
from model.deploy.runner import BaseRunner, read_numbers
from utils.errors import UserError
from utils.text import some_names

if TYPE_CHECKING:
    from model.deploy.graph import DeployGraph

LAYERS = ("conv", "linear", "matmul")


def refuse_elsewhere(path: Path) -> None:
    """Raise `UserError` where Core ML does not run."""
    if not predicts():
        raise UserError(
            f"{path}: Core ML predicts on macOS alone; here verify compares the weights of a package, and other "
            "formats predict, such as export --to onnx"
        )


class CoremlRunner(BaseRunner):
    """A package on the CPU of a Mac, an image at a time; see `model.deploy.engines.Runner`.

    Untested: it needs macOS.
    """

    integer: int | None = None

    def __init__(self, path: Path, tensors: bool) -> None:
        refuse_elsewhere(path)
        import coremltools

        tools: Any = coremltools
        self.path = path
        package = Package(path)
        self.layers = package.count(LAYERS)
        found = package.activation_tensors() if tensors else {}
        self.tensors = tuple(found)
        self._names = {OUTPUT: OUTPUT, **found}
        self._offsets = read_numbers(package.metadata, path)
        self._model = tools.models.MLModel(
            with_outputs(package, tuple(found.values())), weights_dir=str(path / DATA / "weights"),
            compute_units=tools.ComputeUnit.CPU_ONLY,
        )  # fmt: skip

    def run(self, images: Array) -> dict[str, Array]:
        """See `Runner`."""
        rows = [self._model.predict({INPUT: images[i : i + 1]}) for i in range(len(images))]
        return {
            name: np.concatenate([np.asarray(row[tensor], np.float32) for row in rows])
            for name, tensor in self._names.items()
        }


def with_outputs(package: Package, tensors: tuple[str, ...]) -> Any:
    """A copy of a package's description that puts out more tensors."""
    import copy

    import coremltools

    tools: Any = coremltools
    spec = copy.deepcopy(package.spec)
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    for name in tensors:
        block.outputs.append(name)
        kind = tools.proto.FeatureTypes_pb2.ArrayFeatureType
        spec.description.output.add(name=name).type.multiArrayType.dataType = kind.ArrayDataType.FLOAT32
    return spec


def compared(path: Path, graph: DeployGraph) -> tuple[str, tuple[str, ...]]:
    """What a package has of the checkpoint, as a line, and what is wrong with it.

    Args:
        path: the package.
        graph: of the checkpoint's network.

    Raises:
        UserError: the package is damaged.
    """
    from model.deploy.coreml.file import agreement, other_operators
    from model.deploy.coreml.package import write_coreml

    found = agreement(path, graph)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "checkpoint.mlpackage"
        write_coreml(graph, written)
        others = other_operators(Package(path), Package(written))
    faults = found.faults
    if others:
        faults += (f"{some_names(others)}: not as export --to coreml writes the checkpoint now",)
    what = (
        f"{found.weights} quantized weights of {found.codes:,} codes, the steps of {found.activations} quantizers of "
        "activations, and all operators with their constants"
    )
    line = f"{path}: {what} " + ("are the checkpoint's" if not faults else "were compared")
    return f"{line}; predictions need macOS and were not run", faults
