"""MNN's files: their codes bit by bit, rounding, the geometry of layers, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.convert import quantize
from model.deploy.engines import Engine, read_metadata
from model.deploy.graph import deploy_graph
from model.deploy.mnn.codes import decoded, encoded
from model.deploy.mnn.convert import CONVERTER, convert
from model.deploy.mnn.write import write_mnn
from model.quant import QuantConfig, QuantConv2d, QuantizerConfig
from tests.model.deploy.networks import Geometry, Single, exported, images, torch_values
from utils.checkpoint.exported import kind_of
from utils.errors import UserError

pytest.importorskip("MNN")
ENGINES = (Engine("mnn"), Engine("mnn", False))


def dumped(path: Path) -> list[dict[str, Any]]:
    """The operators of a file, as MNN's converter reads them; floats have six digits behind the point."""
    made = path.with_suffix(".json")
    options = ["-f", "MNN", "--modelFile", str(path), "--JsonFile", str(made)]
    subprocess.run([sys.executable, "-c", CONVERTER, *options], check=True, capture_output=True)
    return json.loads(made.read_text())["oplists"]


def stored_codes(data: list[int]) -> tuple[np.ndarray, int]:
    """The integers [out, others] of a weight, and the bits of each, by MNN's description of the bytes."""
    found = np.array(data, np.int8).view(np.uint8).tolist()
    out, others = found[1] + 256 * found[2], found[3] + 256 * found[4]
    count = found[5] or 256
    table = np.array(found[6 : 6 + count], np.uint8).view(np.int8)
    bits = max(1, int(np.ceil(np.log2(count))))
    stream = "".join(f"{byte:08b}" for byte in found[6 + count :])
    numbers = [int(stream[i * bits : (i + 1) * bits], 2) for i in range(out * others)]
    return table[numbers].astype(int).reshape(out, others), bits


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["methods", "widths", "options"])
def test_the_codes_of_weights_are_those_of_the_network(kind: str, tmp_path: Path) -> None:
    _, graph = exported(kind)
    path = tmp_path / "x.mnn"
    floats = write_mnn(graph, path)
    layers = {
        one.get("name", ""): one["main"] for one in dumped(path) if one.get("main_type") == "Convolution2D"
    }
    for name, weight in graph.weights.items():
        layer = layers[name]
        if name in floats:
            assert not weight.scaled or np.abs(weight.codes).max() > 127
            np.testing.assert_allclose(layer["weight"], weight.values().reshape(-1), atol=1e-6)
            continue
        codes, bits = stored_codes(layer["quanParameter"]["buffer"])
        np.testing.assert_array_equal(codes, weight.codes.reshape(len(codes), -1))
        assert 2**bits < 2 * max(2, len(np.unique(weight.codes)))  # no more than needed
        scale = np.broadcast_to(weight.scale.reshape(-1), len(codes))
        np.testing.assert_allclose(layer["quanParameter"]["alpha"], scale, atol=1e-6)


@pytest.mark.parametrize(
    ("levels", "bits"),
    [([-1, 1], 1), ([5], 1), ([-1, 0, 1], 2), ([-3, -1, 1, 3], 2), ([-2, 1], 1), (range(-4, 4), 3),
     (range(-15, 16, 2), 4), (range(-128, 128), 8)],
)  # fmt: skip
def test_codes_take_the_fewest_bits_and_come_back(levels: list[int], bits: int) -> None:
    """Also where a channel lacks an end, or zero; an odd number of codes of four bits takes five."""
    rng = np.random.default_rng(0)
    for shape in ((4, 3, 3, 3), (1, 5)):
        codes = np.resize(rng.permutation(levels), shape).astype(np.int32)
        data, long = encoded(codes)
        np.testing.assert_array_equal(decoded(data, long), codes.reshape(shape[0], -1))
        if codes.size >= len(levels):
            found, taken = stored_codes(data.view(np.int8).tolist())
            np.testing.assert_array_equal(found, codes.reshape(shape[0], -1))
            assert taken == (5 if bits == 4 and codes.size % 2 else bits)


def test_long_sides_of_a_weight() -> None:
    codes = np.resize([-1, 0, 1, 1], (2, 70000)).astype(np.int32)
    data, long = encoded(codes)
    assert long
    np.testing.assert_array_equal(decoded(data, long), codes)


