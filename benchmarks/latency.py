"""Measures whether the times of single layers in an engine add up to the time of a network, at each number of bits.

    python benchmarks/latency.py                                # the digits' ResNet-20, onnxruntime and OpenVINO
    python benchmarks/latency.py --options "--model resnet18 --keyword imagenet,origin,cbsa,fix --input_size 64"

Each layer is exported alone, with its input's quantizer and, where the network has one behind it, with that of its
output; layers of equal shape are measured once. Beside it runs the same layer in float, and a file that does next to
nothing, whose time is taken off. Predicted for a network of some bits: the time of the float network, with each layer's
own time in place of its time in float. The files of a group take turns on one thread; printed are medians of processor
time, so that other programs on the machine count for little. The weights are random, which decides no time.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project is no package

import onnx  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from model.calibrate import initialise_ranges  # noqa: E402
from model.convert import below_zero, quantize  # noqa: E402
from model.deploy import openvino_ir  # noqa: E402
from model.deploy.engines import Engine, Runner, versions  # noqa: E402
from model.deploy.graph import deploy_graph  # noqa: E402
from model.deploy.nodes import node_key  # noqa: E402
from model.deploy.onnx_qdq import PRODUCTS, qdq_model  # noqa: E402
from model.deploy.verify import cpu  # noqa: E402
from model.networks.build import build_network  # noqa: E402
from model.observe import first_input, observing  # noqa: E402
from model.quant import QuantConfig, QuantizerConfig  # noqa: E402
from model.selection import Selection  # noqa: E402
from model.watch.cost import network_cost  # noqa: E402
from utils.config.methods import EVEN  # noqa: E402
from utils.config.resolve import read  # noqa: E402
from utils.text import format_table  # noqa: E402

DIGITS = "--model resnet20 --width_alpha 0.25 --input_size 16 --keyword digits,origin,cbsa,fix_pooling,singleconv,fix"
ENDINGS = {"onnxruntime": ".onnx", "openvino": ".xml"}
TURN = 0.004  # seconds of processor time of a file in each turn
RANDOM = 3  # networks of bits that are drawn


def config(*tags: str) -> QuantConfig:
    """Evenly spaced levels with ranges of least squared error; the bits are those of `layer_bits`."""
    parts: dict[str, Any] = {
        tag: QuantizerConfig(tag=tag, enable=True, method=EVEN, levels=256, half_range=tag != "wt")
        for tag in tags
    }
    return QuantConfig(**parts, first_last=True, re_init_range="mse")


def quantized(
    network: nn.Module, images: Tensor, bits: Mapping[str, int], signed: Sequence[str], *tags: str
) -> nn.Module:
    """A copy with bits of each layer."""
    network, settings = copy.deepcopy(network), config(*tags)
    entries = [{"name": name, **{f"{tag}_bit": width for tag in tags}} for name, width in bits.items()]
    quantize(network, settings, select=Selection(signed=tuple(signed)), layer_bits=entries)
    initialise_ranges(network, images, settings)
    return network.eval()


def opened(engine: str, network: nn.Module, images: Tensor, folder: Path) -> Runner:
    """The exported network in an engine."""
    graph = deploy_graph(network, images.shape[1:])
    path = folder / f"{len([*folder.iterdir()])}{ENDINGS[engine]}"  # a file of its own: OpenVINO maps it
    if engine == "openvino":
        openvino_ir.write_openvino(graph, path)
    else:
        onnx.save(qdq_model(graph), path)
    return Engine(engine).open(path, threads=1)


def milliseconds(runners: Mapping[Any, Runner], images: Tensor, repeats: int) -> dict[Any, float]:
    """Median processor time of one image in each file, in turn."""
    image, times = images[:1].numpy(), {name: [] for name in runners}
    counts: dict[Any, int] = {}
    for name, runner in runners.items():
        for _ in range(2):  # the first time warms up
            begun = time.process_time()
            for _ in range(5):
                runner.run(image)
        counts[name] = max(1, int(TURN * 5 / max(time.process_time() - begun, 1e-6)))
    for _ in range(repeats):
        for name, runner in runners.items():
            begun = time.process_time()
            for _ in range(counts[name]):
                runner.run(image)
            times[name].append(1000 * (time.process_time() - begun) / counts[name])
    return {name: statistics.median(values) for name, values in times.items()}


def with_quantizer_behind(network: nn.Module, images: Tensor) -> set[str]:
    """The layers of a quantized network whose output, behind a ReLU or not, only quantizers read."""
    graph = deploy_graph(network, images.shape[1:]).model.graph
    made = {name: node for node in graph.node for name in node.output}
    found = set()
    for node in graph.node:
        weight = made.get(node.input[1]) if node.op_type in PRODUCTS else None
        behind = [other for other in graph.node if node.output[0] in other.input]
        if len(behind) == 1 and behind[0].op_type == "Relu":
            behind = [other for other in graph.node if behind[0].output[0] in other.input]
        if weight is not None and behind and all(other.op_type == "Activation" for other in behind):
            found.add(node_key(weight).removesuffix(".quant_weight"))
    return found


def measure(network: nn.Module, images: Tensor, engine: str, bits: Sequence[int], repeats: int) -> list[str]:
    """Two tables as text: the layers, and whole networks."""
    cost = network_cost(network, (images.shape[2], images.shape[3]), images.shape[1])
    names = [row.name for row in cost.layers]
    signed = [name for name, share in below_zero(network, images).items() if share > 0]
    entering: dict[str, Tensor] = {}
    with observing(network) as hooks:
        for name in names:
            hooks.append(
                network.get_submodule(name).register_forward_pre_hook(
                    lambda _, inputs, named, name=name: entering.update({name: first_input(inputs, named)}),
                    with_kwargs=True,
                )
            )
        network(images)
    uniform = {width: dict.fromkeys(names, width) for width in bits}
    behind = with_quantizer_behind(quantized(network, images, uniform[min(bits)], signed, "fm", "wt"), images)

    found: dict[tuple[Any, ...], dict[Any, float]] = {}
    kinds: dict[str, tuple[Any, ...]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for row in cost.layers:
            x = entering[row.name].contiguous()
            kind = (row.kind, "x".join(map(str, x.shape[1:])), row.name in behind, row.name in signed)
            kinds[row.name] = kind
            if kind in found:
                continue
            layer = copy.deepcopy(network.get_submodule(row.name))
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            if layer.bias is None:  # that of the norm behind it
                layer.bias = nn.Parameter(torch.zeros(len(layer.weight)))
            tags = ("fm", "wt", "ot") if row.name in behind else ("fm", "wt")
            plain = nn.Sequential(layer, nn.ReLU() if row.name in behind else nn.Identity(), nn.Flatten())
            runners: dict[Any, Runner] = {
                "nothing": opened(engine, nn.Sequential(nn.ReLU(), nn.Flatten()), x, place)
            }
            runners["float"] = opened(engine, plain.eval(), x, place)
            for width in bits:
                one = nn.Sequential(layer, nn.Flatten())
                one = quantized(one, x, {"0": width}, ["0"] if row.name in signed else [], *tags)
                runners[width] = opened(engine, one, x, place)
            times = milliseconds(runners, x, repeats)
            found[kind] = {name: value - times["nothing"] for name, value in times.items()} | {
                "nothing": times["nothing"]
            }
        draw = random.Random(0)
        plans = {f"{width} bits": uniform[width] for width in bits} | {
            f"drawn {number}": {name: draw.choice(list(bits)) for name in names}
            for number in range(1, RANDOM + 1)
        }
        runners = {"float": opened(engine, network, images, place)}
        for title, plan in plans.items():
            runners[title] = opened(
                engine, quantized(network, images, plan, signed, "fm", "wt"), images, place
            )
        whole = milliseconds(runners, images, repeats)
    columns = ("nothing", "float", *bits)
    rows = [
        (f"{kind[0]}, {kind[1]}{', quantized behind' if kind[2] else ''}", str(list(kinds.values()).count(kind)),
         *(f"{1000 * times[column]:.0f}" for column in columns))
        for kind, times in found.items()
    ]  # fmt: skip
    head = ("layer, input", "layers", "nothing", "float", *(f"{width} bits" for width in bits))
    rest = whole["float"] - sum(found[kinds[name]]["float"] for name in names)
    networks = []
    for title, plan in plans.items():
        predicted = rest + sum(found[kinds[name]][plan[name]] for name in names)
        error = f"{100 * (predicted / whole[title] - 1):+.0f} %"
        integer = f"{runners[title].integer} of {runners[title].layers}"
        networks.append((title, f"{1000 * predicted:.0f}", f"{1000 * whole[title]:.0f}", error, integer))
    return [
        f"{engine} {versions([engine])[engine]}, microseconds of an image:", "", format_table(head, rows), "",
        format_table(("network", "predicted", "measured", "error", "integer layers"), networks),
        f"in float {1000 * whole['float']:.0f}; {1000 * rest:.0f} without the times of its layers",
    ]  # fmt: skip


def main() -> int:
    """Print the tables of each engine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--options", default=DIGITS, help="of main.py, for the network in full precision")
    parser.add_argument("--engines", nargs="+", choices=tuple(ENDINGS), default=list(ENDINGS))
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2])
    parser.add_argument("--repeats", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = read(options.options.split()).model
    network = build_network(settings).eval()
    size = settings.input_size
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(8, settings.channels, height, width, generator=torch.Generator().manual_seed(0))
    for engine in options.engines:
        print("\n".join(measure(network, images, engine, options.bits, options.repeats)), flush=True)
        print()
    print(cpu())
    return 0


if __name__ == "__main__":
    sys.exit(main())
