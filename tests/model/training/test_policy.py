"""Policy files: what they may say, what they plan, what they do, and that resuming repeats nothing."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure

import main
from model.layers.quantized import quantizers
from model.networks import build
from model.training import policy
from tests.kill import COMMON, NETWORK
from utils.config import policy_file
from utils.config.resolve import read
from utils.errors import UserError
from utils.step import schedule
from utils.step.optimizer import build_optimizer

RUN = COMMON.replace("_bit 2", "_bit 8")
for written, instead in (
    (" --delay 0.01", ""),
    ("--epochs 4", "--epochs 3"),
    (" --keyword_file network.py", ""),
):
    RUN = RUN.replace(written, instead)
RUN += " -j 0"  # no processes to start
STEPS = 12  # of an epoch


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test in a folder with the small network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "_MODELS", dict(build._MODELS))
    exec(NETWORK, {})
    return tmp_path


def run(text: str, options: str = "", *, case: str = "run") -> int:
    """A training with this policy; its exit status."""
    Path("policy.yaml").write_text(text)
    return main.answer([*RUN.split(), "--policy", "policy.yaml", "--case", case, *options.split()])


def steering_of(text: str, options: str = "") -> policy.PolicyScheduler:
    """The policy on the small network, before training."""
    Path("policy.yaml").write_text(text)
    config = read([*RUN.split(), "--policy", "policy.yaml", *options.split()])
    model = build.build_network(config.model)
    policy.initialise(model, config.policy)
    optimizer, groups = build_optimizer(model, config.optim)
    rates = schedule.Schedule(config.schedule, config.optim.lr, STEPS)
    return policy.PolicyScheduler(config.policy, model, optimizer, groups, config.optim, rates)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "give entries under init, epoch, iteration"),
        ("epochs: [{at: 1, bit: 2}]", "section epochs is not known"),
        ("epoch: {at: 1, bit: 2}", "must be a list"),
        ("epoch: [{at: [1], bits: 2}]", "bits is not known: did you mean bit"),
        ("epoch: [{at: [1]}]", "changes nothing; set one of"),
        ("epoch: [{bit: 2}]", "needs at"),
        ("init: [{at: [0], bit: 2}]", "takes no at"),
        ("epoch: [{at: [1], bit: 0}]", "must be from 1 to 16"),
        ("epoch: [{at: [1], bit: 2, level_num: 4}]", "contradict"),
        ("epoch: [{at: [1], bit: 2, lr: 0.1}]", "write two entries"),
        ("epoch: [{at: [1], tag: wt, lr: 0.1}]", "write two entries"),
        ("epoch: [{at: [1], tag: weight, bit: 2}]", "must be one of fm, wt, ot"),
        ("epoch: [{at: [1], tag: [wt], bit: 2}]", "tag ['wt'] must be one of fm, wt, ot"),
        ("init: [{tag: {}, bit: 2}]", "tag {} must be one of fm, wt, ot"),
        ("epoch: [{at: [1], enable: 3}]", "must be true or false"),
        ("epoch: [{at: [1], boundary: 1.0e+39}]", "boundary 1e+39 must be a number from 1e-06 to 1e+06"),
        ("epoch: [{at: [1], scale: 0}]", "scale 0 must be a number from 1e-06 to 1e+06"),
        ("epoch: [{at: [1], grad_delta: -1}]", "grad_delta -1 must be a number from 0 to 1e+06"),
        ("epoch: [{at: [1], lr: -1}]", "not negative"),
        (f"epoch: [{{at: [1], lr: 1{'0' * 400}}}]", "not negative"),
        ("epoch: [{at: [1], lr: 2026-13-45}]", "is no YAML (month must be in 1..12)"),
        ("epoch: [{at: [1.5], bit: 2}]", "whole numbers"),
        ("epoch: [{at: [1], grad_type: Square}]", "must be one of none"),
        ("epoch: [{", "is no YAML"),
        ("epoch: [{at: [1], bit: 2, bit: 4}]", "'bit' is written twice in one mapping"),
        ("epoch: [{at: [1], bit: 2}]\nepoch: [{at: [2], bit: 4}]", "'epoch' is written twice in one mapping"),
        ('epoch: [{at: [1], "bit\\n": 2}]', r"bit\n is not known"),
        # what only the network and the run tell
        ("epoch: [{at: [1], index: 1, bit: 2}]", "index 1 has no layer"),
        ("epoch: [{at: [1], name: 'layer9.*', bit: 2}]", "selects no quantizer; "),
        ("epoch: [{at: [1], tag: ot, bit: 2}]", "selects no quantizer"),
        ("epoch: [{at: [1], bit: 8}]", "changes nothing at epoch 1"),
        ("epoch: [{at: [1, 2], bit: 4}]", "changes nothing at epoch 2"),
        ("epoch: [{at: [1], lr: 0.05}]", "changes nothing at epoch 1"),
        ("init: [{bit: 8}]", "changes nothing at init"),
        ("epoch: [{at: [3], bit: 4}]", "beyond the run of 3 epochs"),
        ("iteration: [{at: [36], bit: 4}]", "beyond the run of 36 iterations"),
        ("epoch: [{at: [1], custom_lr: 0}]", "name them with --custom_lr_list"),
        ("epoch: [{at: [1], grad_type: Triangle}]", "belongs to binary activations"),
        ("epoch: [{at: [1], grad_delta: 0.1}]", "grad_delta 0.1: lsq does not read it"),
        ("epoch: [{at: [1], grad_window: 2}]", "grad_window 2: lsq does not read it"),
        (
            "epoch: [{at: [1], grad_delta: 1e-3}]",
            "'1e-3' must be a number from 0 to 1e+06; YAML wants a point",
        ),
        ("epoch: [{at: [1], lr: 1e-3}]", "'1e-3' must be a number that is not negative; YAML wants a point"),
    ],
)
def test_mistakes_end_the_run_before_it_begins(
    text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, status 2, nothing written."""
    assert run(text) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and "--policy" in said
    assert not Path("exp").exists() and not Path("weights").exists()


