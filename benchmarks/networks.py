"""Draw the parts of the keyword-configured ResNet as they run: docs/images/resnet-PICTURE.png.

    python benchmarks/networks.py             # every picture
    python benchmarks/networks.py orders stems
    python benchmarks/networks.py --shares torchvision 'timm:resnet*'

`--shares` goes through classifiers of torchvision and timm on the meta device, without weights, and prints which share
of their multiplications by weights, and of these weights, is quantized, as a table (docs/shares.md).

Boxes, their order and the names of their parameters come from tracing the network that the keywords build.
"""

from __future__ import annotations

import argparse
import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch
from torch import fx, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project is no package

from model.layers import space_to_depth  # noqa: E402
from model.layers.convolution import QuantConv2d  # noqa: E402
from model.layers.quantized import QuantLayer  # noqa: E402
from model.networks import library  # noqa: E402
from model.networks.build import build_network  # noqa: E402
from model.networks.resnet import PARTS, Block, ResNet  # noqa: E402
from model.watch.cost import network_cost  # noqa: E402
from utils.config.resolve import read  # noqa: E402
from utils.config.schema import ModelConfig  # noqa: E402
from utils.errors import UserError  # noqa: E402

IMAGES = ROOT / "docs" / "images"
OPTIONS = "--dataset fake --width_alpha 0.125 --fm_enable --wt_enable --fm_bit 2 --wt_bit 2"
QUANTIZED, CONVOLUTION, NORM, ACTIVATION, OTHER = "#f4b183", "#9dc3e6", "#c5e0b4", "#ffe699", "#eeeeee"
LEGEND = {
    "quantized convolution": QUANTIZED,
    "full precision": CONVOLUTION,
    "norm": NORM,
    "activation": ACTIVATION,
    "the rest": OTHER,
}


@dataclass(frozen=True)
class Panel:
    """One part of one network.

    Attributes:
        title: above its drawing.
        keywords: of the network, beside `dorefa`.
        part: the name of a block; empty for stem and head, where the stages are one box.
        model: `--model`.
        options: more of the command line.
    """

    title: str
    keywords: str
    part: str = "layer2.0"
    model: str = "resnet20"
    options: str = ""


@dataclass(frozen=True)
class Box:
    """One step of a part, in the order of execution.

    Attributes:
        name: of the module or the parameter, in the whole network; empty for a sum of tensors.
        text: its operation.
        parameters: full names.
        colour: of its kind.
        inputs: indices of the boxes that it reads; -1 is the part's input.
    """

    name: str
    text: str
    parameters: tuple[str, ...]
    colour: str
    inputs: tuple[int, ...]


