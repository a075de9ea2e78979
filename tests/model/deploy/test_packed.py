"""The packed format: bits on the disk, the reader of docs/deploy.md, and the same network after `import`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from model import calibrate
from model.deploy import packed
from model.deploy.graph import deploy_graph
from model.deploy.onnx_qdq import qdq_model
from model.layers.quantized import quantized_weights
from model.load import Trained, load, load_trained
from model.networks import build
from model.training.policy import initialise
from tests import ROOT
from tests.main.runs import assert_same
from tests.model.test_load import RECORDED, saved
from tests.utils.tools.commands import Call
from utils.checkpoint import archive
from utils.config.schema import Config, ModelConfig, QuantConfig, QuantizerConfig, Rule
from utils.data.transform import ImageTransform

LARGEST = 44.6 * 2**20 / 13.5  # bytes of a 2-bit ResNet-18; it has 44.6 MiB in float32
IMAGES = ImageTransform(size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {  # activations, weights, fields of the weights'
    "lsq": ("lsq", "lsq", {}),
    "lsq-group": ("lsq", "lsq", {"quant_group": 2}),
    "lsq-midtread": ("lsq", "lsq", {"grid": "midtread"}),
    "lsq-restored": ("lsq", "lsq", {"adaptive": "var-mean", "adaptive_restore": True}),
    "lsq-gamma": ("lsq", "lsq", {"gamma": True, "adaptive": "var"}),
    "lsqplus": ("lsqplus", "lsqplus", {}),
    "pact": ("pact", "pact", {}),
    "dorefa": ("dorefa", "dorefa", {}),
    "bin": ("dorefa", "dorefa", {"binary_scale": True}),
    "apot": ("apot", "apot", {}),
    "n2uq": ("n2uq", "n2uq", {}),
    "lq": ("lq", "lq", {}),
    "lq-tensor": ("lq", "lq", {"quant_group": 1, "adaptive": "var-mean"}),
    "fatnn": ("fatnn", "fatnn", {}),
    "xnor": ("xnor", "xnor", {}),
}
FEW = dict.fromkeys(("lsqplus", "lsq-group", "lsq-restored", "lsq-gamma", "lq-tensor"), (4,))
LEVELS = {
    "bin": (2,),
    "xnor": (2,),
    "fatnn": (3,),
    "apot": (4, 8, 16),
    "n2uq": (4, 16),
    "lq": (2, 4, 8, 16),
    "lsq-midtread": (4, 256),
    **FEW,
}
CASES = [
    (name, levels)
    for name in VARIANTS
    for levels in LEVELS.get(name, (2, 3, 4, 8, 16, 256, 5, 1024)[: 8 if name == "lsq" else 6])
]


def network_of(name: str, levels: int) -> Trained:
    """A small network with random weights whose quantizers have seen images."""
    fm, wt, fields = VARIANTS[name]
    small = levels if levels <= 16 else 4
    quant = QuantConfig(
        fm=QuantizerConfig(
            tag="fm", enable=True, method=fm, levels=2 if fm == "xnor" else small, half_range=fm != "xnor"
        ),
        wt=QuantizerConfig(tag="wt", enable=True, method=wt, levels=levels, **fields),
    )
    model = ModelConfig(name="nin", num_classes=7, width_alpha=0.125, quant=quant)
    torch.manual_seed(levels)
    network = build.build_network(model)
    with torch.no_grad():
        calibrate.initialise_ranges(network, torch.randn(2, 3, 32, 32), quant)
        for _, _, quantizer in quantized_weights(network):
            if quantizer.config.gamma:
                quantizer.gamma.uniform_(0.5, 2)
        network(torch.randn(2, 3, 32, 32))
    config = Config(model=model)
    network = network.eval().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return Trained(network=network, transform=IMAGES, classes=(), config=config, source=Path("x"))


@pytest.fixture(scope="module")
def reader() -> Any:
    """`read_packed` of the documentation, in at most 40 lines."""
    text = (ROOT / "docs" / "deploy.md").read_text("utf-8")
    (code,) = [
        code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def read_packed" in code
    ]
    assert len(code.splitlines()) <= 40
    names: dict[str, Any] = {}
    exec(code, names)
    return names["read_packed"]


@pytest.mark.parametrize(("name", "levels"), CASES)
def test_a_network_returns_to_the_last_bit(name: str, levels: int, reader: Any, tmp_path: Path) -> None:
    """Through NumPy's reader, and through a checkpoint: logits, codes, and a second export."""
    trained = network_of(name, levels)
    path = tmp_path / "x.safetensors"
    packed.write(trained, path)
    content, tensors = reader(path)
    sizes = packed._read(path)[1]
    for layer_name, layer, quantizer in quantized_weights(trained.network):
        expected = quantizer(layer.weight).detach().numpy()
        assert np.array_equal(tensors[f"{layer_name}.weight"], expected)
        bits = 8 / 5 if levels == 3 else np.ceil(np.log2(levels))
        assert sizes[f"{layer_name}.weight.numbers"].numel() == np.ceil(
            expected.size / 5 if levels == 3 else expected.size * bits / 8
        )
    assert content["images"] == IMAGES.to_dict()

    archive.save(tmp_path / "x.pth", packed.read_checkpoint(path))
    again = load_trained(tmp_path / "x.pth")
    images = torch.randn(3, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(again.network(images), trained.network(images))
    pairs = zip(quantized_weights(trained.network), quantized_weights(again.network), strict=True)
    for (_, one, before), (_, two, after) in pairs:
        first, second = before.integers(one.weight), after.integers(two.weight)
        assert torch.equal(first.codes, second.codes) and first.zero_point == second.zero_point
        assert_same(
            {name: value for name, value in vars(first).items() if isinstance(value, torch.Tensor)},
            {name: value for name, value in vars(second).items() if isinstance(value, torch.Tensor)},
        )
    packed.write(again, tmp_path / "y.safetensors")
    assert_same(packed._read(path)[1], packed._read(tmp_path / "y.safetensors")[1])


@pytest.mark.parametrize("name", ["lsq", "lq"])
def test_the_words(name: str, call: Call, tmp_path: Path) -> None:
    """From a recorded checkpoint, with its policy's levels, to a packed file and back."""
    old, file, new = RECORDED / f"{name}.pth.tar", tmp_path / "x.safetensors", tmp_path / "x.pth.tar"
    status, out, err = call("--keyword", "export", "--to", "packed", "--old", old, "--new", file)
    assert (status, out, err) == (0, f"{file}: packed, {file.stat().st_size:,} bytes\n", "")
    assert call("--keyword", "import", "--old", file, "--new", new)[0] == 0
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load(new)[0](images), load(old)[0](images))
    averaged = tmp_path / "ema.safetensors"
    status, _, err = call("--keyword", "export_packed", "--old", old, "--new", averaged, "--ema_weights")
    assert status == (0 if name == "lsq" else 2) and averaged.exists() == (name == "lsq")
    if name == "lsq":
        assert call("--keyword", "import", "--old", averaged, "--new", new, "--force")[0] == 0
        with torch.no_grad():
            assert torch.equal(load(new)[0](images), load(old, ema_weights=True)[0](images))
    assert {path.name for path in tmp_path.iterdir()} <= {"x.safetensors", "x.pth.tar", "ema.safetensors"}


