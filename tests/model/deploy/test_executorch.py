"""ExecuTorch's files: their codes bit by bit, products of integers, the geometry of layers, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.convert import quantize
from model.deploy.codes import WeightCodes
from model.deploy.engines import Engine, read_metadata
from model.deploy.graph import deploy_graph
from model.quant import QuantConfig, QuantConv2d, QuantizerConfig, QuantLinear
from tests.model.deploy.networks import Geometry, Single, exported, images, torch_values
from utils.checkpoint.exported import kind_of
from utils.errors import UserError

pytest.importorskip("executorch")

from model.deploy.executorch.file import read_executorch
from model.deploy.executorch.write import executorch_file

ENGINE = Engine("executorch")


def lsq(tag: str, levels: int, *, half_range: bool = False) -> QuantizerConfig:
    return QuantizerConfig(tag=tag, enable=True, method="lsq", levels=levels, half_range=half_range)


def written(network: nn.Module, shape: tuple[int, ...], path: Path) -> Path:
    path.write_bytes(executorch_file(deploy_graph(network, shape, metadata={"classes": '["é"]'})).data)
    return path


def stored_codes(data: bytes, weight: WeightCodes) -> np.ndarray:
    """The codes of a weight by its bytes, channels last, without the channels of zeros behind them."""
    shape = weight.codes.shape
    codes = np.frombuffer(data, np.int8).reshape(shape[0], *shape[2:], -1)
    assert not codes[..., shape[1] :].any()
    return np.moveaxis(codes[..., : shape[1]], -1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["methods", "widths", "options"])
def test_the_codes_of_weights_are_those_of_the_network(kind: str, tmp_path: Path) -> None:
    _, graph = exported(kind)
    made = executorch_file(graph)
    path = tmp_path / "x.pte"
    path.write_bytes(made.data)
    content = read_executorch(path)
    for name, weight in graph.weights.items():
        if name in made.float_weights:
            value = np.frombuffer(content.named[name], np.float32).reshape(*weight.codes.shape[::2], 3, -1)
            np.testing.assert_array_equal(np.moveaxis(value, -1, 1), weight.values())
        else:
            np.testing.assert_array_equal(stored_codes(content.named[f"{name}.codes"], weight), weight.codes)
    scaled = [
        name for name, weight in graph.weights.items() if weight.scaled and np.abs(weight.codes).max() < 128
    ]
    assert len(scaled) - len(set(scaled) & set(made.float_weights)) >= 7


def test_layers_of_each_geometry_compute_what_torch_does(tmp_path: Path) -> None:
    """Each quantizer has no level of zero, so that padded places have values."""
    network = Geometry().eval()
    quantize(network, QuantConfig(fm=lsq("fm", 4), wt=lsq("wt", 4), first_last=True))
    path = written(network, (3, 12, 12), tmp_path / "x.pte")
    assert (kind_of(path), read_metadata(path)["classes"]) == ("executorch", '["é"]')
    x = images(8, size=12)
    expected = torch_values(network, x)
    runner = ENGINE.open(path, tensors=True, threads=1)
    assert (runner.integer, runner.layers) == (8, 11)  # but for convolutions in groups
    found = runner(x.numpy())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        far = np.abs(found[name] - value) > 1e-3 * np.abs(value).max()
        assert far.mean() <= 0.005, name


def test_ties_go_to_even_levels_by_division(tmp_path: Path) -> None:
    """A step of 0.3: half of them are other numbers when they are multiplied by 1 / 0.3."""
    network = nn.Sequential(QuantConv2d(1, 1, 1), nn.Flatten()).eval()
    network[0].build_quantizers(QuantConfig(fm=lsq("fm", 16, half_range=True)), "0")
    with torch.no_grad():
        network[0].quant_activation.clip_val.fill_(float(15 * np.float32(0.3)))
    graph = deploy_graph(network, (1, 4, 4))
    path = tmp_path / "x.pte"
    path.write_bytes(executorch_file(graph).data)
    step = np.float32(graph.activations["0.quant_activation"].step)
    x = ((np.arange(16) - 1 + 0.5).astype(np.float32) * step).reshape(1, 1, 4, 4)
    found = ENGINE.open(path, tensors=True, threads=1)(x)["0.quant_activation"]
    np.testing.assert_array_equal(np.round(found / step), np.clip(np.round(x / step), 0, 15))


@pytest.mark.parametrize(("levels", "half_range"), [(2, True), (4, False), (256, True)])
def test_sums_are_those_of_the_codes(levels: int, half_range: bool, tmp_path: Path) -> None:
    """XNNPACK finds a scale for each image: it is that of the codes, whichever of them occur.

    No quantizer follows, so that the sums are floats; values far beyond the levels do not run on to 127.
    """
    torch.manual_seed(0)
    network = nn.Sequential(QuantConv2d(6, 5, 3, padding=1), nn.Flatten()).eval()
    layer = network[0]
    layer.build_quantizers(QuantConfig(fm=lsq("fm", levels, half_range=half_range), wt=lsq("wt", 16)), "0")
    graph = deploy_graph(network, (6, 8, 8))
    path = tmp_path / "x.pte"
    path.write_bytes(executorch_file(graph).data)
    fm, wt = graph.activations["0.quant_activation"], graph.weights["0.quant_weight"]
    noise = torch.randn(1, 6, 8, 8)
    x = torch.cat([1e3 * noise, noise, 0.3 * noise, 0 * noise, -1e3 * noise.abs()])
    runner = ENGINE.open(path, tensors=True)
    found = runner(x.numpy())
    value = found["0.quant_activation"]
    beside = 1 if value.shape[2] == 10 else 0  # padded in front of the quantizer
    with torch.no_grad():
        wanted = layer.quant_activation(nn.functional.pad(x, [beside] * 4)).numpy()
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    codes = np.round(value / fm.scale).astype(np.int64)
    assert (codes.min(), codes.max()) == (fm.lowest, fm.highest)
    codes = np.pad(codes, [(0, 0), (0, 0), *[(1 - beside, 1 - beside)] * 2])
    places = np.lib.stride_tricks.sliding_window_view(codes, (3, 3), axis=(2, 3))
    sums = np.einsum("nchwij,ocij->nohw", places, wt.codes.astype(np.int64))
    scale, bias = (np.float64(one).reshape(1, -1, 1, 1) for one in (wt.scale, layer.bias.detach().numpy()))
    wanted = (sums * (fm.scale * scale) + bias).reshape(len(x), -1)
    np.testing.assert_allclose(found["logits"], wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())
    assert (runner.integer, runner.layers) == (1, 1)


def test_single_operators(tmp_path: Path) -> None:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "largest of a row": lambda x: x * x.amax(3, keepdim=True),
        "smallest of channels": lambda x: x - x.amin(1, keepdim=True),
        "sums": lambda x: x.sum((1, 2, 3), keepdim=True) + x.mean((2, 3), keepdim=True),
        "where": lambda x: torch.where(x > 0.5, x, -x),
        "signs": lambda x: torch.sign(torch.round(3 * x)) + (x <= 0).float(),
        "whole numbers": lambda x: (2.7 * x).int().float(),
        "slope": lambda x: nn.functional.leaky_relu(x, 0.123456789),
        "equal": lambda x: (x == x.amax((2, 3), keepdim=True)).float(),
    }
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    network = Single(
        lambda x: torch.cat([(function(x) + 0 * x).flatten(1) for function in functions.values()], 1)
    )
    found = ENGINE.open(written(network.eval(), (4, 4, 4), tmp_path / "x.pte"))(x.numpy())["logits"]
    for (name, function), part in zip(functions.items(), np.split(found, len(functions), 1), strict=True):
        wanted = (function(x) + 0 * x).flatten(1).numpy()
        np.testing.assert_allclose(part, wanted, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x: torch.where(x > 0, x, torch.inf).flatten(1),
            "ExecuTorch files do not hold a choice of infinite numbers",
        ),
        (lambda x: torch.cumsum(x, dim=1).flatten(1), "ExecuTorch files do not hold the operator CumSum"),
        (
            lambda x: x.mean((1, 2)).flatten(1),
            "ExecuTorch files hold means, sums and largest values of neighbouring",
        ),
        (
            lambda x: nn.functional.avg_pool2d(x, 1, 2).flatten(1),
            "ExecuTorch files do not hold a pool of single places",
        ),
    ],
)
def test_what_is_not_held_is_refused(function: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(UserError, match=f"{message}.*; export --to onnx$"):
        executorch_file(deploy_graph(Single(function).eval(), (4, 4, 4)))


def test_a_file_takes_its_codes_scales_and_floats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    ).eval()  # fmt: skip
    quantize(network, QuantConfig(fm=lsq("fm", 4, half_range=True), wt=lsq("wt", 4)))
    path = written(network, (3, 8, 8), tmp_path / "x.pte")
    codes = 9 * (64 * 64 + 64 * 128)
    floats = 4 * (64 * 28 + 2 * 64 + 2 * 128 + 10 * 129)
    assert path.stat().st_size <= 1.1 * (codes + floats)


@pytest.mark.parametrize("data", [b"none", b"\0\0\0\0ET12" + b"\xff" * 8])
def test_damaged_files(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pte"
    path.write_bytes(data)
    for use in (ENGINE.open, read_metadata):
        with pytest.raises(UserError, match=r"x\.pte: not a valid file of ExecuTorch"):
            use(path)


@pytest.mark.slow
def test_a_file_that_is_loaded_by_its_path_computes_the_same(tmp_path: Path) -> None:
    """Loaded so, it is mapped into memory, and given back in part once the runtime has made its own graph of it."""
    network, graph = exported("options")
    path = tmp_path / "x.pte"
    path.write_bytes(executorch_file(graph).data)
    x = images(1)
    np.save(tmp_path / "x.npy", x.numpy())
    program = (
        "import sys, numpy, torch; from executorch.runtime import Runtime\n"
        "program = Runtime.get().load_program(sys.argv[1])\n"
        "(logits,) = program.load_method('forward').execute([torch.from_numpy(numpy.load(sys.argv[2]))])\n"
        "numpy.save(sys.argv[3], logits.numpy())\n"
    )
    command = [sys.executable, "-c", program, str(path), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    subprocess.run(command, check=True, capture_output=True)
    np.testing.assert_allclose(
        np.load(tmp_path / "y.npy"), torch_values(network, x)["logits"], rtol=1e-3, atol=1e-3
    )


def test_choices_between_infinite_numbers_and_sums_beyond_32_bits() -> None:
    def guarded(x: Tensor) -> Tensor:
        y = torch.where(x > 0, x / x.relu(), x)
        return y.mean(dim=(2, 3))

    with pytest.raises(
        UserError, match="it chooses between numbers one of which may be infinite; export --to onnx"
    ):
        executorch_file(deploy_graph(Single(guarded), (3, 6, 6)))
    wide = QuantLinear(70000, 4)
    nn.init.ones_(wide.weight)
    parts = {"fm": lsq("fm", 256, half_range=True), "wt": lsq("wt", 256)}
    wide.build_quantizers(QuantConfig(**parts), "1")
    made = executorch_file(deploy_graph(nn.Sequential(nn.Flatten(), wide).eval(), (70000, 1, 1)))
    assert made.float_weights == ("1.quant_weight",)