ORDERS = ("cbas", "cbsa", "cabs", "bacs", "bcas")
STEMS = (
    "", "fix_pooling", "preBN", "preBN,patch_preBN_stem", "preBN,patch_preBN_stem,fix_pooling",
    "group-net", "TResNetStem", "TResNetStemMaxPool",
)  # fmt: skip
PICTURES: dict[str, list[list[Panel]]] = {  # rows of panels
    "orders": [
        [Panel(f"{order}, layer2.0", f"cifar10,{order}") for order in ORDERS],
        [Panel(f"{order},fix, layer2.0", f"cifar10,{order},fix") for order in ORDERS],
    ],
    "orders-origin": [
        [Panel(f"{order},origin, layer2.0", f"cifar10,{order},origin") for order in ORDERS],
        [Panel(f"{order},origin,fix, layer2.0", f"cifar10,{order},origin,fix") for order in ORDERS],
    ],
    "skips": [
        [
            Panel(f"cbsa,origin,fix,{word}, {part}", f"cifar10,cbsa,origin,fix,{word}", part)
            for word, part in (
                ("singleconv", "layer2.0"), ("real_skip", "layer2.0"), ("DCHR", "layer2.0"),
                ("identify_norm", "layer1.0"),
            )
        ]
    ],
    "stems": [
        [Panel(f"bacs,{words}".rstrip(","), f"imagenet,origin,bacs,{words}".rstrip(","), "", "resnet18")
         for words in row]
        for row in (STEMS[:4], STEMS[4:])
    ] + [
        [
            Panel("cifar10: bacs", "cifar10,origin,bacs", ""),
            Panel("cifar10: bacs,preBN", "cifar10,origin,bacs,preBN", ""),
            Panel("cbsa,fixup,bias", "imagenet,origin,cbsa,fix,fixup,bias", "", "resnet18"),
            Panel("cbsa,fixup,bias,fix_pooling", "imagenet,origin,cbsa,fix,fixup,bias,fix_pooling", "", "resnet18"),
        ]
    ],
    "variants": [
        [
            Panel("resnet50: cbsa,origin,fix, layer2.0", "imagenet,cbsa,origin,fix", model="resnet50"),
            Panel("cbsa,origin,fix,fixup,bias, layer2.0", "cifar10,cbsa,origin,fix,fixup,bias"),
            Panel("cabs --base 2, layer1.0", "cifar10,cabs", "layer1.0", options="--base 2"),
            Panel("cbsa,origin,fix,prone, layer2.0", "cifar10,cbsa,origin,fix,prone"),
            Panel(
                "cbsa,origin,fix,prone,bn_before_restore, layer2.0",
                "cifar10,cbsa,origin,fix,prone,bn_before_restore",
            ),
            Panel("cbsa,origin,fix,ReShapeResolution, layer2.0", "cifar10,cbsa,origin,fix,ReShapeResolution"),
        ],
        [
            Panel("cbsa,origin,fix,fixup, layer2.0", "cifar10,cbsa,origin,fix,fixup"),
            Panel(
                "cbsa,origin,fix,prone,no_prone_downsample, layer2.0",
                "cifar10,cbsa,origin,fix,prone,no_prone_downsample",
            ),
            *(
                Panel(
                    f"cbsa,origin,fix,ReShapeResolution --order {order}, layer2.0",
                    "cifar10,cbsa,origin,fix,ReShapeResolution", options=f"--order {order}",
                )
                for order in ("c", "bac")
            ),
            Panel(
                "cbsa,origin,fix,ReShapeResolution,real_skip, layer2.0",
                "cifar10,cbsa,origin,fix,ReShapeResolution,real_skip",
            ),
        ],
    ],
}  # fmt: skip
"""Rows of panels by the picture's name."""


def network(panel: Panel) -> ResNet:
    """The network of a panel, narrow."""
    line = f"--model {panel.model} --keyword {panel.keywords},dorefa {OPTIONS} {panel.options}"
    made = build_network(read(line.split()).model)
    assert isinstance(made, ResNet)
    return made


class _Tracer(fx.Tracer):
    """Stops at the modules that a box stands for: layers, and in a whole network the stages."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See `fx.Tracer`."""
        return not isinstance(m, ResNet | Block | space_to_depth.SpaceToDepthConv | nn.Sequential) or any(
            isinstance(child, Block) for child in m.children()
        )


def boxes(panel: Panel, model: ResNet) -> list[Box]:
    """The steps of the panel's part of `model` in the order of execution; identities are left out."""
    part = model.get_submodule(panel.part)
    prefix = f"{panel.part}." if panel.part else ""
    found: list[Box] = []
    source: dict[fx.Node, tuple[int, ...]] = {}  # node -> the boxes that its value comes from
    for node in _Tracer().trace(part).nodes:
        inputs = tuple(place for value in node.all_input_nodes for place in source[value])
        source[node] = inputs
        if node.op == "placeholder":
            source[node] = (-1,)
            continue
        for box in _boxes(node, part, prefix, inputs):
            found.append(replace(box, inputs=source[node]))
            source[node] = (len(found) - 1,)
    return found


