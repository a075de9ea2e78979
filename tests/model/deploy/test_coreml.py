"""Core ML packages: an interpreter computes what torch does, and what is read back is the checkpoint's to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from model.deploy.bits import bit_stream
from model.deploy.coreml.engine import compared
from model.deploy.coreml.file import Package, agreement
from model.deploy.coreml.package import OLDER_WIDTHS, WIDTHS, palette_of, write_coreml
from model.deploy.graph import DeployGraph, deploy_graph
from model.deploy.steps import SCOPES
from model.layers.quantized import quantized_layers
from model.quant import QuantConfig, QuantConv2d, QuantizerConfig, QuantLinear
from tests import ROOT
from tests.model.deploy.coreml_interpreter import Interpreter
from tests.model.deploy.networks import torch_values
from tests.model.deploy.test_words import CHECKPOINT, export, words
from utils.errors import UserError

SHAPE = (3, 13, 13)


def layer(method: str, levels: tuple[int, int], *, half: bool = True, **more: int) -> QuantConv2d:
    """A convolution from 8 to 8 channels with levels of activations and weights."""
    made = QuantConv2d(8, 8, 3, padding=1, **more)
    made.build_quantizers(config(method, levels, half), "conv")
    nn.init.normal_(made.weight, std=0.7)
    return made


def config(method: str, levels: tuple[int, int], half: bool = True) -> QuantConfig:
    given = {"fm": (levels[0], half), "wt": (levels[1], False)}
    return QuantConfig(
        **{
            tag: QuantizerConfig(tag=tag, enable=True, method=method, levels=count, half_range=is_half)
            for tag, (count, is_half) in given.items()
        }
    )


class Mixed(nn.Module):
    """Strides, depthwise layers, padding in front of levels without a zero, pools, sums and a quantized head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.first = layer("lsq", (4, 4))
        self.depthwise = layer("lsq", (4, 3), half=False, groups=8)
        self.strided = layer("pact", (16, 16), stride=2)
        self.last = layer("lsq", (4, 2))
        self.wide = layer("lsq", (8, 64))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        for norm in (*self.norms, self.stem[1]):
            nn.init.normal_(norm.weight)  # some are negative
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
        self.fc = QuantLinear(8, 10)
        self.fc.build_quantizers(config("lsq", (4, 4)), "fc")

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        y = self.norms[0](self.first(x)).relu()
        x = x + self.norms[1](self.depthwise(y))
        x = (
            nn.functional.avg_pool2d(self.norms[2](self.strided(x)), 3, 1, 1)
            + self.norms[3](self.last(x))[:, :, ::2, ::2]
        )
        return self.fc(self.wide(x.relu()).mean(dim=(2, 3)))


Written = tuple[Mixed, DeployGraph, Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    network = Mixed().eval()
    graph = deploy_graph(network, SHAPE, metadata={"classes": "[]"})
    path = tmp_path_factory.mktemp("coreml") / "x.mlpackage"
    write_coreml(graph, path)
    return network, graph, path


@pytest.mark.slow
def test_a_package_computes_what_torch_does(written: Written) -> None:
    network, graph, path = written
    x = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(1))
    expected, package = torch_values(network, x), Interpreter(path)
    found = package(x.numpy())
    assert found.keys() == expected.keys() == {"logits", *graph.activations}
    for name, value in expected.items():
        apart = np.abs(found[name] - unpadded(value, found[name]))
        assert (apart > 1e-3 * np.abs(value).max()).mean() < 0.002, name
    assert (found["logits"].argmax(1) == expected["logits"].argmax(1)).mean() >= 0.98
    assert (package.opset, package.name, package.shape) == ("CoreML6", "input", (1, *SHAPE))
    divided = sum(codes.step is not None for codes in graph.activations.values())
    assert package.words.count("real_div") >= divided == 5 and package.metadata["classes"] == "[]"