def test_thresholds_of_lq_stay_between_their_levels() -> None:
    text = "epoch: [{at: [1], tag: fm, scale: %s}]"
    steering_of(text % 1, "--keyword cifar10,lq")
    with pytest.raises(UserError, match=r"scale 1\.5: LQ-Nets' thresholds .* at most 1"):
        steering_of(text % 1.5, "--keyword cifar10,lq")


@pytest.mark.parametrize(
    ("entry", "targets"),
    [
        ("bit: 3", {"3.quant_weight"}),
        ("name: '*', level_num: 8", {"3.quant_weight"}),
        ("name: '9', bit: 3", {"9.quant_weight", "9.quant_activation"}),
        ("name: '3', bit: 3", {"3.quant_weight", "3.quant_activation"}),
        ("index: [0], tag: wt, bit: 3", {"0.quant_weight"}),  # the first layer is one of the quantized ones
        ("tag: fm, boundary: 2.0", {"0.quant_activation", "3.quant_activation", "9.quant_activation"}),
        (
            "name: '[09]', bit: 3",
            "the bits of 0, 9 are the layer's own: write such a name out to change them",
        ),
        ("tag: fm, bit: 3", "the bits of 0, 3, 9 are the layer's own"),
    ],
)
@pytest.mark.parametrize("section", ["init: [{%s}]", "epoch: [{at: 1, %s}]"])
def test_levels_pass_over_layers_with_bits_of_their_own(
    entry: str, targets: set[str] | str, section: str
) -> None:
    Path("bits.yaml").write_text("- {name: '*', fm_bit: 4}")
    options = "--bits 2 --first_last_bit 8 --layer_bits bits.yaml"
    if isinstance(targets, str):
        with pytest.raises(UserError, match=targets):
            steering_of(section % entry, options)
        return
    steering = steering_of(section % entry, options)
    steering.advance(1, STEPS)
    value = 2.0 if "boundary" in entry else 8
    found = {
        name: float(each.current_range().mean()) if "boundary" in entry else each.levels
        for name, each in quantizers(steering._model)
    }
    assert {name for name, each in found.items() if each == pytest.approx(value)} == targets