def _boxes(node: fx.Node, part: nn.Module, prefix: str, inputs: tuple[int, ...]) -> list[Box]:
    """The boxes of a traced node, each reading the one before; none where the input is passed on."""
    if node.op == "call_module":
        assert isinstance(node.target, str)
        module = part.get_submodule(node.target)
        if isinstance(module, nn.Identity):
            return []
        name = prefix + node.target
        if isinstance(
            module, space_to_depth.ProneConv
        ):  # its padding depends on the size, which a trace cannot follow
            return [
                Box(f"{name}.{key}", text, tuple(f"{name}.{key}.{end}" for end, _ in child.named_parameters()),
                    colour, inputs)
                for key, text, colour, child in (
                    ("conv", f"1x1 conv of {module.block}x{module.block} pixels", QUANTIZED, module.conv),
                    ("bn", "norm", NORM, module.bn),
                )
                if not isinstance(child, nn.Identity)
            ]  # fmt: skip
        own = tuple(f"{name}.{key}" for key, _ in module.named_parameters())
        if any(isinstance(child, Block) for child in module.children()):
            return [Box(name, f"{len(list(module.children()))} blocks", own, OTHER, inputs)]
        text, colour = _kind(module)
        return [Box(name, text, own, colour, inputs)]
    scalars = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    if scalars:
        sign = "times" if node.target is operator.mul else "+"
        name = prefix + scalars[0]
        return [Box(name, f"{sign} a learned number", (name,), OTHER, inputs)]
    if node.target is torch.nn.functional.pixel_unshuffle:
        return [Box("", f"space-to-depth {node.args[1]}", (), OTHER, inputs)]
    summed = len(inputs) > 1 and node.target is not torch.stack
    return [Box("", "+", (), OTHER, inputs)] if summed else []


def _kind(module: nn.Module) -> tuple[str, str]:
    """The operation of a layer, without its channels, as (text, colour)."""
    if isinstance(module, nn.Conv2d):
        stride = f", stride {module.stride[0]}" if module.stride[0] > 1 else ""
        colour = QUANTIZED if isinstance(module, QuantConv2d) else CONVOLUTION
        return f"{module.kernel_size[0]}x{module.kernel_size[1]} conv{stride}", colour
    if isinstance(module, nn.BatchNorm2d):
        return "norm", NORM
    if isinstance(module, nn.ReLU):
        return "ReLU", ACTIVATION
    if isinstance(module, nn.Linear):
        return "linear", CONVOLUTION
    if isinstance(module, space_to_depth.PadToBlocks):
        return f"zeros to a multiple of {module.block}", OTHER
    if isinstance(module, space_to_depth.RepeatChannels):
        return f"channels x {module.times}", OTHER
    names = {nn.AvgPool2d: "average pooling", nn.MaxPool2d: "max pooling", nn.AdaptiveAvgPool2d: "average"}
    return names[type(module)], OTHER


def places(steps: Sequence[Box]) -> list[tuple[float, int]]:
    """Column and row of each box: a row below all that it reads, shortcuts and branches to the right."""
    branched = {f"{kind}{k}" for kind in PARTS.values() for k in (1, 2, 3)}
    result: list[tuple[float, int]] = []
    for box in steps:
        row = 1 + max((result[i][1] for i in box.inputs if i >= 0), default=0)
        parts = box.name.removeprefix("layer").split(".")[2:]  # behind the block's name
        column = float("skip" in parts)
        if len(parts) > 1 and parts[0] in branched:
            column = float(parts[1])
        elif (not box.name or parts[:1] == ["scales"]) and box.inputs[0] >= 0:
            column = min(result[i][0] for i in box.inputs if i >= 0)
        while (column, row) in result:  # Fixup's first bias is added on both ways
            column += 1
        result.append((column, row))
    return result


def _half_size(box: Box) -> tuple[float, float]:
    """Half the width and height of a box, in columns and rows."""
    return (0.09, 0.2) if box.text == "+" else (0.42, 0.31)


