"""Half precision: what computes in which type, what is scaled and skipped, and that training is none the worse."""

from __future__ import annotations

import csv
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import main
import model.quant  # noqa: F401  (registers the methods)
from model.convert import build_quantizers
from model.layers import factory, norms
from model.layers.quantized import quantizers
from model.quantizers.frame import Quantizer
from utils.checkpoint.archive import read
from utils.config.schema import ModelConfig, OptimConfig, PrecisionConfig, QuantConfig, QuantizerConfig
from utils.errors import TrainingError, UserError
from utils.step import precision
from utils.step.optimizer import build_optimizer

CPU = torch.device("cpu")
DTYPES = ("bfloat16", "float16")


def network() -> nn.Module:
    """A quantized convolution between two layers in full precision."""
    torch.manual_seed(0)
    quant = QuantConfig(
        fm=QuantizerConfig(tag="fm", enable=True, method="lsq", levels=4, half_range=True),
        wt=QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4),
    )
    config = ModelConfig(quant=quant, num_classes=5)
    made = nn.Sequential(
        factory.conv(3, 8, 3, 2, config, full_precision=True),
        norms.norm(8, config),
        nn.ReLU(),
        factory.conv(8, 8, 3, 1, config),
        norms.norm(8, config),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        factory.linear(8, 5, config),
    )
    build_quantizers(made, quant)
    return made


def built(level: str, dtype: str) -> tuple[nn.Module, torch.optim.Optimizer, precision.Precision]:
    config = PrecisionConfig(level=level, dtype=dtype)
    made = network()
    precision.prepare(made, config)
    optimizer, _ = build_optimizer(made, OptimConfig(lr=0.1, momentum=0.9))
    return made, optimizer, precision.Precision(made, optimizer, config, CPU)


def step(
    made: nn.Module, arithmetic: precision.Precision, factor: float = 1.0, limit: float | None = None
) -> Tensor:
    """One step on fixed images; returns the norm of the gradient."""
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with arithmetic.autocast():
        output = made(images.to(arithmetic.image_dtype))
        loss = nn.functional.cross_entropy(output.float(), torch.arange(16) % 5)
    arithmetic.backward(loss * factor)
    norm = arithmetic.gradient_norm(limit)
    said = arithmetic.step(update=True)
    arithmetic.zero_grad()
    assert not said or factor > 1e30
    return norm


# O0 to O3: the type of weights of convolutions and linear layers, of norms, of what convolutions put out.
TYPES = {
    "O0": ("32", "32", "32"),
    "O1": ("32", "32", "16"),
    "O2": ("16", "32", "16"),
    "O3": ("16", "16", "16"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", TYPES)
def test_types(level: str, dtype: str) -> None:
    """Of weights, norms and activations; quantizers see and keep float32 everywhere, and gradients reach all."""
    made, optimizer, arithmetic = built(level, dtype)
    half = {"32": torch.float32, "16": precision.DTYPES[dtype]}
    weights, norms, activations = (half[bits] for bits in TYPES[level])
    seen: dict[str, torch.dtype] = {}
    inside: list[torch.dtype] = []
    for name, module in made.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out.dtype}))
    for _, quantizer in quantizers(made):
        original = quantizer.quantize

        def watched(x: Tensor, original: Any = original) -> Tensor:
            inside.append(x.dtype)
            result = original(x)
            inside.append(result.dtype)
            return result

        quantizer.quantize = watched  # pyright: ignore[reportAttributeAccessIssue]
    before = {name: value.clone() for name, value in arithmetic.weights(made).items()}
    step(made, arithmetic)
    assert set(seen.values()) == {activations}
    assert inside == [torch.float32] * 4
    for name, module in made.named_modules():
        own = {p.dtype for p in module.parameters(recurse=False)}
        if isinstance(module, Quantizer):
            assert own == {torch.float32}, name
        elif isinstance(module, nn.Conv2d | nn.Linear):
            assert own == {weights}, name
        elif isinstance(module, nn.BatchNorm2d):
            assert own == {norms}, name
    updated = {p.dtype for group in optimizer.param_groups for p in group["params"]}
    assert updated == ({torch.float32} if level != "O3" else {torch.float32, weights})
    after = arithmetic.weights(made)
    for name, parameter in made.named_parameters():
        # At O3 a step is lost where it is smaller than a weight's last bit.
        assert level == "O3" or not torch.equal(before[name], after[name]), name
        if level == "O2":
            assert after[name].dtype == torch.float32
            assert torch.equal(after[name].to(parameter.dtype), parameter), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