def test_one_output_of_an_odd_number_of_weights(tmp_path: Path) -> None:
    """Four bits for an odd number of weights would be read as one weight more."""
    network = nn.Sequential(QuantConv2d(5, 1, 1), nn.Flatten()).eval()
    part = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=16)
    network[0].build_quantizers(QuantConfig(wt=part), "0")
    x, path = images(2, 5, 3), tmp_path / "x.mnn"
    write_mnn(deploy_graph(network, (5, 3, 3)), path)
    with torch.no_grad():
        wanted = network(x).numpy()
    np.testing.assert_allclose(Engine("mnn").open(path)(x.numpy())["logits"], wanted, rtol=1e-5, atol=1e-6)


def test_layers_of_each_geometry_compute_what_torch_does(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each quantizer has no level of zero, so that padded places have values. MNN's own lines are not shown."""
    network = Geometry().eval()
    parts = {tag: QuantizerConfig(tag=tag, enable=True, method="lsq", levels=4) for tag in ("fm", "wt")}
    quantize(network, QuantConfig(**parts, first_last=True))
    graph = deploy_graph(network, (3, 12, 12), metadata={"classes": "[]"})
    path = tmp_path / "x.mnn"
    capfd.readouterr()
    assert write_mnn(graph, path) == ()
    assert (kind_of(path), read_metadata(path)["classes"]) == ("mnn", "[]")
    x = images(8, size=12)
    expected = torch_values(network, x)
    for engine in ENGINES:
        found = engine.open(path, tensors=True, threads=1)(x.numpy())
        assert found.keys() == expected.keys() == {"logits", *graph.activations}
        for name, value in expected.items():
            far = np.abs(found[name] - value) > 1e-3 * np.abs(value).max()
            assert far.mean() <= 0.005, (name, engine)
    assert capfd.readouterr() == ("", "")
    assert "MNN.tools" not in sys.modules  # which would call pip


class Two(nn.Module):
    """Two quantizers of the same image: codes 0 .. 14 with a step of 0.3, and -7 .. 7 with 0.25."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([QuantConv2d(1, 1, 1), QuantConv2d(1, 1, 1)])
        for layer, highest, step in zip(self.layers, (14, 7), (0.3, 0.25), strict=True):
            part = QuantizerConfig(tag="fm", enable=True, method="lsq", levels=15, half_range=highest == 14)
            layer.build_quantizers(QuantConfig(fm=part), "layer")
            nn.init.constant_(layer.quant_activation.clip_val, float(highest * np.float32(step)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x).flatten(1) for layer in self.layers], 1)


def test_ties_go_to_even_levels_by_division(tmp_path: Path) -> None:
    """Half of the ties of 0.3 are other numbers when they are multiplied by 1 / 0.3; MNN's ROUND moves all."""
    path, graph = tmp_path / "x.mnn", deploy_graph(Two().eval(), (1, 4, 8))
    write_mnn(graph, path)
    steps = [np.float32(codes.step) for codes in graph.activations.values()]
    numbers = np.arange(16).astype(np.float32)
    x = np.concatenate([(numbers - 0.5) * steps[0], (numbers - 7.5) * steps[1]]).reshape(1, 1, 4, 8)
    for engine in ENGINES:
        found = engine.open(path, tensors=True, threads=1)(x)
        for (name, codes), step in zip(graph.activations.items(), steps, strict=True):
            wanted = np.clip(np.round(x / step), codes.lowest, codes.highest)
            np.testing.assert_array_equal(np.round(found[name] / step), wanted)
            assert (x / step % 1 == 0.5).sum() >= 12


HALVES = [
    0.5,
    1.5,
    2.5,
    -0.5,
    -1.5,
    -2.5,
    0.49999997,
    0.50000006,
    -0.49999997,
    2**21 + 0.5,
    2**22 + 0.5,
    2**23 + 1,
]
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "numbers at and beside the middle": lambda x: torch.round(
        x.mean((1, 2, 3))[:, None] * 0 + torch.tensor(HALVES)
    ),
    "round within ends": lambda x: torch.round(x.clamp(-2, 2) * 2),
    "largest of a row": lambda x: x * x.amax(3, keepdim=True),
    "smallest of channels": lambda x: x - x.amin(1, keepdim=True),
    "where": lambda x: torch.where(x > 0.5, x, -x),
    "where of channels": lambda x: torch.where(x > 0.5, x, torch.arange(4.0).reshape(1, 4, 1, 1)),
    "truths": lambda x: torch.where((x > 0.5) & (x < 1), 2.0, x.sign()),
    "leaky": lambda x: (nn.functional.leaky_relu(x, 0.1) / (1 + x.abs())).transpose(1, 2),
    "pad": lambda x: nn.functional.pad(x, (1, 2, 0, 1), value=0.5),
    "gates": lambda x: nn.functional.hardsigmoid(x) + torch.tanh(x),
    "means": lambda x: x.mean((2, 3)).softmax(1) + torch.relu(x).sum((2, 3)),
    "whole numbers": lambda x: (x.round().int() * 2).float(),
}


