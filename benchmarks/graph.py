"""Draw docs/images/onnx-graph.png: the exported ONNX file of a network with one quantized convolution.

python benchmarks/graph.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import onnx
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project is no package

from model.convert import quantize  # noqa: E402
from model.deploy.graph import deploy_graph  # noqa: E402
from model.deploy.onnx_qdq import qdq_model  # noqa: E402
from model.quant import QuantConfig, QuantizerConfig, quantized_layers  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "onnx-graph.png"
FILL = {"weights": "#d5ead9", "integers": "#f6d5b8", "float": "#cfe3f3"}
INTEGERS = ("QuantizeLinear", "Clip", "DequantizeLinear")
WIDTH, HEIGHT, COLUMN = 2.6, 0.62, 5.4


def network() -> nn.Module:
    """A convolution in full precision, one with 2-bit weights and activations, and a linear layer."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    fm = QuantizerConfig(tag="fm", enable=True, method="lsq", levels=4, half_range=True)
    wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
    quantize(made, QuantConfig(fm=fm, wt=wt))
    for _, layer in quantized_layers(made):
        nn.init.normal_(layer.weight, std=0.5)  # so that all four levels occur
    return made.eval()


def exported() -> onnx.ModelProto:
    """The model, read from the file that is written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        onnx.save(qdq_model(deploy_graph(network(), (3, 8, 8))), path)
        return onnx.load(path)


def draw(graph: onnx.GraphProto) -> Figure:
    """The nodes from top to bottom: on the left what depends on the image, on the right the weights."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    moving = {graph.input[0].name}
    for node in graph.node:
        if moving.intersection(node.input):
            moving.update(node.output)
    places: dict[str, tuple[float, float]] = {graph.input[0].name: (0.0, 0.0)}
    main = [node for node in graph.node if node.output[0] in moving]
    for row, node in enumerate(main, start=1):
        places[node.output[0]] = (0.0, -float(row))
    for node in reversed([node for node in graph.node if node.output[0] not in moving]):
        reader = next(other for other in graph.node if node.output[0] in other.input)
        x, y = places[reader.output[0]]
        places[node.output[0]] = (COLUMN, y + 1)

    low = min(y for _, y in places.values())
    high = max(y for _, y in places.values())
    figure = Figure(figsize=(10.5, 0.62 * (high - low) + 0.9), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in places.items():
        node = made.get(name)
        kind = "weights" if name not in moving else "float"
        if node is not None and node.op_type in INTEGERS and name in moving:
            kind = "integers"
        box = FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2), WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=FILL[kind], edgecolor="#555",
        )  # fmt: skip
        axes.add_patch(box)
        axes.text(x, y, name if node is None else titled(node), ha="center", va="center", fontsize=11)
        if node is None:
            continue
        given = "\n".join(described(constants[part]) for part in node.input if part in constants)
        axes.text(x + WIDTH / 2 + 0.12, y, given, ha="left", va="center", fontsize=7.5, color="#333")
        for part in node.input:
            if part in places:
                begin, end = places[part], (x, y)
                side = (0, -HEIGHT / 2) if begin[0] == x else (-WIDTH / 2, -HEIGHT / 2)
                meet = (0, HEIGHT / 2) if begin[0] == x else (WIDTH / 2, HEIGHT / 2)
                axes.annotate(
                    "", (end[0] + meet[0], end[1] + meet[1]), (begin[0] + side[0], begin[1] + side[1]),
                    arrowprops={"arrowstyle": "-|>", "color": "#555", "shrinkA": 0, "shrinkB": 0},
                )  # fmt: skip
    axes.set_xlim(-WIDTH / 2 - 0.2, COLUMN + WIDTH / 2 + 3.2)
    axes.set_ylim(low - 0.6, high + 0.6)
    axes.axis("off")
    return figure


def titled(node: onnx.NodeProto) -> str:
    """The operator, and of Cast the type."""
    to = [onnx.TensorProto.DataType.Name(item.i).lower() for item in node.attribute if item.name == "to"]
    return f"{node.op_type} to {to[0]}" if to else node.op_type


def described(tensor: onnx.TensorProto) -> str:
    """A constant's name, type and shape, and its value where it is one number."""
    kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
    value = onnx.numpy_helper.to_array(tensor)
    shape = f"[{', '.join(map(str, value.shape))}]" if value.size > 4 else value.ravel().tolist()
    if value.size == 1:
        shape = f"{value.item():.4g}"
    name = tensor.name.rpartition(".")[2] if "." in tensor.name else tensor.name
    return (
        f"{name}: {kind} {shape}" if not tensor.name.startswith((kind, "val", "shape")) else f"{kind} {shape}"
    )


def main() -> int:
    """Write the picture."""
    draw(exported().graph).savefig(PICTURE)
    print(PICTURE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