def test_steps_are_nearly_those_of_float32(level: str, dtype: str) -> None:
    """Ten steps; with unscaled or clipped gradients gone wrong they would differ by far more."""
    expected, _, exact = built("O0", dtype)
    made, _, arithmetic = built(level, dtype)
    for _ in range(10):
        one, two = step(expected, exact, limit=0.5), step(made, arithmetic, limit=0.5)
        assert two.dtype == torch.float32
        assert float(two) == pytest.approx(float(one), rel=0.25)
    for name, value in exact.weights(expected).items():
        if value.is_floating_point():
            difference = (arithmetic.weights(made)[name].float() - value).norm() / value.norm().clamp_min(0.1)
            assert float(difference) < 0.1, name


def test_master_weights_take_steps_that_half_weights_lose() -> None:
    """A thousandth of a weight is below the eight bits of bfloat16; ten of them are not."""
    made, optimizer, arithmetic = built("O2", "bfloat16")
    weight, start = made[8].weight, made[8].weight.detach().clone()
    master = arithmetic.weights(made)["8.weight"]
    for _ in range(20):
        weight.grad = start.clone()
        arithmetic.gradient_norm(None)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"], group["momentum"] = 1e-3, 0, 0
        arithmetic.step(update=True)
    torch.testing.assert_close(master, start.float() * 0.98, rtol=1e-2, atol=1e-4)
    assert torch.equal(weight, master.bfloat16())
    assert not torch.equal(weight, start)


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_overflowing_steps_are_skipped_and_told(level: str) -> None:
    made, _, arithmetic = built(level, "float16")
    before = {name: value.clone() for name, value in arithmetic.weights(made).items()}
    scales = [arithmetic.state_dict()["scale"]]
    for _ in range(3):
        with arithmetic.autocast():
            loss = made(torch.randn(16, 3, 8, 8)).float().square().mean()
        arithmetic.backward(loss * 1e30)
        assert not bool(arithmetic.gradient_norm(1.0).isfinite())
        said = arithmetic.step(update=True)
        arithmetic.zero_grad()
        scales.append(arithmetic.state_dict()["scale"])
        old, new = scales[-2:]
        assert said == f"step skipped, gradients overflowed when scaled by {old:g}; the scale is {new:g} now"
    assert scales == [65536.0, 32768.0, 16384.0, 8192.0]
    for name, _ in made.named_parameters():
        assert torch.equal(arithmetic.weights(made)[name], before[name]), name
    other = built(level, "float16")[2]
    other.load_state_dict(arithmetic.state_dict())
    assert other.state_dict() == arithmetic.state_dict()
    with pytest.raises(TrainingError, match="not finite even when scaled by"):
        for _ in range(40):
            with arithmetic.autocast():
                output = made(torch.randn(16, 3, 8, 8))
            arithmetic.backward(output.float().square().mean() * 1e38)
            arithmetic.gradient_norm(None)
            arithmetic.step(update=True)


def test_the_warmup_leaves_the_weights_alone() -> None:
    made, _, arithmetic = built("O1", "float16")
    before = made[0].weight.detach().clone()
    for _ in range(2):
        arithmetic.backward(made(torch.randn(4, 3, 8, 8)).square().mean())
        assert arithmetic.gradient_norm(None, wanted=False) is None
        assert arithmetic.step(update=False) == ""
    assert torch.equal(made[0].weight, before)


def test_tf32_is_off_unless_asked_for() -> None:
    """Float32 means float32; without a GPU the switch is a warning."""
    for wanted in (True, False):
        precision.prepare(network(), PrecisionConfig(tf32=wanted))
        assert torch.backends.cuda.matmul.fp32_precision == ("tf32" if wanted else "ieee")
        assert torch.backends.cudnn.allow_tf32 == wanted
        torch.export.export(network().eval(), (torch.ones(1, 3, 8, 8),))  # refuses some settings
    assert precision.check_precision(PrecisionConfig(tf32=True), CPU) == (
        "--tf32 has no effect without a GPU",
    )
    assert precision.check_precision(PrecisionConfig(level="O1"), CPU) == ()


# The program -------------------------------------------------------------------------------------

TINY = (
    "--dataset fake --width_alpha 0.125 --input_size 16 -b 8 --fake_size 32 --lr 0.05 --lr_policy sgdr "
    "--keyword cifar10,cbas,origin,dorefa,lsq --fm_enable --wt_enable --fm_bit 2 --wt_bit 2 --epochs 2"
)


