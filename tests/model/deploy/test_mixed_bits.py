"""A network of mixed bits out of its checkpoint alone: to the packed format, to ONNX, and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from model import calibrate
from model.deploy import packed
from model.layers.quantized import quantizers
from model.load import load, load_trained
from model.networks import build
from tests.main.runs import assert_same
from tests.utils.tools.commands import Call
from utils.checkpoint import archive
from utils.config.layer_rules import with_layer_bits
from utils.config.recorded import to_dict
from utils.config.resolve import read
from utils.data.transform import ImageTransform

ENTRIES = [
    {"name": "features.1.*", "wt_bit": 3, "fm_bit": 4, "wt_quant_group": 1},
    {"name": ["features.2.*", "features.4.*"], "bit": 4},
    {"name": "features.5.conv", "tag": "wt", "bit": 32},
    {"name": "features.6.*", "bit": "ternary", "quant_group": 2},
]


def checkpoint(path: Path) -> Path:
    """A NIN at 2, 3, 4 and 8 bits, ternary and in full precision, with random weights."""
    line = (
        "--model nin --keyword cifar10,lsq --bits 2 --first_last_bit 8 --width_alpha 0.125 --wt_grid midtread"
    )
    config = read(line.split())
    quant = with_layer_bits(config.model.quant, None, None, ENTRIES)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, quant=quant))
    torch.manual_seed(0)
    network = build.build_network(config.model)
    with torch.no_grad():
        calibrate.initialise_ranges(network, torch.randn(4, 3, 32, 32), quant)
        network(torch.randn(4, 3, 32, 32))
    images = ImageTransform(size=32, mean=(0.5,) * 3, std=(0.25,) * 3).to_dict()
    state = {"state_dict": network.state_dict(), "config": to_dict(config), "images": images}
    archive.save(path, state | {"classes": list("0123456789")})
    return path


def test_mixed_bits_leave_and_return(call: Call, tmp_path: Path) -> None:
    """Packed: the same logits to the last bit. ONNX: the same classes. Each tensor is stored at its own bits."""
    old = checkpoint(tmp_path / "x.pth.tar")
    network, _, _ = load(old)
    levels = {name: quantizer.levels for name, quantizer in quantizers(network)}
    assert set(levels.values()) == {3, 4, 8, 16, 256}
    assert "features.5.conv.quant_weight" not in levels
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(images)

    file = tmp_path / "x.safetensors"
    assert call("--keyword", "export", "--to", "packed", "--old", old, "--new", file)[0] == 0
    sizes = packed._read(file)[1]
    for name, count in levels.items():
        layer, _, part = name.rpartition(".quant_")
        if part == "weight":
            elements = network.get_submodule(layer).weight.numel()
            bits = 8 / 5 if count == 3 else np.ceil(np.log2(count))
            stored = sizes[f"{layer}.weight.numbers"].numel()
            assert stored == np.ceil(elements / 5 if count == 3 else elements * bits / 8), name
    assert call("--keyword", "import", "--old", file, "--new", tmp_path / "y.pth.tar")[0] == 0
    again = load_trained(tmp_path / "y.pth.tar")
    with torch.no_grad():
        assert torch.equal(again.network(images), expected)
    packed.write(again, tmp_path / "y.safetensors")
    assert_same(sizes, packed._read(tmp_path / "y.safetensors")[1])

    file = tmp_path / "x.onnx"
    assert call("--keyword", "export", "--to", "onnx", "--old", old, "--new", file)[0] == 0
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert np.array_equal(found.argmax(axis=1), expected.argmax(dim=1).numpy())
