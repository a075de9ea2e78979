"""Running LiteRT's files by its CPU interpreter."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from model.deploy.codes import Array
from model.deploy.litert.file import OUTPUT, read_litert, text, written
from model.deploy.litert.network import FIRST, LAST
from model.deploy.quiet import quiet

PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


class LitertInterpreter:
    """A file in LiteRT's interpreter: with XNNPACK, or by the kernels that it has itself.

    Args:
        path: the file.
        optimised: with XNNPACK, which LiteRT takes by itself.
        endings: the endings of the names of tensors that a run returns beside the logits.
        threads: of a run; None: as the engine likes.

    Attributes:
        tensors: their names.
        layers: how many convolutions and linear layers there are.
        bytes_in: whether the input is bytes.
        input_shape: of the input, channels last.
    """

    def __init__(self, path: Path, optimised: bool, endings: tuple[str, ...], threads: int | None) -> None:
        from ai_edge_litert import schema_py_generated as schema
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        model = read_litert(path)
        graph = model.subgraphs[0]
        names = [text(tensor.name) for tensor in graph.tensors]
        made = [place for operator in graph.operators for place in operator.outputs]
        wanted = [place for place in made if endings and names[place].endswith(endings)]
        self.tensors = tuple(names[place] for place in wanted)
        graph.outputs = np.array([*graph.outputs, *wanted], np.int32)
        products = {getattr(schema.BuiltinOperator, name) for name in PRODUCTS}
        codes = [code.builtinCode for code in model.operatorCodes]
        self.layers = sum(codes[operator.opcodeIndex] in products for operator in graph.operators)
        self.bytes_in = graph.tensors[graph.inputs[0]].type == schema.TensorType.UINT8
        model.signatureDefs = None  # they name the logits alone
        own = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        with quiet(2):
            self._interpreter = Interpreter(
                model_content=written(model), num_threads=threads,
                experimental_op_resolver_type=OpResolverType.AUTO if optimised else own,
            )  # fmt: skip
            self._interpreter.allocate_tensors()
        given = self._interpreter.get_input_details()[0]
        self._input, self.input_shape = given["index"], tuple(map(int, given["shape"]))
        self._outputs = [detail["index"] for detail in self._interpreter.get_output_details()]

    def run(self, images: Array) -> dict[str, Array]:
        """Images, channels first, to the logits and the tensors, channels first."""
        images = np.ascontiguousarray(images.transpose(LAST)) if images.ndim == 4 else images
        rows = []
        for image in images:
            self._interpreter.set_tensor(self._input, image[None])
            self._interpreter.invoke()
            rows.append([self._interpreter.get_tensor(place) for place in self._outputs])
        found = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
        names = (OUTPUT, *self.tensors)
        return {
            name: value.transpose(FIRST) if value.ndim == 4 else value
            for name, value in zip(names, found, strict=True)
        }