def plot(axes: Axes, panel: Panel) -> None:
    """Draw one panel."""
    steps = boxes(panel, network(panel))
    where = places(steps)
    for box, (column, row) in zip(steps, where, strict=True):
        for source in box.inputs:
            top = row - _half_size(box)[1]
            _arrow(axes, where[source] if source >= 0 else (0.0, 0), (column, row), top, set(where))
    axes.text(0, 0, "input", ha="center", va="bottom", fontsize=8, style="italic")
    for box, (column, row) in zip(steps, where, strict=True):
        half_width, half_height = _half_size(box)
        axes.add_patch(
            FancyBboxPatch(
                (column - half_width, row - half_height), 2 * half_width, 2 * half_height,
                boxstyle="round,pad=0,rounding_size=0.06", facecolor=box.colour, edgecolor="#555555", zorder=2,
            )
        )  # fmt: skip
        axes.text(
            column, row, _label(box, panel), ha="center", va="center", fontsize=7, zorder=3, linespacing=1.25
        )
    axes.set_title(panel.title.replace(", layer", "\nlayer"), fontsize=9)
    right = max(column for column, _ in where)
    axes.set_xlim(-0.5, right + 0.65)
    axes.set_ylim(max(row for _, row in where) + 0.5, -0.4)
    axes.set_axis_off()


def _label(box: Box, panel: Panel) -> str:
    """The text in a box: its operation, its name within the part, and its parameters' names."""
    if not box.name:
        return box.text
    name = box.name.removeprefix(f"{panel.part}.")
    if box.name in box.parameters or box.text.endswith("blocks"):
        return f"{box.text}\n{name}"
    # Six columns of a picture leave no room for the whole names of norms, so the common part comes once.
    ends = [parameter.removeprefix(f"{box.name}.") for parameter in box.parameters]
    return f"{box.text}\n{name}" + ("." + ", .".join(ends) if ends else "")


def _arrow(
    axes: Axes, start: tuple[float, int], end: tuple[float, int], top: float, taken: set[tuple[float, int]]
) -> None:
    """Draw an arrow down from box to box, around those between them, or into a sum's side from another column."""
    (x0, y0), (x1, y1) = start, end
    between = any((x0, row) in taken for row in range(y0 + 1, y1))
    if x0 == x1 and not between:
        path = [(x0, y0), (x1, top)]
    elif x0 == x1:
        lane = x0 + 0.53
        path = [(x0, y0 + 0.4), (lane, y0 + 0.4), (lane, y1), (x1 + 0.09, y1)]
        axes.plot([x0, x0], [y0, y0 + 0.4], color="#555555", linewidth=1, zorder=1)
    elif x1 > x0 and any((x1, row) in taken for row in range(y0 + 1, y1)):
        lane = x1 + 0.53
        path = [(x0, y0), (x0, y0 + 0.4), (lane, y0 + 0.4), (lane, y1), (x1 + 0.09, y1)]
    elif x1 > x0:
        path = [(x0, y0), (x0, y0 + 0.5), (x1, y0 + 0.5), (x1, top)]
    else:
        path = [(x0, y0), (x0, y1), (x1 + 0.09, y1)]
    axes.plot(*zip(*path[:-1], strict=True), color="#555555", linewidth=1, zorder=1)
    axes.annotate(
        "", path[-1], path[-2], zorder=1,
        arrowprops={"arrowstyle": "->", "color": "#555555", "shrinkA": 0, "shrinkB": 0},
    )  # fmt: skip