def test_the_window_of_signs_is_set_with_the_type_of_their_gradient() -> None:
    """Alone it would do nothing."""
    signs = "--keyword cifar10,reactnet --bits 1 --first_bit 1"
    text = "epoch: [{at: 1, tag: fm, %s}]"
    with pytest.raises(
        UserError, match="grad_window has no effect while grad_type is none: set grad_type, too"
    ):
        steering_of(text % "grad_window: 2.0", signs)
    for entry, options in (
        ("grad_type: STE, grad_window: 2.0", ""),
        ("grad_window: 2.0", " --fm_grad_type STE"),
    ):
        steering = steering_of(text % entry, signs + options)
        activation = dict(quantizers(steering._model))["3.quant_activation"]
        slopes = []
        for epoch in (0, 1):
            steering.advance(epoch, epoch * STEPS)
            x = torch.full((1, activation.site.channels, 1, 1), 1.5, requires_grad=True)
            activation(x).sum().backward()
            assert x.grad is not None
            slopes.append(float(x.grad[0, 0]))
        assert slopes == [0.0 if options else 1.0, 1.0]


def test_a_missing_file() -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml: cannot be read"):
        policy_file.read_policy(Path("nothing.yaml"))


PROGRESSIVE = """
init:
  - {tag: fm, bit: 4}
epoch:
  - {at: [1], tag: wt, progressive: true, bit: 4}
  - {at: [2], tag: wt, bit: 2}
  - {at: [2], lr: 0.01, weight_decay: 0}
iteration:
  - {at: [30], tag: fm, boundary: 2.0}
"""


def test_dry_run_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """In the order of the run, with layers, old and new values."""
    assert run(PROGRESSIVE, "--dry_run --verbose") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("policy, ")]
    assert lines == [
        "policy, init: 3.quant_activation: level_num 256 -> 16",
        "policy, epoch 1: 3.quant_weight: progressive False -> True",
        "policy, epoch 1: 3.quant_weight: level_num 256 -> 16",
        "policy, epoch 2: 3.quant_weight: level_num 16 -> 4",
        "policy, epoch 2: training: lr 0.05 -> 0.01",
        "policy, epoch 2: training: weight_decay 0.0001 -> 0",
        "policy, iteration 30: 3.quant_activation: boundary what is learned -> 2.0",
    ]


def test_progressive_keeps_the_step_and_forgets_momentum() -> None:
    """The clip value moves with the levels; without `progressive` it stays."""
    for text, ratio in ((PROGRESSIVE, 15 / 255), (PROGRESSIVE.replace("progressive: true, ", ""), 1.0)):
        steering = steering_of(text)
        model = steering._model
        weight = dict(quantizers(model))["3.quant_weight"]
        clip = weight.get_parameter("clip_val")
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        steering._optimizer.step()
        before = clip.detach().clone()
        assert not steering.advance(0, 11) and weight.levels == 256
        assert steering.advance(1, 12) and weight.levels == 16
        torch.testing.assert_close(clip.detach(), before * ratio)
        assert (clip in steering._optimizer.state) == (ratio == 1.0)
        assert not steering.advance(1, 13)


def test_the_keyword_progressive_is_the_same_as_the_attribute() -> None:
    words = "--keyword cifar10,dorefa,lsq,progressive"
    steering = steering_of("epoch: [{at: [1], bit: 2}]", words)
    weight = dict(quantizers(steering._model))["3.quant_weight"]
    before = weight.current_range().clone()
    steering.advance(1, STEPS)
    torch.testing.assert_close(weight.current_range(), before * 3 / 255)


