"""A checkpoint is evaluated as the network that it was trained as, or the message says what to write."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from model.networks.build import build_network
from model.trained import check_as_trained
from model.training.policy import initialise
from utils.config.recorded import to_dict
from utils.config.resolve import read
from utils.config.schema import Config
from utils.errors import UserError

FP = "--dataset fake --width_alpha 0.125 --keyword cifar10,cbas,origin"
LSQ = f"{FP},lsq --bits 2"
MIXED = "init: [{name: 'layer3.2.*', tag: wt, enable: false}, {name: 'layer1.*', bit: 4}]"


@cache
def network(line: str) -> tuple[nn.Module, Config]:
    """The network of a command line, as its training or evaluation begins, and its configuration."""
    config = read(line.split())
    model = build_network(config.model)
    initialise(model, config.policy)
    return model, config


def evaluate(trained: str, line: str, **entries: Any) -> None:
    """Evaluate, with the options of `line`, a checkpoint of a training with those of another one."""
    before, config = network(trained)
    state: dict[str, Tensor] = before.state_dict()
    model, now = network(f"{line} -e")
    check_as_trained({"config": to_dict(config), **entries}, state, model, now, "a.pth.tar")


@pytest.fixture
def mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(MIXED)
    (tmp_path / "bits.yaml").write_text("init: [{name: 'layer1.*', bit: 4}]")
    (tmp_path / "signed.yaml").write_text("init: [{name: 'layer1.*', tag: fm, half_range: false}]")


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize(
    ("trained", "line", "said"),
    [
        # Layers in full precision, and policies.
        (f"{LSQ} --full_precision layer3.2.*", LSQ, "layer3.2.conv2.0: write --full_precision 'layer3.2.*'"),
        (LSQ, f"{LSQ} --full_precision layer3.2.*", "layer3.2.conv2.0: leave --full_precision out"),
        (
            f"{LSQ} --full_precision layer3.2.*,layer1.0.*",
            f"{LSQ} --full_precision layer3.2.*",
            "those of layer1.0.conv1.0, layer1.0.conv2.0: write --full_precision 'layer3.2.*,layer1.0.*'",
        ),
        (
            f"{LSQ} --full_precision layer3.2.*",
            f"{LSQ} --policy signed.yaml",
            "write --full_precision 'layer3.2.*' and leave --policy out",
        ),
        (LSQ, f"{LSQ} --policy signed.yaml", "layer1.2.conv1.0, ...: leave --policy out"),
        (f"{LSQ} --policy signed.yaml", LSQ, "give the --policy that it was trained with"),
        (
            f"{LSQ} --policy p.yaml",
            f"{LSQ} --policy p.yaml --full_precision layer2.*",
            "give the --policy that it was trained with and leave --full_precision out",
        ),
        (f"{LSQ} --policy p.yaml", LSQ, "write --bits 2 with the --policy that it was trained with"),
        (LSQ, f"{LSQ} --policy bits.yaml", "write --bits 2 without --policy"),
        # Bits.
        (LSQ, f"{FP},lsq --bits 4", "at 4 levels, and the options say 16: write --bits 2"),
        (f"{FP},lsq --bits ternary/2", f"{FP},lsq --bits 4", "write --bits ternary/2"),
        (f"{FP},lsq --bits ternary", f"{FP},lsq --fm_enable --wt_enable --wt_bit 2", "write --bits ternary"),
        (f"{FP},lsq --bits 2/32", LSQ, "with activations in full precision: write --bits 2/32"),
        (LSQ, f"{FP},lsq --bits 2/32", "with quantized activations, too: write --bits 2"),
        (
            f"{FP},lsq --wt_enable --wt_level 6 --fm_enable --fm_bit 4",
            LSQ,
            "write --fm_enable --fm_level 16 --wt_enable --wt_level 6",
        ),
        (
            FP,
            LSQ,
            "a.pth.tar was trained in full precision: leave --bits out, or write --bits 32 behind a config",
        ),
        (FP, f"{FP},dorefa --bits 8", "in full precision: leave --bits out"),
        (FP, f"{FP},lsq --wt_enable --wt_bit 2", "in full precision: leave --wt_enable out"),
        (LSQ, FP, "the options ask for full precision: add the keyword lsq and --bits 2"),
        (f"{FP},dorefa --bits 2/4", FP, "add the keyword dorefa and --bits 2/4"),
        (f"{LSQ} --ot_enable --ot_bit 3", FP, "add the keyword lsq and --bits 2 --ot_enable --ot_level 8"),
        # Other options and keywords that shapes do not show.
        (LSQ, f"{LSQ} --fm_half_range", "--fm_half_range was off and is on now"),
        (f"{LSQ} --wt_adaptive var", LSQ, "--wt_adaptive was var and is none now"),
        (LSQ, f"{LSQ} --padding_after_quant", "--padding_after_quant was off and is on now"),
        (f"{FP},dorefa --bits 2", f"{FP},pact --bits 2", "--keyword was with dorefa and is with pact now"),
        (LSQ, LSQ.replace("cbas", "cabs"), "--keyword was with cbas and is with cabs now"),
        (FP, f"{FP},NReLU", "--keyword was with ReLU and is with NReLU now"),
        (f"{FP},reverse-bn", FP, "--keyword was with reverse-bn and is without reverse-bn now"),
    ],
)
def test_another_network_is_refused(trained: str, line: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        evaluate(trained, line)
    assert said in str(caught.value) and str(caught.value).startswith("a.pth.tar ")


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize(
    ("trained", "line"),
    [
        (f"{LSQ} --full_precision layer3.2.*", f"{LSQ} --full_precision layer3.2.conv1.0,layer3.2.conv2.0"),
        (f"{LSQ} --policy p.yaml", f"{LSQ} --policy p.yaml"),
        (f"{LSQ} --re_init --stable 4 --wt_grad_scale paper", f"{LSQ} --input_size 48 --fm_boundary 2"),
        (FP, f"{FP},lsq"),
        (FP, f"{FP} --wt_adaptive var"),
        (FP, f"{FP},freeze-bn"),
    ],
)
def test_the_same_network_may_be_written_differently(trained: str, line: str) -> None:
    evaluate(trained, line)


def test_later_entries_of_a_policy_count() -> None:
    """What a checkpoint holds was trained with them, and an evaluation carries out those of `init` alone."""
    done = {"layer1.0.conv1.0.quant_weight": {"enable": False}}
    with pytest.raises(
        UserError, match=r"those of layer1\.0\.conv1\.0: give a --policy whose entries of init"
    ):
        evaluate(LSQ, LSQ, policy={"quantizers": done})


def test_files_of_other_programs() -> None:
    """They say nothing of their quantizers: full precision may be quantized by a method that learns nothing."""
    state = network(FP)[0].state_dict()
    for payload in ({}, {"config": {"model": {"name": "resnet"}}}, {"config": "resnet.yaml"}):
        check_as_trained(payload, state, *network(f"{FP},dorefa --bits 8 -e"), "a.pth")
        check_as_trained(payload, state, *network(f"{LSQ} -e"), "a.pth")  # loading says what is missing
    with pytest.raises(UserError, match="its config is not what this program writes"):
        evaluate(LSQ, LSQ, config={"model": {"quant": {"fm": 3}}, "policy": []})
