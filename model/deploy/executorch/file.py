"""Files of ExecuTorch (.pte): a method `forward` that XNNPACK computes, and methods that return texts."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from model.deploy.executorch.graph import ALIGNMENT, SERIALIZATION
from model.deploy.executorch.library import part
from utils.checkpoint.exported import EXECUTORCH_MARK as MARK
from utils.errors import UserError

RUN = "forward"
QUANTIZERS = "quantizers"  # a text: JSON, for each quantizer of activations its tensor's number, and a factor
DELEGATE = "XnnpackBackend"


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a file holds.

    Attributes:
        graph: the tables of XNNPACK's graph, with the names of their schema.
        image: the shape of the input.
        outputs: the shapes of the outputs.
        named: the constants by name.
        texts: what the other methods return.
    """

    graph: dict[str, Any]
    image: tuple[int, ...]
    outputs: tuple[tuple[int, ...], ...]
    named: Mapping[str, bytes]
    texts: Mapping[str, str]

    def delegate(self) -> bytes:
        """The graph as XNNPACK's part of a file."""
        header_type = part(f"{SERIALIZATION}.xnnpack_graph_serialize").XNNHeader
        start, data = header_type.EXPECTED_LENGTH, _compiled(self.graph)
        start, size = (-(-length // ALIGNMENT) * ALIGNMENT for length in (start, len(data)))
        header = header_type(start, len(data), start + size, 0).to_bytes()
        return header.ljust(start, b"\0") + data.ljust(size, b"\0")

    def file(self) -> bytes:
        """The bytes of a file."""
        s, program = part("exir.schema"), part("exir._serialize._program")
        values, offset = [], 0
        for shape in (self.image, *self.outputs):
            place, order = s.AllocationDetails(1, offset, 0), list(range(len(shape)))
            fixed = s.TensorShapeDynamism.STATIC
            values.append(
                s.EValue(s.Tensor(s.ScalarType.FLOAT, 0, list(shape), order, False, 0, 0, place, fixed))
            )
            offset += -(-4 * prod(shape) // ALIGNMENT) * ALIGNMENT
        places = list(range(len(values)))
        call = s.Instruction(s.DelegateCall(0, places))
        delegate = s.BackendDelegate(DELEGATE, s.BackendDelegateDataReference(s.DataLocation.INLINE, 0), [])
        plans = [
            s.ExecutionPlan(
                RUN, _containers(1, len(self.outputs)), values, [0], places[1:],
                [s.Chain([], [], [call], None)], [], [delegate], [0, offset],
            )
        ]  # fmt: skip
        for name, text in self.texts.items():
            chains = [s.Chain([], [], [], None)]
            value = s.EValue(s.String(text))
            plans.append(s.ExecutionPlan(name, _containers(0, 1), [value], [], [0], chains, [], [], [0]))
        store = part("exir._serialize._named_data_store").NamedDataStore()
        for name, data in self.named.items():
            store.add_named_data(name, data, ALIGNMENT)
        content = s.Program(
            0, plans, [s.Buffer(b"")], [s.BackendDelegateInlineData(self.delegate())], [],
            s.SubsegmentOffsets(0, []),
        )  # fmt: skip
        whole = program.PTEFile(content, named_data=store.get_named_data_store_output())
        return bytes(
            program.serialize_pte_binary(whole, extract_delegate_segments=True, segment_alignment=ALIGNMENT)
        )


def _containers(inputs: int, outputs: int) -> Any:
    """How torch says that a method takes tensors and returns a tuple of them."""
    leaf = {"type": None, "context": None, "children_spec": []}

    def several(count: int) -> dict[str, Any]:
        return {"type": "builtins.tuple", "context": "null", "children_spec": [leaf] * count}

    named = {"type": "builtins.dict", "context": "[]", "children_spec": []}
    given = {"type": "builtins.tuple", "context": "null", "children_spec": [several(inputs), named]}
    return part("exir.schema").ContainerMetadata(json.dumps([1, given]), json.dumps([1, several(outputs)]))


def _compiled(graph: Mapping[str, Any]) -> bytes:
    """The tables of a graph as a FlatBuffer."""
    flatbuffer = part("exir._serialize._flatbuffer")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "graph.json")
        source.write_text(json.dumps(graph), "utf-8")
        flatbuffer._flatc_compile(folder, str(_schema_in(folder)), str(source))
        return source.with_suffix(".bin").read_bytes()


def _tables(data: bytes) -> dict[str, Any]:
    """The tables of a FlatBuffer."""
    flatbuffer = part("exir._serialize._flatbuffer")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "graph.bin")
        source.write_bytes(data)
        flatbuffer._flatc_decompile(folder, str(_schema_in(folder)), str(source), ["--raw-binary"])
        text = source.with_suffix(".json").read_text("utf-8")
    return json.loads(re.sub(r": (-?inf)\b", r': "\1"', text))


def _schema_in(folder: str) -> Path:
    """ExecuTorch's schema of graphs of XNNPACK, copied to a folder."""
    from importlib.resources import files

    path = Path(folder, "schema.fbs")
    path.write_bytes((files("executorch.backends.xnnpack.serialization") / "schema.fbs").read_bytes())
    return path


def read_executorch(path: Path) -> Content:
    """The content of a file.

    Raises:
        UserError: it is missing or damaged, or not of this project's form.
    """
    header_type = part(f"{SERIALIZATION}.xnnpack_graph_serialize").XNNHeader
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    data = path.read_bytes()
    if data[4:8] != MARK:
        raise UserError(f"{path}: not a valid file of ExecuTorch: it lacks the mark {MARK.decode()}")
    try:
        file = part("exir._serialize._program").deserialize_pte_binary(data)
        plans = {plan.name: plan for plan in file.program.execution_plan}
        texts = {name: plan.values[0].val.string_val for name, plan in plans.items() if name != RUN}
        plan = plans[RUN]
        image, *outputs = (tuple(plan.values[i].val.sizes) for i in (*plan.inputs, *plan.outputs))
        blob = file.program.backend_delegate_data[0].data
        header = header_type.from_bytes(blob[: header_type.EXPECTED_LENGTH])
        start, end = header.flatbuffer_offset, header.flatbuffer_offset + header.flatbuffer_size
        graph = _tables(blob[start:end])
        stored = file.named_data
        named = {} if stored is None else {
            name: bytes(stored.buffers[entry.buffer_index]) for name, entry in stored.pte_data.items()
        }  # fmt: skip
        json.loads(texts[QUANTIZERS])
    except Exception as error:  # whatever reading bytes at wrong places raises, and what reads them for it
        raise UserError(
            f"{path}: not a valid file of ExecuTorch that export has written, or cut short or damaged; export it anew"
        ) from error
    return Content(graph=graph, image=image, outputs=tuple(outputs), named=named, texts=texts)