def test_training_options_reach_the_optimizer() -> None:
    """Groups of `custom_lr_list` follow `custom_lr`, the others `lr`; equal values do not join them."""
    text = "epoch: [{at: [1], custom_lr: 0}, {at: [2], lr: 0.5, momentum: 0.5, grad_clip: 1}]"
    steering = steering_of(text, "--custom_lr_list clip_val --custom_lr 0.05")
    optimizer = steering._optimizer
    clips = [any("clip_val" in name for name in group["param_names"]) for group in optimizer.param_groups]
    assert any(clips) and not all(clips)
    steering.advance(1, STEPS)
    assert [group["base_lr"] for group in optimizer.param_groups] == [0 if c else 0.05 for c in clips]
    steering.advance(2, 2 * STEPS)
    assert [group["base_lr"] for group in optimizer.param_groups] == [0 if c else 0.5 for c in clips]
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
    assert steering.optim.grad_clip == 1
    assert [steering.rates.base(step) for step in (0, 2 * STEPS - 1, 2 * STEPS)] == [0.05, 0.05, 0.5]


def test_a_rate_holds_on_when_epochs_become_shorter() -> None:
    """Its first step is that of longer epochs, which comes later than where the run goes on."""
    text = "epoch: [{at: [2], lr: 0.5}]"
    before = steering_of(text)
    before.advance(2, 2 * STEPS)
    after = steering_of(text)
    after.load_state_dict(before.state_dict(), STEPS)
    assert [after.rates.base(step) for step in (STEPS, 2 * STEPS)] == [0.5, 0.5]


