"""What hls4ml makes of exported QONNX files, in its C++ simulation beside torch.

    pip install hls4ml==1.3.0  # and a C++ compiler
    python benchmarks/fpga.py

Small networks with random weights, seed 0, 2 bits. Each is exported to `qonnx`, cleaned and put into channels-last by
qonnx, converted and compiled by hls4ml (numbers of 32 bits, 16 of them behind the point), and run on 8 random images.
The table has the largest difference of a logit over the largest logit, and the share of the same classes; or why it
failed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.convert import quantize
from model.deploy.graph import deploy_graph
from model.deploy.qonnx_quant import qonnx_model
from model.deploy.qonnx_thresholds import thresholds_model
from model.deploy.quiet import quiet
from model.quant import QuantConfig, QuantizerConfig

SIDE, IMAGES = 6, 8


def networks() -> dict[str, nn.Sequential]:
    """Networks by what they show; the first and the last layer stay in float."""

    def chain(*middle: nn.Module, features: int = 8) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.ReLU(), *middle, nn.ReLU(), nn.Flatten(), nn.Linear(features, 10)
        )

    return {
        "convolution": chain(nn.Conv2d(8, 8, 3), features=128),
        "padding, norm, pool": chain(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)
        ),
        "depthwise": chain(nn.Conv2d(8, 8, 3, groups=8), features=128),
        "linear": chain(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), features=16),
    }


def cleaned(model: Any) -> Any:
    """By qonnx, as hls4ml's documentation asks for."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
    from qonnx.transformation.gemm_to_matmul import GemmToMatMul
    from qonnx.util.cleanup import cleanup_model

    wrapped = cleanup_model(ModelWrapper(model))
    wrapped = wrapped.transform(ConvertToChannelsLastAndClean(make_input_channels_last=True))
    return cleanup_model(wrapped.transform(GemmToMatMul()))


def simulated(model: Any, images: np.ndarray, kind: str, folder: str) -> np.ndarray:
    """The logits of hls4ml's C++; `kind`: io_parallel or io_stream."""
    import hls4ml  # pyright: ignore[reportMissingImports]  # no part of the requirements

    settings = hls4ml.utils.config.config_from_onnx_model(
        model, granularity="name", backend="Vitis", default_precision="fixed<32,16>"
    )
    made = hls4ml.converters.convert_from_onnx_model(
        model, output_dir=folder, backend="Vitis", io_type=kind, hls_config=settings
    )
    made.compile()
    return made.predict(np.ascontiguousarray(images.transpose(0, 2, 3, 1)))


def result(model: Any, images: np.ndarray, wanted: np.ndarray, kind: str) -> str:
    """A cell of the table."""
    with tempfile.TemporaryDirectory() as folder, quiet(1, 2):
        try:
            found = simulated(cleaned(model), images, kind, folder).reshape(wanted.shape)
        except Exception as error:  # qonnx and hls4ml raise exceptions without a common base
            return f"failed: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    difference = np.abs(found - wanted).max() / np.abs(wanted).max()
    same = 100 * (found.argmax(1) == wanted.argmax(1)).mean()
    return f"{difference:.0e}, {same:.0f} %"


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    form = QuantizerConfig(tag="fm", enable=True, method="lsq", levels=4, half_range=True)
    settings = QuantConfig(fm=form, wt=QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4))
    images = torch.randn(IMAGES, 3, SIDE, SIDE)
    print("| network | `qonnx`, io_parallel | `qonnx`, io_stream | `thresholds` |\n|---|---|---|---|")
    for name, network in networks().items():
        quantize(network, settings)
        network.eval()
        with torch.no_grad(), quiet(1, 2):
            wanted = network(images).numpy()
            graph = deploy_graph(network, (3, SIDE, SIDE))
        cells = [
            result(qonnx_model(graph), images.numpy(), wanted, kind) for kind in ("io_parallel", "io_stream")
        ]
        cells.append(result(thresholds_model(graph).model, images.numpy(), wanted, "io_parallel"))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