def test_mistakes(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, status 2, and nothing is written or left over."""
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "x.pth")
    saved(tmp_path / "bare.pth", config=None)
    assert call("--keyword", "export_packed", "--old", "x.pth", "--new", "x.safetensors")[0] == 0
    whole = Path("x.safetensors").read_bytes()
    torch.save({}, "empty.pth")
    for name, data in {
        "cut": whole[:-5],
        "header": whole[:40],
        "nothing": b"",
        "flipped": whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:],
        "config": whole.replace(b'num_classes\\\\": 10', b'num_classes\\\\": 11').replace(
            b'num_classes\\": 10', b'num_classes\\": 11'
        ),
    }.items():
        Path(name).write_bytes(data)
        assert data != whole
    names = {path.name for path in tmp_path.iterdir()}
    for line, text in {
        "export_packed --old x.pth --new x.safetensors": "x.safetensors exists; --force writes over it",
        "export_packed --old bare.pth --new y": "bare.pth holds no configuration, so that its network is not known",
        "export_packed --old x.pth --new gone/y": "--new gone/y: name a file in a folder that exists",
        "export_packed --old x.pth --new y --ema_weights": "--ema_weights: x.pth has none",
        "export_packed --old gone.pth --new y": "gone.pth: cannot be read (No such file or directory)",
        "export_packd --old x.pth --new y": "program, qonnx, thresholds, web; did you mean packed?",
        "export --old x.pth --new y": "the word export needs --to",
        "export_packed --old cut --new y": "cut: is a packed network, no checkpoint: tools.py --keyword import makes",
        "import --old gone --new y": "gone: cannot be read (No such file or directory",
        "import --old x.safetensors --new x.pth": "x.pth exists; --force writes over it",
        "import --old x.pth --new y": "x.pth: damaged, cut short or no packed network",
        **{
            f"import --old {name} --new y": f"{name}: damaged, cut short or no packed network"
            for name in ("cut", "header", "nothing", "flipped", "config")
        },
    }.items():
        word, *rest = line.split()
        status, out, err = call("--keyword", word, *rest)
        assert (status, out, err.count("\n")) == (2, "", 1) and text in err, (line, err)
    assert {path.name for path in tmp_path.iterdir()} == names
    assert Path("x.safetensors").read_bytes() == whole


def test_a_restored_network_is_not_trained(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import main

    packed.write(network_of("lsq", 4), tmp_path / "x.safetensors")
    assert (
        call("--keyword", "import", "--old", tmp_path / "x.safetensors", "--new", tmp_path / "x.pth")[0] == 0
    )
    line = "--dataset fake --num_classes 7 --input_size 32 --model nin --width_alpha 0.125 --keyword lsq --bits 2"
    assert main.main([*line.split(), "--pretrained", str(tmp_path / "x.pth"), "--dry_run"]) == 2
    assert "comes from a packed file and has quantized weights alone" in capsys.readouterr().err


@pytest.mark.slow
def test_resnet18_takes_the_bytes_of_its_bits(tmp_path: Path) -> None:
    """At 2 bits, with 8 in the first and the last layer as an entry of a policy sets them: what the arithmetic says."""
    quant = QuantConfig(
        fm=QuantizerConfig(tag="fm", enable=True, method="lsq", levels=4, half_range=True),
        wt=QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4, quant_group=1),
        first_last=True,
    )
    model = ModelConfig(name="resnet18", num_classes=1000, input_size=224, quant=quant)
    network = build.build_network(model).eval()
    for _, layer, _ in quantized_weights(network):
        torch.nn.init.normal_(layer.weight, std=0.7)  # so that all levels occur
    policy = tuple(
        Rule(section="init", number=1, name=name, tag="wt", values={"level_num": 256})
        for name in ("conv1", "fc")
    )
    initialise(network, policy)
    config = Config(model=model, policy=policy)
    packed.write(
        Trained(network=network, transform=IMAGES, classes=(), config=config, source=Path("x")),
        tmp_path / "x",
    )
    layers = [
        (layer.weight.numel(), packed.bits_of(one.levels)) for _, layer, one in quantized_weights(network)
    ]
    assert sorted({bits for _, bits in layers}) == [2, 8]
    others = sum(value.numel() for value in network.state_dict().values()) - sum(count for count, _ in layers)
    expected = sum(count * bits for count, bits in layers) / 8 + 4 * others
    assert expected < (tmp_path / "x").stat().st_size < min(1.02 * expected, LARGEST)
    onnx.save(qdq_model(deploy_graph(network, (3, 64, 64))), tmp_path / "x.onnx")
    assert expected < (tmp_path / "x.onnx").stat().st_size < LARGEST