@pytest.mark.parametrize("options", ["--lr_policy fix", "--lr_policy sgdr --lr_custom_step 2 --wakeup 5"])
def test_planned_rates_are_those_of_the_run(
    options: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Printed and drawn by lr-test, listed by the dry run: of each step, and the metrics of each epoch."""
    text = "init: [{lr: 0.4}]\nepoch: [{at: [1], lr: 0.02}]\niteration: [{at: [5], lr: 0.2}, {at: [27], lr: 0.3}]"
    drawn: list[list[float]] = []
    save = Figure.savefig

    def watched(figure: Figure, *arguments: Any, **settings: Any) -> None:
        drawn.append(figure.axes[0].lines[0].get_ydata().tolist())
        save(figure, *arguments, **settings)

    monkeypatch.setattr(Figure, "savefig", watched)
    keyword = RUN.split("--keyword ")[1].split()[0]
    assert run(text, f"{options} --keyword {keyword},lr-test", case="planned") == 0
    printed = [row.split() for row in capsys.readouterr().out.splitlines()[1:-1]]
    (steps,) = drawn
    assert run(text, f"{options} --dry_run --verbose", case="planned") == 0
    listed = (
        capsys.readouterr().out.partition("learning rate at the epochs where it changes: ")[2].splitlines()[0]
    )

    taken: list[float] = []
    apply = schedule.Schedule.apply

    def recorded(self: schedule.Schedule, optimizer: Any, step: int) -> None:
        apply(self, optimizer, step)
        taken.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(schedule.Schedule, "apply", recorded)
    assert run(text, options, case="real") == 0
    assert steps == pytest.approx(taken, rel=1e-12) and len(taken) == 3 * STEPS and len(set(taken)) >= 4
    with open("exp/real/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for epoch, row in enumerate(rows):
        assert float(row["lr"]) == pytest.approx(taken[epoch * STEPS], rel=1e-12)
        assert printed[epoch] == [str(epoch), f"{taken[epoch * STEPS]:.8g}"]
    rates = [row["lr"] for row in rows]
    changed = [(epoch, float(lr)) for epoch, lr in enumerate(rates) if epoch == 0 or lr != rates[epoch - 1]]
    assert listed == ", ".join(f"{epoch}: {lr:.6g}" for epoch, lr in changed)


def test_freezing_ranges_late() -> None:
    """With a rate of 0 for clip values they stay to the bit, while weights go on."""
    options = "--custom_lr_list clip_val --custom_lr 0.05 -s 1"
    assert run("epoch: [{at: [2], custom_lr: 0}]", options) == 0
    paths = [Path(f"weights/tiny/run-epoch{epoch}-checkpoint.pth.tar") for epoch in (1, 2, 3)]
    first, second, third = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    name = "3.quant_weight.clip_val"
    assert not first[name].equal(second[name])
    assert second[name].equal(third[name])
    assert not second["3.weight"].equal(third["3.weight"])


@pytest.mark.parametrize("every", [5])
def test_resuming_repeats_nothing(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended in the middle of the second epoch, behind a change, the run ends with the same bits."""
    text = PROGRESSIVE + "  - {at: [14], tag: fm, grad_scale: fan-scale}\n  - {at: [15], lr: 0.02}\n"
    assert run(text, case="whole") == 0
    advance, stopped = policy.PolicyScheduler.advance, []

    def ends(self: policy.PolicyScheduler, epoch: int, step: int) -> bool:
        if step == 20 and not stopped:
            stopped.append(step)
            raise UserError("ended")
        return advance(self, epoch, step)

    monkeypatch.setattr(policy.PolicyScheduler, "advance", ends)
    assert run(text, f"--save_every {every}", case="parts") == 2
    assert run(text, f"--save_every {every} -r", case="parts") == 0
    whole, parts = (
        torch.load(f"weights/tiny/{case}-checkpoint.pth.tar", weights_only=True)
        for case in ("whole", "parts")
    )
    assert all(value.equal(parts["state_dict"][name]) for name, value in whole["state_dict"].items())
    assert whole["policy"] == parts["policy"] and whole["learning_rate"] == parts["learning_rate"]
    assert int(whole["state_dict"]["3.quant_weight.level_num"]) == 4
    log = Path("exp/parts/log.txt").read_text()
    assert log.count("level_num 256 -> 16") == 2  # of the activation at init, of the weight at epoch 1
    with open("exp/whole/metrics.csv") as one, open("exp/parts/metrics.csv") as other:
        rows = [[row["lr"] for row in csv.DictReader(file)] for file in (one, other)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("keywords", "entry"),
    [
        ("reactnet --bits 1 --fm_grad_type STE", "grad_window: 3.0"),
        ("ewgs --bits 2", "grad_delta: 0.01"),
        ("lq --bits 2", "scale: 0.6"),
        ("lsq --bits 2", "grad_type: STE, grad_scale: paper, half_range: false, boundary: 2.0"),
    ],
)
def test_all_that_a_policy_sets_is_resumed(keywords: str, entry: str) -> None:
    text, options = f"epoch: [{{at: [1], tag: fm, {entry}}}]", f"--keyword cifar10,{keywords}"
    assert run(text, f"{options} --epochs 2", case="parts") == 0
    assert run(text, f"{options} --epochs 3 -r", case="parts") == 0
    held = torch.load("weights/tiny/parts-checkpoint.pth.tar", weights_only=True)
    wanted = yaml.safe_load(f"{{{entry}}}")
    for name, values in held["policy"]["quantizers"].items():
        assert "quant_activation" not in name or wanted.items() - {("boundary", 2.0)} <= values.items()


def test_best_is_of_the_last_levels() -> None:
    """A network of more levels is not the best one of the run."""
    assert run("epoch: [{at: [2], bit: 1}]") == 0
    best = torch.load("weights/tiny/run-model_best.pth.tar", weights_only=True)
    assert best["epoch"] == 3 and int(best["state_dict"]["3.quant_weight.level_num"]) == 2


def test_disabled_quantizers_let_everything_pass() -> None:
    steering = steering_of("init: [{enable: false}]\nepoch: [{at: [1], enable: true}]")
    quantizer = dict(quantizers(steering._model))["3.quant_weight"]
    x = torch.randn(quantizer.range_shape())
    assert quantizer(x).equal(x) and not build.is_quantized(steering._model)
    steering.advance(1, STEPS)
    assert not quantizer(x).equal(x) and build.is_quantized(steering._model)
