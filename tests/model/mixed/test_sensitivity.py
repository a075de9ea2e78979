"""What single layers lose, against a quantization by hand and an exact Hessian."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tools
from model.convert import quantize
from model.mixed.sensitivity import hessian_traces, measure
from model.quant import QuantConfig, QuantizerConfig
from tests.main.runs import FP, LSQ, done_in
from utils.errors import UserError
from utils.report import sensitivity_record


def network() -> nn.Sequential:
    """Three layers; the last ones read what a ReLU puts out."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*convolutions, nn.Linear(24, 3)).eval()


def batch(count: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 2, 7, 7, generator=generator), torch.randint(
        0, 3, (count,), generator=generator
    )


def squared_error_clip(x: Tensor, levels: int, *, half_range: bool) -> Tensor:
    """x on evenly spaced levels, with the clip value of 100 fractions of max |x| that has the least error."""
    found, least = x, float("inf")
    for number in range(1, 101):
        clip = x.abs().max() * number / 100
        low = torch.zeros(()) if half_range else -clip
        step = (clip - low) / (levels - 1)
        on_levels = ((x.clamp(low, clip) - low) / step).round() * step + low
        if (error := float((on_levels - x).square().sum())) < least:
            found, least = on_levels, error
    return found


def test_changes_are_those_of_one_layer_quantized_by_hand() -> None:
    plain, (images, target) = network(), batch()
    record = measure(plain, [(images, target)], bits=(4, 2), probes=1)
    assert [layer.name for layer in record.layers] == ["0", "2", "5"]
    assert (record.images, record.other_bytes, record.other_macs) == (16, 0, 0)
    with torch.no_grad():
        whole = functional.cross_entropy(plain(images), target)
        assert record.loss == pytest.approx(float(whole), rel=1e-5)
        for place, layer in zip((0, 2, 5), record.layers, strict=True):
            for bits, change in layer.changes.items():
                changed = copy.deepcopy(plain)
                weight = changed[place].weight
                rows = [squared_error_clip(row, 2**bits, half_range=False) for row in weight]
                weight.copy_(torch.stack(rows))
                loss = functional.cross_entropy(changed(images), target)
                assert change.weight_loss == pytest.approx(float(loss - whole), abs=1e-5)
                x = changed[:place](images)
                logits = changed[place:](squared_error_clip(x, 2**bits, half_range=place > 0))
                assert change.loss == pytest.approx(
                    float(functional.cross_entropy(logits, target) - whole), abs=1e-5
                )


def test_traces_are_those_of_the_hessian() -> None:
    plain = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    generator = torch.Generator().manual_seed(2)
    images, target = torch.randn(20, 3, generator=generator).double(), torch.arange(20) % 3
    found = hessian_traces(plain, images, target, ["0", "2"], probes=2000)
    for name in ("0", "2"):
        weight = plain.get_parameter(f"{name}.weight").detach()

        def loss(w: Tensor, name: str = name) -> Tensor:
            logits = torch.func.functional_call(plain, {f"{name}.weight": w}, images)
            return functional.cross_entropy(logits, target)

        exact = torch.autograd.functional.hessian(loss, weight).reshape(weight.numel(), -1)
        assert found[name] == pytest.approx(float(exact.trace()) / weight.numel(), rel=0.05)


def test_a_network_with_quantizers_or_without_a_finite_loss_is_refused() -> None:
    low, broken = network(), network()
    wt = QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4)
    quantize(low, QuantConfig(wt=wt))
    with pytest.raises(UserError, match="quantized: what its layers lose shows in full precision"):
        measure(low, [batch()])
    with torch.no_grad():
        broken[0].weight.fill_(float("inf"))
    with pytest.raises(UserError, match="not finite"):
        measure(broken, [batch()])


class Attentive(nn.Module):
    """Attention, and a layer that is called in vain."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.aside, self.leave = nn.Linear(7, 8), nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images of two channels."""
        y = self.enter(x).flatten(1, 2)
        self.aside(y)
        return self.leave(functional.scaled_dot_product_attention(y, y, y).mean(1))


def test_attention_and_a_layer_without_effect() -> None:
    torch.manual_seed(0)
    layers = {layer.name: layer for layer in measure(Attentive(), [batch()], bits=(4, 2)).layers}
    assert list(layers) == ["enter", "aside", "leave"]
    assert layers["aside"].trace == 0 and layers["aside"].changes[2].loss == 0
    assert layers["enter"].trace != 0 and layers["leave"].trace > 0


@pytest.mark.slow
def test_a_run_is_measured_planned_and_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done_in(tmp_path, f"{FP} --case fp --epochs 1", f"{LSQ} --case low --epochs 1")
    monkeypatch.chdir(tmp_path)
    old = "weights/resnet20/fp-checkpoint.pth.tar"
    Path("copy.pth.tar").write_bytes(Path(old).read_bytes())
    Path("taken.png").touch()
    for arguments, message in (
        (["--old", "weights/resnet20/low-checkpoint.pth.tar"], "the checkpoint in full precision"),
        (["--old", "copy.pth.tar"], "--output FILE.json"),
        (["--old", old, "--bits", "9,2"], "'9,2' is not two or more numbers from 1 to 8"),
        (["--old", old, "--bits", "2"], "'2' is not two or more numbers from 1 to 8"),
        (["--old", old, "--output", "taken.json"], "taken.png exists; --force writes over it"),
        (["--old", old, "--output", "x.txt"], "name a .json file in a folder that exists"),
        (["--old", old, "--samples", "0"], "'0' is not a number of 1 or more"),
    ):
        assert tools.main(["--keyword", "sensitivity", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not list(Path("exp/fp").glob("sensitivity*"))

    options = ["--old", old, "--samples", "12", "--bits", "4,2"]
    assert tools.main(["--keyword", "sensitivity", *options]) == 0
    path = Path("exp/fp/sensitivity.json")
    record, printed = sensitivity_record.read(path), capsys.readouterr().out
    assert record.as_text() in printed and f"written: {path}" in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert (record.images, record.bits, len(record.layers)) == (12, (4, 2), 22)
    assert json.loads(path.read_text()) == json.loads(record.as_json())

    assert tools.main(["--keyword", "sensitivity", *options]) == 2
    assert f"{path} exists; --force writes over it" in capsys.readouterr().err

    budget = f"{record.bytes_with({layer.name: 3 for layer in record.layers})}B"
    plan = ["--keyword", "plan", "--old", str(path), "--new", "bits.yaml", "--budget_size", budget]
    assert tools.main(plan) == 0
    assert "written: bits.yaml" in capsys.readouterr().out
    path.write_text(path.read_text()[:-40])
    assert tools.main([*plan, "--force"]) == 2
    assert "measure again" in capsys.readouterr().err
