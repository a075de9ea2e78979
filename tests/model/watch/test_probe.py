"""The probe: what it writes is what the network computed, and it changes nothing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import main
from model.layers.convolution import QuantConv2d
from model.watch.probe import Probe
from utils.config.resolve import read as read_config
from utils.config.schema import ProbeConfig, QuantConfig, QuantizerConfig
from utils.errors import UserError
from utils.report.tensorboard import Board

TINY = (
    "--dataset fake --width_alpha 0.125 --input_size 16 -b 8 --fake_size 32 --epochs 1 --re_init "
    "--keyword cifar10,cbas,origin,dorefa,lsq --fm_enable --wt_enable --fm_bit 2 --wt_bit 2"
)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write below the current folder."""
    monkeypatch.chdir(tmp_path)


def network() -> nn.Sequential:
    """A quantized 1x1 convolution, a norm and a linear layer."""
    conv = QuantConv2d(3, 4, 1)
    parts = {
        tag: QuantizerConfig(tag=tag, enable=True, method="lsq", levels=4, half_range=tag == "fm")
        for tag in ("fm", "wt")
    }
    conv.build_quantizers(QuantConfig(**parts), "0")
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def step(model: nn.Module, probe: Probe | None, number: int, images: Tensor) -> None:
    """One forward and backward pass of iteration `number`."""
    if probe is not None:
        probe.begin(number)
    model.zero_grad()
    model(images).square().sum().backward()
    if probe is not None:
        probe.end()


def probe(model: nn.Module, tmp_path: Path, **changes: object) -> Probe:
    config = ProbeConfig(**{"enable": True, "iterations": (1,), **changes})  # type: ignore[arg-type]
    return Probe(model, config, tmp_path / "probe", steps=4, images=8)


def test_tensors_are_those_of_the_pass(tmp_path: Path) -> None:
    """Of the chosen images and iteration, bit by bit; gradients likewise."""
    model, images = network(), torch.randn(8, 3, 2, 2)
    probed = probe(model, tmp_path, layers=("*",), images=(5, 2))
    for number in range(3):
        step(model, probed, number, images)
    assert [path.name for path in (tmp_path / "probe").iterdir()] == ["iteration-000001.npz"]
    with np.load(tmp_path / "probe" / "iteration-000001.npz", allow_pickle=False) as found:
        read = {name: torch.from_numpy(found[name]) for name in found.files}
    conv, linear = model[0], model[3]
    assert {name.split(".")[0] for name in read} == {"0", "3"}
    assert torch.equal(read["0.input"], images[[5, 2]])
    assert torch.equal(read["0.weight"], conv.weight.detach())
    assert torch.equal(read["0.quantized_input"], conv.quant_activation(images)[[5, 2]].detach())
    assert torch.equal(read["0.quantized_weight"], conv.quant_weight(conv.weight).detach())
    assert torch.equal(read["0.output"], conv(images)[[5, 2]].detach())
    assert torch.equal(read["3.output"], model(images)[[5, 2]].detach())
    assert torch.equal(read["0.weight.gradient"], conv.weight.grad)
    assert torch.equal(read["3.weight.gradient"], linear.weight.grad)
    assert torch.equal(read["3.output.gradient"], 2 * read["3.output"])
    assert "0.input.gradient" not in read  # images have none
    assert {value.dtype for value in read.values()} == {torch.float32}


def test_what_is_probed_is_not_changed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, one = torch.randn(8, 3, 2, 2), network()
    two = network()
    two.load_state_dict(one.state_dict())
    probed = probe(two, tmp_path, iterations=())
    assert sorted(probed.iterations) == [0, 2, 3] and probed.layers == ("0",)
    for number in range(4):
        step(one, None, number, images)
        step(two, probed, number, images)
    for (name, first), second in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(first.grad, second.grad), name
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert len(list((tmp_path / "probe").iterdir())) == 3
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in two.modules()]
    assert sum(hooks) == 0 and not two[0].weight._backward_hooks


def test_half_precision_is_written_as_float32(tmp_path: Path) -> None:
    model, images = network(), torch.randn(8, 3, 2, 2)
    probed = probe(model, tmp_path, layers=("3",))
    with torch.autocast("cpu", torch.bfloat16):
        step(model, probed, 1, images)
    with np.load(tmp_path / "probe" / "iteration-000001.npz") as found:
        assert found["3.output"].dtype == np.float32


def test_histograms_go_to_tensorboard(tmp_path: Path) -> None:
    model = network()
    probed = probe(model, tmp_path)
    probed.board = Board(tmp_path / "board")
    step(model, probed, 1, torch.randn(8, 3, 2, 2))
    probed.board.close()
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    (event,) = events.Histograms("probe of 0/quantized_weight")
    assert (event.step, event.histogram_value.num) == (1, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ("0", "01")}, "--probe_list 01: no layer has such a name; did you mean 0"),
        ({"layers": ("quant*",)}, "--probe_list quant[*]: no layer has such a name; did you mean 0 or 3"),
        ({"images": (8,)}, "--probe_index 8: a batch has 8 images, numbered 0 to 7"),
        ({"iterations": (3, 4)}, "--probe_iteration 4: the run has 4 iterations, numbered 0 to 3"),
    ],
)
def test_what_is_not_there(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        probe(network(), tmp_path, **changes)


def test_options() -> None:
    """The keyword, or any of the options, turns it on."""
    assert not read_config(TINY.split()).probe.enable
    assert read_config(TINY.replace("lsq", "lsq,probe").split()).probe == ProbeConfig(enable=True)
    written = read_config(
        f"{TINY} --probe_list fc,layer1.* --probe_index 1,2 --probe_iteration 3".split()
    ).probe
    assert written == ProbeConfig(enable=True, layers=("fc", "layer1.*"), images=(1, 2), iterations=(3,))
    for wrong in ("--probe_index -1", "--probe_iteration 1,-2", "--probe_index ,"):
        with pytest.raises(UserError, match="--probe_i"):
            read_config([*TINY.split(), *wrong.split()])
    assert any(
        "--probe_list has no effect" in each
        for each in read_config(f"{TINY} -e --probe_list fc".split()).warnings
    )


def test_a_probed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two passes make an iteration, of which the first is shown; a mistake leaves no trace."""
    assert main.main(f"{TINY} --probe_list layer9.*".split()) == 2
    assert "--probe_list layer9.*: no layer" in capsys.readouterr().err
    assert not (tmp_path / "exp").exists()
    assert (
        main.main(
            f"{TINY} --iter-size 2 --probe_list *conv1.0,fc --probe_iteration 1 --probe_index 0,7".split()
        )
        == 0
    )
    (path,) = (tmp_path / "exp" / "default" / "probe").iterdir()
    with np.load(io.BytesIO(path.read_bytes())) as found:
        assert found["fc.input"].shape == (2, 32)
        assert found["layer1.0.conv1.0.quantized_input"].shape == (2, 8, 16, 16)
        assert all(len(np.unique(weight)) <= 4 for weight in found["layer3.1.conv1.0.quantized_weight"])
        assert np.abs(found["layer2.0.conv1.0.weight.gradient"]).max() > 0