@pytest.mark.parametrize(
    "options",
    [
        "O1 --amp_dtype bfloat16",
        "O2 --amp_dtype float16 --re_init",
        "O3 --tf32 --memory_format contiguous",
    ],
)
def test_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    """Train, pass the audit, resume bit by bit, and evaluate as they did, also in float32."""
    monkeypatch.chdir(tmp_path)
    line = f"{TINY} --fp16 --opt_level {options}"
    assert main.main(f"{line} --case whole -s 1".split()) == 0
    whole = read(tmp_path / "weights" / "resnet20" / "whole-checkpoint.pth.tar")
    first = "weights/resnet20/whole-epoch1-checkpoint.pth.tar"
    assert main.main(f"{line} --case part --resume_file {first}".split()) == 0
    part = read(tmp_path / "weights" / "resnet20" / "part-checkpoint.pth.tar")
    assert part["amp"] == whole["amp"]
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, part["state_dict"][name]), name
    if "O3" not in options:
        assert {v.dtype for v in whole["state_dict"].values() if v.is_floating_point()} == {torch.float32}
    assert "passed: 40 quantizers" in (tmp_path / "exp" / "whole" / "audit.txt").read_text()
    assert main.main(f"{TINY} -e --audit --case plain --pretrained whole-checkpoint.pth.tar".split()) == 0


def accuracy(folder: Path, case: str) -> float:
    with (folder / "exp" / case / "metrics.csv").open(encoding="utf-8") as file:
        return float(list(csv.DictReader(file))[-1]["val_top1"])


def test_digits_train_as_well_as_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracies of O0 and O1 differ by no more than those of seeds do, and are far above chance."""
    monkeypatch.chdir(tmp_path)
    line = (
        "--width_alpha 0.125 --input_size 8 -b 64 --lr 0.2 --epochs 3 --lr_policy sgdr --keyword cbsa,origin,fix "
        "--wd 1e-4 --nesterov"
    )
    found: dict[str, list[float]] = {"O0": [], "O1": []}
    for seed in range(3):
        for level, accuracies in found.items():
            assert (
                main.main(f"{line} --seed {seed} --case {level}-{seed} --fp16 --opt_level {level}".split())
                == 0
            )
            accuracies.append(accuracy(tmp_path, f"{level}-{seed}"))
    exact, half = (torch.tensor(values) for values in found.values())
    spread = float(torch.cat([exact - exact.mean(), half - half.mean()]).square().sum().div(4).sqrt())
    assert exact.mean() > 70, found
    # Two standard errors of a difference of means of three, and one image of 360.
    assert abs(float(exact.mean() - half.mean())) <= 2 * spread * (2 / 3) ** 0.5 + 0.28, found


@pytest.mark.parametrize(
    ("shape", "format"),
    [
        ((8, 16, 1, 2), torch.contiguous_format),
        ((15, 16, 1, 2), torch.contiguous_format),
        ((16, 32, 1, 2), torch.channels_last),
        ((8, 16, 1, 1), torch.channels_last),
        ((8, 16, 3, 2), torch.channels_last),
    ],
)
def test_channels_last_where_it_is_safe(
    shape: tuple[int, int, int, int], format: torch.memory_format
) -> None:
    """Some networks are contiguous on a CPU; nothing is run here."""
    made = nn.Sequential(nn.Conv2d(*shape))
    assert precision.memory_format(made, PrecisionConfig(), CPU) == format
    assert precision.memory_format(made, PrecisionConfig(), torch.device("cuda")) == torch.channels_last
    contiguous = PrecisionConfig(channels_last=False)
    assert precision.memory_format(made, contiguous, CPU) == torch.contiguous_format


def test_a_narrow_network_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the memory format that is chosen for it."""
    monkeypatch.chdir(tmp_path)
    line = "--keyword cifar10,origin,cbsa,fix,singleconv --width_alpha 0.125 --input_size 64 --model resnet20"
    assert main.main(f"{line} --dataset fake --fake_size 4 -b 2 --epochs 1".split()) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_runs_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, dtype: str) -> None:
    """Train, pass the audit, and go on from the first epoch."""
    monkeypatch.chdir(tmp_path)
    line = f"{TINY} --fp16 --opt_level {level} --amp_dtype {dtype} --grad_clip 1 -s 1"
    assert main.main(f"{line} --case whole".split()) == 0
    first = "weights/resnet20/whole-epoch1-checkpoint.pth.tar"
    assert main.main(f"{line} --case part --resume_file {first}".split()) == 0
    assert "passed: 40 quantizers" in (tmp_path / "exp" / "part" / "audit.txt").read_text()


def test_a_gpu_that_emulates_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would train several times slower and say nothing; float16, or float32, it has."""
    asked: list[bool] = []

    def supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return including_emulation

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    gpu = torch.device("cuda", 0)
    for level in ("O1", "O2", "O3"):
        with pytest.raises(
            UserError, match=r"--amp_dtype bfloat16: Old GPU has no such .* --amp_dtype float16"
        ):
            precision.check_precision(PrecisionConfig(level=level, dtype="bfloat16"), gpu)
        assert precision.check_precision(PrecisionConfig(level=level, dtype="float16"), gpu) == ()
    assert asked == [False] * 3
    assert precision.check_precision(PrecisionConfig(level="O0", dtype="bfloat16"), gpu) == ()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert precision.check_precision(PrecisionConfig(level="O1", dtype="bfloat16"), gpu) == ()