def draw(picture: str, folder: Path) -> Path:
    """Draw a picture, a key of `PICTURES`, into `folder`; returns its path."""
    rows = PICTURES[picture]
    columns = max(map(len, rows))
    heights = [
        max(max(row for _, row in places(boxes(panel, network(panel)))) for panel in row) for row in rows
    ]
    size = (3.3 * columns, 0.47 * sum(heights) + 0.9 * len(rows) + 0.4)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for line, row, height in zip(grid, rows, heights, strict=True):
        for axes in line[len(row) :]:
            axes.set_axis_off()
        for axes, panel in zip(line, row, strict=False):
            plot(axes, panel)
            axes.set_ylim(height + 0.5, -0.4)
    patches = [Patch(facecolor=colour, edgecolor="#555555", label=text) for text, colour in LEGEND.items()]
    figure.legend(handles=patches, loc="outside upper center", ncols=len(patches), frameon=False, fontsize=9)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"resnet-{picture}.png"
    figure.savefig(path)
    return path


def built(config: ModelConfig) -> nn.Module:
    """A network of a library on the meta device; some, as regnets, compute with numbers while they are built."""
    try:
        with torch.device("meta"):
            return library.build_library_network(config)
    except UserError as error:
        if "meta" not in str(error):
            raise
    return library.build_library_network(config).to("meta")


def share(name: str, ends: str = "") -> str:
    """A row of the table of shares: the network `SOURCE:NAME` at the size of its published weights.

    They are those of convolutions and matrix products; the first and the last layer stay in full precision, unless
    `ends` says their bits.
    """
    line = (
        f"--model {name} --dataset fake --keyword imagenet,lsq --fm_enable --wt_enable --fm_bit 2 --wt_bit 2"
    ) + (f" --first_last_bit {ends}" if ends else "")
    size = library.own_size(*name.split(":")) or 224
    config = read([*line.split(), "--input_size", str(size)]).model
    try:
        network = built(config)
        with torch.device("meta"):
            layers = network_cost(network, size).layers
    except (UserError, RuntimeError, NotImplementedError) as error:
        reason = "not on the meta device" if "meta" in str(error) else " ".join(str(error).split())
        return f"| `{name}` | | | {reason} |"
    low = {layer.name for layer in layers if isinstance(network.get_submodule(layer.name), QuantLayer)}
    total = sum(layer.macs for layer in layers)
    products = sum(layer.macs for layer in layers if layer.name in low) / total
    weights = sum(layer.weights for layer in layers if layer.name in low) / sum(
        each.weights for each in layers
    )
    left: dict[str, int] = {}
    for layer in layers:
        if layer.name not in low:
            kind = type(network.get_submodule(layer.name)).__name__
            left[kind] = left.get(kind, 0) + layer.macs
    most = sorted(left.items(), key=lambda item: -item[1])[:3]
    shares = ", ".join(f"{kind} {100 * macs / total:.1f}" for kind, macs in most)
    return f"| `{name}` | {100 * products:.1f} | {100 * weights:.1f} | {shares} |"


def shares(patterns: Sequence[str], ends: str) -> None:
    """Print the table of shares of the networks whose `SOURCE:NAME`, or source, matches one of the patterns."""
    known = [f"torchvision:{name}" for name in library.torchvision_names()]
    if any(pattern.startswith("timm") for pattern in patterns):
        import timm

        known += [f"timm:{name}" for name in timm.list_models()]
    print("| network | % of products | % of weights | left, % of products |\n| --- | --- | --- | --- |")
    for name in known:
        if any(fnmatch(name, pattern) or name.partition(":")[0] == pattern for pattern in patterns):
            print(share(name, ends), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the pictures named on the command line, or all; or print the table of shares."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help=", ".join(PICTURES))
    parser.add_argument("--shares", nargs="+", metavar="SOURCE:NAME", help="patterns of networks")
    parser.add_argument(
        "--first_last_bit", default="", metavar="BITS", help="shares: of the first and the last layer, too"
    )
    given = parser.parse_args(argv)
    if given.shares:
        shares(given.shares, given.first_last_bit)
        return 0
    names = given.pictures or list(PICTURES)
    unknown = [name for name in names if name not in PICTURES]
    if unknown:
        parser.error(f"{unknown[0]} is no picture; choose from {', '.join(PICTURES)}")
    for name in names:
        print(draw(name, IMAGES).relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
