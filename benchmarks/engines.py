"""Measures exported networks in engines: bytes on disk, and the time of one image beside the float network.

    python benchmarks/engines.py                         # ResNet-18 at 224 pixels, 1, 2, 3, 4 and 8 bits, and binary
    python benchmarks/engines.py --bits 2 --size 64      # one bit width, smaller images
    python benchmarks/engines.py --formats executorch litert mnn --bits 2 4

The weights are random: they decide neither size nor speed. First and last layer have the bits of all others, and are in
float in `binary`. Each network takes turns with the float network of the same block in the same engine, on one thread;
printed are the median ratio of neighbours and its quartiles, so that a machine that is busy at times shows in the
spread, and the layers that are integer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project is no package

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import torch  # noqa: E402

from model.calibrate import initialise_ranges  # noqa: E402
from model.deploy.engines import engines_of, versions  # noqa: E402
from model.deploy.formats import ENDINGS, GRAPH_FORMATS, write_litert  # noqa: E402
from model.deploy.graph import deploy_graph  # noqa: E402
from model.deploy.onnx_qdq import qdq_model  # noqa: E402
from model.deploy.sums import with_integer_sums  # noqa: E402
from model.deploy.verify import bytes_of, cpu  # noqa: E402
from model.networks.build import build_network  # noqa: E402
from utils.config.resolve import read  # noqa: E402
from utils.text import format_table  # noqa: E402

FLOAT = "--keyword imagenet,origin,cbsa,fix"
QUANTIZED = "--keyword imagenet,origin,cbsa,fix,dorefa,lsq,first-last --fm_first_signed --bits"
# Bi-Real Net's block, whose convolutions are signs by signs; zeros as padding, which BinaryConvolution has.
SIGNS = "--keyword imagenet,NReLU,cbsa,fix_pooling,singleconv,real_skip"
BINARY = (
    f"{SIGNS},xnor{{}} --fm_enable --wt_enable --fm_bit 1 --wt_bit 1 --fm_grad_type STE --padding_after_quant"
)
NETWORKS = {  # of bits without a number, and of the float network beside them
    "float": FLOAT,
    "binary float": SIGNS,
    "binary": BINARY.format(""),
    "binary, first and last": BINARY.format(",first-last"),
}
BITS = ["1", "ternary", "2", "3", "4", "8", "binary", "binary, first and last"]
PACKAGES = {
    "c": (), "executorch": ("executorch",), "litert": ("ai-edge-litert",), "mnn": ("MNN",),
    "onnx": ("onnxruntime",), "openvino": ("openvino",),
}  # fmt: skip
WARM_UP = 3


def write(folder: Path, model: str, bits: str, image: np.ndarray, formats: Sequence[str]) -> dict[str, Path]:
    """The files of a network by their formats; `bits` is a number, `ternary` or of `NETWORKS`."""
    options = NETWORKS.get(bits, f"{QUANTIZED} {bits}")
    torch.manual_seed(0)
    size = image.shape[-1]
    config = read(f"--model {model} --num_classes 1000 --input_size {size} {options}".split()).model
    network = build_network(config)
    quantized = not bits.endswith("float")
    if quantized:
        initialise_ranges(network, torch.from_numpy(image))
    graph = deploy_graph(network, image.shape[1:])
    paths = {kind: folder / f"{bits}{ENDINGS[kind]}" for kind in formats}
    for kind, path in paths.items():
        GRAPH_FORMATS[kind](graph, path)
    if quantized and "onnx" in formats:
        paths["onnx, 8-bit sums"] = folder / f"{bits}-sums.onnx"
        onnx.save(qdq_model(with_integer_sums(graph, image)), paths["onnx, 8-bit sums"])
    if quantized and "litert" in formats:
        paths["litert, 8-bit codes"] = folder / f"{bits}-codes.tflite"
        write_litert(graph, paths["litert, 8-bit codes"], int8_weights=True)
    return paths


def size_of(path: Path) -> float:
    """MiB of an exported file."""
    return bytes_of(path) / 2**20


def seconds(run: Callable[[], Any]) -> float:
    """How long a call takes."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def measure(run: Callable[[], Any], plain: Callable[[], Any], repeats: int) -> list[tuple[float, float]]:
    """Seconds of both, in turn."""
    for _ in range(WARM_UP):
        run()
        plain()
    return [(seconds(run), seconds(plain)) for _ in range(repeats)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Measures exported networks in engines.")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--bits", nargs="+", default=BITS)
    parser.add_argument("--formats", nargs="+", choices=PACKAGES, default=["onnx", "openvino"])
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    image = np.random.default_rng(0).standard_normal((1, 3, options.size, options.size)).astype(np.float32)
    rows, floats = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for bits in options.bits:
            beside = "binary float" if bits.startswith("binary") else "float"
            if beside not in floats:
                floats[beside] = write(folder, options.model, beside, image, options.formats)
            plain = floats[beside]
            for way, path in write(folder, options.model, bits, image, options.formats).items():
                kind = way.partition(",")[0]
                engine, whole = engines_of(path)[0], size_of(plain[kind])
                runner, other = (engine.open(file, threads=1) for file in (path, plain[kind]))
                times = measure(lambda: runner(image), lambda: other(image), options.repeats)  # noqa: B023
                ratios = [slow / fast for fast, slow in times]
                low, middle, high = statistics.quantiles(ratios, n=4)
                rows.append(
                    (
                        bits, way, f"{size_of(path):.2f}", f"{whole / size_of(path):.1f}",
                        f"{1000 * statistics.median(own for own, _ in times):.1f}",
                        f"{1000 * statistics.median(plain for _, plain in times):.1f}",
                        f"{middle:.2f}", f"{low:.2f} to {high:.2f}",
                        "-" if runner.integer is None else f"{runner.integer} of {runner.layers}",
                    )
                )  # fmt: skip
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    head = ("bits", "file", "MiB", "smaller", "ms", "float ms", "faster", "quartiles", "integer layers")
    print(format_table(head, rows))
    packages = [name for kind in options.formats for name in PACKAGES[kind]]
    installed = ", ".join(f"{name} {version}" for name, version in versions(packages).items())
    print(
        f"{options.model}, {options.size} pixels, batch 1, one thread, {options.repeats} pairs of runs; {installed}"
    )
    print(cpu())


if __name__ == "__main__":
    main()