def test_single_operators(tmp_path: Path) -> None:
    x, path = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), tmp_path / "x.mnn"
    wanted = {name: function(x).flatten(1).numpy() for name, function in FUNCTIONS.items()}
    together = Single(lambda x: torch.cat([function(x).flatten(1) for function in FUNCTIONS.values()], 1))
    write_mnn(deploy_graph(together.eval(), (4, 4, 4)), path)
    for engine in ENGINES:
        found, start = engine.open(path)(x.numpy())["logits"], 0
        for name, value in wanted.items():
            part = found[:, start : start + value.shape[1]]
            np.testing.assert_allclose(part, value, rtol=1e-5, atol=1e-6, err_msg=name)
            start += value.shape[1]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.where(x > 0.2, 1.0, 2.0),
        lambda x: torch.where(x >= 0.5, 3.0, torch.where(x >= 0.1, 2.0, 0.0)),
        lambda x: torch.where(x.isinf(), 1.0, x),
    ],
)
def test_choices_between_convolutions(function: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    """Convolutions take and give channels in fours."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), Single(function), nn.Conv2d(8, 4, 3), nn.Flatten()).eval()
    x, path = torch.randn(2, 3, 9, 8), tmp_path / "x.mnn"
    write_mnn(deploy_graph(network, (3, 9, 8)), path)
    with torch.no_grad():
        wanted = network(x).numpy()
    for engine in ENGINES:
        np.testing.assert_allclose(engine.open(path)(x.numpy())["logits"], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: torch.cumsum(x, dim=1).flatten(1), "MNN files do not hold the operator CumSum"),
        (lambda x: (x > 0).int().sum((2, 3)).float(), "this ReduceSum: its numbers are no floats"),
        (
            lambda x: nn.functional.avg_pool2d(x, 3, 2, ceil_mode=True).flatten(1),
            "AveragePool: its last places may reach beyond the images",
        ),
        (
            lambda x: x.permute(0, 2, 3, 1).reshape(-1, 4).relu().reshape(x.shape[0], -1),
            "(MNN does not run this network|logits: MNN makes a tensor).*",
        ),
    ],
)
def test_what_would_be_wrong_is_refused(
    function: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.mnn"
    with pytest.raises(UserError, match=f"{message}; export --to onnx$"):
        write_mnn(deploy_graph(Single(function).eval(), (4, 4, 4)), path)
    assert not path.exists()


def test_a_weight_that_the_converter_changes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MNN's converter reports success whatever it writes."""
    network = nn.Sequential(QuantConv2d(3, 4, 1), nn.Flatten()).eval()
    part = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
    network[0].build_quantizers(QuantConfig(wt=part), "0")
    graph = deploy_graph(network, (3, 2, 2))
    write_mnn(graph, tmp_path / "x.mnn")
    weight = graph.weights["0.quant_weight"]
    data, _ = encoded(-weight.codes)
    monkeypatch.setattr("model.deploy.mnn.network.encoded", lambda codes: (data, False))
    with pytest.raises(
        UserError, match=r"0\.quant_weight: MNN's file does not hold the weight that was trained"
    ):
        write_mnn(graph, tmp_path / "y.mnn")


def test_what_the_converter_leaves_out(tmp_path: Path) -> None:
    """An entry that its schema lacks is left out, with a line and exit status 0."""
    with pytest.raises(UserError, match=r"MNN's converter does not take this network .Invalid: nothing"):
        convert({"nothing": 1}, tmp_path / "x.mnn")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"no", b"\xff" * 64, b"\x10\0\0\0" + b"\0" * 60])
def test_damaged_files(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.mnn"
    path.write_bytes(data)
    for use in (ENGINES[0].open, read_metadata):
        with pytest.raises(UserError, match=r"x\.mnn: not a (valid file of MNN|file that this tool exports)"):
            use(path)