def unpadded(value: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Without the padding that torch adds in front of a quantizer and the package behind it."""
    return value[:, :, 1:-1, 1:-1] if value.ndim == 4 and value.shape[2] == like.shape[2] + 2 else value


@pytest.mark.slow
def test_weights_read_back_are_the_trained_ones(written: Written) -> None:
    """By two readers of the file, ours and Apple's, against torch's quantizer and the factors of its norm."""
    network, graph, path = written
    package, tables = Package(path), Interpreter(path).weights()
    norms = dict(zip(("first", "depthwise", "strided", "last"), network.norms, strict=True))
    names = [f"{name}.quant_weight" for name, _ in quantized_layers(network)]
    assert names == list(graph.weights)
    for name, module in quantized_layers(network):
        assert isinstance(module, QuantConv2d | QuantLinear)
        found = package.weight(f"{name}.quant_weight")
        with torch.no_grad():
            wanted = module.quant_weight(module.weight).double().numpy()
        norm, shape = norms.get(name), (-1,) + (1,) * (wanted.ndim - 1)
        if norm is not None:
            factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            wanted = wanted * factor.detach().numpy().reshape(shape)
        np.testing.assert_allclose(found.values(), wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
        levels = module.quant_weight.levels
        assert all(len(np.unique(row)) <= levels for row in found.table)
        apple = tables[f"{name}.quant_weight"]
        apple = apple if found.factor is None else apple * found.factor.reshape(shape)
        assert np.array_equal(apple, found.values())
    assert agreement(path, graph).faults == ()


@pytest.mark.slow
def test_changed_bytes_are_found(written: Written, tmp_path: Path) -> None:
    """A bit of the indices, and a step of the activations."""
    _, graph, path = written
    changed = tmp_path / "x.mlpackage"
    shutil.copytree(path, changed)
    file = changed / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    content = bytearray(file.read_bytes())
    codes = graph.weights["first.quant_weight"]
    stream = bit_stream(palette_of(codes).indices, 2).tobytes()
    content[content.index(stream) + 7] ^= 1
    file.write_bytes(content)
    spec = changed / "Data" / "com.apple.CoreML" / "model.mlmodel"
    step = graph.activations["strided.quant_activation"].step
    old = np.float32(step).tobytes()
    assert old in spec.read_bytes()
    spec.write_bytes(spec.read_bytes().replace(old, np.float32(1.01 * np.float32(step)).tobytes()))
    first, second = sorted(agreement(changed, graph).faults)
    assert first == "0.2 % of the values of first.quant_weight are others"
    assert second == "strided.quant_activation is not the quantizer of the checkpoint"


@pytest.mark.slow
def test_layers_in_full_precision_are_compared_too(tmp_path: Path) -> None:
    """Of a network with signs: their scale, and the bias of a layer without quantizers."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), layer("xnor", (2, 2)), nn.Flatten(), nn.Linear(128, 3)).eval()
    graph, path = deploy_graph(network, (3, 4, 4)), tmp_path / "x.mlpackage"
    write_coreml(graph, path)
    line, faults = compared(path, graph)
    assert faults == () and line.endswith("are the checkpoint's; predictions need macOS and were not run")
    with torch.no_grad():
        network[-1].bias.add_(1)
    (fault,) = compared(path, deploy_graph(network, (3, 4, 4)))[1]
    assert fault.endswith(": not as export --to coreml writes the checkpoint now")


@pytest.mark.parametrize("bits", WIDTHS)
def test_streams_of_indices(bits: int) -> None:
    """Against the bits of one big number, as coremltools' documentation orders them."""
    indices = np.random.default_rng(0).integers(0, 2**bits, (3, 7))
    number = sum(int(value) << bits * place for place, value in enumerate(indices.ravel()))
    assert bit_stream(indices, bits).tobytes() == number.to_bytes(-(-21 * bits // 8), "little")
    assert bits in OLDER_WIDTHS or bits == 3


@pytest.mark.slow
def test_words_of_tools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.mlpackage"
    (path / "Data").mkdir(parents=True)
    (path / "Manifest.json").touch()
    assert export("coreml", path) == 2
    (path / "own.txt").touch()
    assert export("coreml", path, "--force") == 2
    assert "is a folder, which --force does not replace" in capsys.readouterr().err
    (path / "own.txt").unlink()
    assert export("coreml", path, "--force") == 0
    written = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert f"{written:,} bytes" in capsys.readouterr().out and written < 150_000
    assert words("--keyword", "verify", "--old", CHECKPOINT, path) == 0
    printed = capsys.readouterr().out
    assert "20 quantized weights" in printed and "predictions need macOS and were not run" in printed
    for option in (("--output", tmp_path / "x.json"), ("--threads", "2"), ("--root", tmp_path)):
        assert words("--keyword", "verify", "--old", CHECKPOINT, path, *option) == 2
        assert f"{option[0]} {option[1]}: predictions of Core ML need macOS" in capsys.readouterr().err
    assert words("--keyword", "predict", ROOT / "docs" / "images" / "report.png", "--old", path) == 2
    assert "Core ML predicts on macOS alone" in capsys.readouterr().err
    assert words("--keyword", "load", "--old", path) == 2
    assert "a package of Core ML, no PyTorch checkpoint" in capsys.readouterr().err
    metadata = Package(path).metadata
    assert json.loads(metadata["classes"]) == [str(digit) for digit in range(10)] and "images" in metadata
    (path / "Manifest.json").write_text("{}")
    assert words("--keyword", "verify", "--old", CHECKPOINT, path) == 2
    assert "or damaged" in capsys.readouterr().err


def test_operators_that_are_not_written(tmp_path: Path) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in ("input", "logits")]
    node = helper.make_node("CumSum", ["input", "axis"], ["logits"])
    node.metadata_props.add(key=SCOPES, value="['', 'layer', 'sum']")
    axis = helper.make_tensor("axis", TensorProto.INT64, [], [1])
    model = helper.make_model(helper.make_graph([node], "x", ends[:1], ends[1:], [axis]))
    with pytest.raises(
        UserError, match=r"layer: Core ML files do not hold the operator CumSum; export --to onnx"
    ):
        write_coreml(DeployGraph(model=model, activations={}, weights={}), tmp_path / "x.mlpackage")
    assert list(tmp_path.iterdir()) == []
