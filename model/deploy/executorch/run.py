"""Running ExecuTorch's files by its Python runtime."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from model.deploy.codes import Array
from model.deploy.executorch.file import QUANTIZERS, RUN, Content, read_executorch
from model.deploy.executorch.graph import FROM_OUTPUT, OUTPUT
from model.deploy.executorch.library import part
from model.deploy.litert.network import FIRST
from model.deploy.quiet import quiet
from model.deploy.runner import BaseRunner, read_numbers

PRODUCTS = ("XNNConv2d", "XNNDepthwiseConv2d", "XNNFullyConnected")


class ExecutorchRunner(BaseRunner):
    """A file in ExecuTorch's runtime, with XNNPACK; see `model.deploy.runner.Runner`.

    Args:
        path: the file.
        tensors: return the values of the quantizers of activations, too.
        threads: of all runs in this process; None: as the engine likes.
    """

    integer: int | None

    def __init__(self, path: Path, tensors: bool, threads: int | None) -> None:
        self.path = path
        content, runtime = read_executorch(path), part("runtime")
        places = json.loads(content.texts[QUANTIZERS]) if tensors else {}
        self.tensors, self._factors = (
            tuple(places),
            {name: np.float32(one) for name, (_, one) in places.items()},
        )
        self._offsets = read_numbers(content.texts, path) if places else {}
        self.integer, self.layers = layers(content.graph)
        with quiet(2):
            if threads is not None:
                part("extension.pybindings.portable_lib")._unsafe_reset_threadpool(threads)
            data = (
                watched(content, [place for place, _ in places.values()]).file()
                if places
                else path.read_bytes()
            )
            self._program = runtime.Runtime.get().load_program(data)  # which owns what it computes with
            self._method = self._program.load_method(RUN)
        self._shape = tuple(self._method.metadata.input_tensor_meta(0).sizes())[1:]

    def run(self, images: Array) -> dict[str, Array]:
        """See `Runner`."""
        import torch

        rows = []
        for image in images:
            made = self._method.execute([torch.from_numpy(np.ascontiguousarray(image[None]))])
            rows.append([one.numpy() for one in made])
        found = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
        return {
            name: (value.transpose(FIRST) if value.ndim == 4 else value)
            * self._factors.get(name, np.float32(1))
            for name, value in zip((OUTPUT, *self.tensors), found, strict=True)
        }


def tensor_of(value: dict[str, Any]) -> dict[str, Any]:
    """The table of a tensor, quantized or not."""
    found = value["xvalue_union"]
    return found.get("tensor_value", found)


def watched(content: Content, places: Sequence[int]) -> Content:
    """The content with some of its tensors as further outputs, of images with their channels last."""
    graph = json.loads(json.dumps(content.graph))
    shapes = []
    for number, place in enumerate(places):
        tensor = tensor_of(graph["xvalues"][place])
        tensor["external_id"], tensor["flags"] = graph["num_externs"] + number, FROM_OUTPUT
        shapes.append(tuple(tensor["dims"]))
    graph["num_externs"] += len(places)
    graph["output_ids"] += places
    return replace(content, graph=graph, outputs=(*content.outputs, *shapes))


def layers(graph: dict[str, Any]) -> tuple[int, int]:
    """How many convolutions and linear layers multiply integers, and how many there are."""
    products = [node["xnode_union"] for node in graph["xnodes"] if node["xnode_union_type"] in PRODUCTS]
    kinds = [tensor_of(graph["xvalues"][one["input1_id"]])["datatype"] for one in products]
    return sum(kind == "xnn_datatype_qdint8" for kind in kinds), len(products)
