"""LiteRT's files (.tflite) from a network's graph.

The file is written from our own graph by LiteRT's schema. Its converters (litert-torch, ai-edge-quantizer) bind a
version of torch and quantize by themselves, which keeps trained levels by one of their algorithms alone.
"""

from __future__ import annotations

from model.deploy.graph import DeployGraph
from model.deploy.litert.file import FileBuilder, schema
from model.deploy.litert.network import LitertNetwork
from model.deploy.litert.operators import FLOATS, OPERATORS
from model.deploy.quiet import quiet
from model.deploy.steps import WrittenFile, steps_of, with_names_of_quantizers
from utils.errors import UserError

BYTES = 2  # an ONNX tensor's kind: uint8


def litert_file(graph: DeployGraph, *, int8_weights: bool = False) -> WrittenFile:
    """The network as a file of LiteRT, whose quantized tensors have the names of their quantizers.

    Its input is `input` [batch, height, width, channels], its output `logits` [batch, classes].

    Args:
        graph: the network.
        int8_weights: codes of weights take 8 bits each, which XNNPACK unpacks when it loads the file, and not the
            fewest of 2, 4 and 8, whose layers LiteRT computes by its own, slower kernels.

    Raises:
        UserError: LiteRT is not installed, or does not take a layer.

    Example:
        >>> from torch import nn
        >>> from model.deploy.graph import deploy_graph
        >>> from model.deploy.litert.write import litert_file
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        >>> litert_file(deploy_graph(network, (3, 4, 4))).data[4:8]
        b'TFL3'
    """
    kind = graph.model.graph.input[0].type.tensor_type.elem_type
    steps = with_names_of_quantizers(steps_of(graph, OPERATORS, "LiteRT"))
    quantizers = [step.activation or step.weight for step in steps.steps]
    names = [quantizer.name for quantizer in quantizers if quantizer is not None]
    file = FileBuilder([*names, *(f"{name}.codes" for name in names)])
    network = LitertNetwork(steps, file, "uint8" if kind == BYTES else "float32", 8 if int8_weights else 2)
    for step in steps.steps:
        if step.operator in FLOATS and not network.is_float(step.inputs):
            raise network.refuse(step, "its numbers are no floats")
        OPERATORS[step.operator](network, step)
    data = file.finished(steps.metadata)
    check_loads(data)
    return WrittenFile(data=data, float_weights=tuple(network.float_weights))


def check_loads(data: bytes) -> None:
    """Check that LiteRT takes a file, and computes tensors of the shapes that the file declares.

    Raises:
        UserError: it does not.
    """
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    s = schema()
    graph = s.ModelT.InitFromObj(s.Model.GetRootAs(data, 0)).subgraphs[0]
    try:
        with quiet(2):
            own = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            interpreter = Interpreter(model_content=data, experimental_op_resolver_type=own)
            interpreter.allocate_tensors()
            found = {each["index"]: tuple(each["shape"]) for each in interpreter.get_tensor_details()}
    except (RuntimeError, ValueError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"LiteRT does not take this network ({first}); export --to onnx") from error
    for place, tensor in enumerate(graph.tensors):
        declared = () if tensor.shape is None else tuple(tensor.shape)
        if found.get(place, declared) != declared:
            raise UserError(
                f"LiteRT makes a tensor of {found[place]} where the network has {declared}; export --to onnx"
            )
