"""From a command line to the typed configuration: what typical lines mean, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from utils.config.recorded import to_dict
from utils.config.resolve import read
from utils.config.schema import (
    BlockConfig,
    Config,
    DataConfig,
    DeviceConfig,
    ModelConfig,
    OptimConfig,
    QuantizerConfig,
    RunConfig,
    ScheduleConfig,
    StemConfig,
)
from utils.errors import UserError


def config_of(line: str) -> Config:
    """The configuration of a command line, its words split at spaces."""
    return read(line.split())


def field(config: Config, name: str) -> Any:
    """A field by its dotted name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


QUANTIZED = "--keyword cifar10,cbas,dorefa,lsq --fm_enable --wt_enable --fm_bit 2 --wt_bit 2"
FIRST_LAST = QUANTIZED.replace("lsq", "lsq,first-last")


def test_no_option_at_all() -> None:
    """The digits in full precision, every default as the dataclasses declare it."""
    assert config_of("") == Config(
        model=ModelConfig(stem=StemConfig(kind="cifar")),
        data=DataConfig(),
        optim=OptimConfig(),
        schedule=ScheduleConfig(),
        run=RunConfig(),
        keywords=("digits",),
        origins={
            name: "keyword digits"
            for name in ("data.dataset", "stem.kind", "model.num_classes", "model.input_size")
        },
        warnings=(),
    )


def test_a_typical_line() -> None:
    """ImageNet at two bits: every part of the configuration is what was written."""
    config = config_of(
        "--dataset imagenet --root /data/imagenet --model resnet18 --epochs 90 -b 256 -v 100 -j 8 "
        "--case mine --keyword cbsa,origin,fix_pooling,singleconv,fix,real_skip,dorefa,lsq "
        "--pretrained fp.pth.tar --seed 3 --fm_enable --fm_bit 2 --wt_enable --wt_level 3 --wt_quant_group 1 "
        "--fm_boundary 6 --wt_grad_scale fan-scale --re_init --lr 0.01 --wd 5e-5 --nesterov "
        "--lr_policy sgdr_step --lr_custom_step 30,60 --eta_min 1e-5 --custom_decay_list clip_val "
        "--custom_decay 1e-4 --custom_lr_list clip_val --custom_lr 1e-3 --grad_clip 5 --iter-size 2 "
        "--wakeup_epoch 1 --stable 100 -s 10 --tensorboard --mean 0.5,0.5,0.5 --std 0.2,0.2,0.2 -g 0"
    )
    assert config.model == ModelConfig(
        name="resnet18",
        num_classes=1000,
        input_size=224,
        block=BlockConfig(
            order="cbsa", skip="block", fix=True, shortcut_pool=False, shortcut_full_precision=True
        ),
        stem=StemConfig(kind="imagenet", norm_before_pool=True),
        quant=dataclasses.replace(
            ModelConfig().quant,
            fm=QuantizerConfig(
                tag="fm", enable=True, method="lsq", levels=4, half_range=True, boundary=6.0, stable=100
            ),
            wt=QuantizerConfig(
                tag="wt",
                enable=True,
                method="lsq",
                levels=3,
                quant_group=1,
                grad_scale="fan-scale",
                stable=100,
            ),
            ot=QuantizerConfig(tag="ot", method="lsq", stable=100),
            re_init=True,
        ),
    )
    assert config.data == DataConfig(
        dataset="imagenet",
        count_classes=True,
        root=Path("/data/imagenet"),
        batch_size=256,
        val_batch_size=100,
        workers=8,
        num_classes=1000,
        input_size=224,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        seed=3,
    )
    assert config.optim == OptimConfig(
        lr=0.01,
        nesterov=True,
        weight_decay=5e-5,
        custom_decay_list=("clip_val",),
        custom_decay=1e-4,
        custom_lr_list=("clip_val",),
        custom_lr=1e-3,
        grad_clip=5.0,
        iter_size=2,
    )
    assert config.schedule == ScheduleConfig(
        policy="sgdr_step", epochs=90, eta_min=1e-5, custom_step=(30, 60), wakeup_epoch=1
    )
    assert config.run == RunConfig(
        case="mine", seed=3, pretrained="fp.pth.tar", save_freq=10, tensorboard=True
    )
    assert config.devices == DeviceConfig(ids=(0,))
    assert config.keywords[0] == "imagenet"
    assert config.warnings == ()
    assert config.origins["quant.wt.method"] == "keyword lsq"
    assert config.origins["block.order"] == "keyword cbsa"
    assert config.origins["weight_decay"] == "--weight_decay"
    assert config.origins["data.dataset"] == "--dataset"
    assert "momentum" not in config.origins


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # The half range: activations have it and lose it, weights do not and get it.
        (QUANTIZED, {"model.quant.fm.half_range": True, "model.quant.wt.half_range": False}),
        (
            f"{QUANTIZED} --fm_half_range --wt_half_range",
            {
                "model.quant.fm.half_range": False,
                "model.quant.wt.half_range": True,
                "model.quant.ot.half_range": False,
            },
        ),
        # Bits and levels.
        (f"{QUANTIZED} --fm_bit 1 --wt_bit 16", {"model.quant.fm.levels": 2, "model.quant.wt.levels": 65536}),
        (f"{QUANTIZED} --fm_level 3", {"model.quant.fm.levels": 3, "model.quant.wt.levels": 4}),
        (f"{QUANTIZED} --fm_level 4", {"model.quant.fm.levels": 4}),
        ("--keyword cbas,dorefa --wt_enable --wt_level 1000", {"model.quant.wt.levels": 1000}),
        ("--keyword cbas,dorefa --wt_enable", {"model.quant.wt.levels": 256, "model.quant.fm.enable": False}),
        # Data sets and their keywords.
        (
            "--keyword cifar100",
            {"data.dataset": "cifar100", "keywords": ("cifar100",), "data.num_classes": 100},
        ),
        (
            "--dataset cifar100",
            {"data.dataset": "cifar100", "keywords": ("cifar100",), "model.num_classes": 100},
        ),
        ("--dataset cifar10 --keyword cifar10,cbas", {"keywords": ("cifar10", "cbas")}),
        ("--dataset folder --root x", {"data.dataset": "imagenet", "keywords": ("imagenet",)}),
        ("--dataset imagenet --root x", {"model.input_size": 224, "model.stem.kind": "imagenet"}),
        (
            "--dataset imagenet --root x --num_classes 20 --input_size 64",
            {"data.num_classes": 20, "model.num_classes": 20, "data.input_size": 64, "model.input_size": 64},
        ),
        ("--input_size 96x160", {"data.input_size": (96, 160), "model.input_size": (96, 160)}),
        ("--input_size 64X64", {"data.input_size": 64}),
        ("--keyword cbas", {"keywords": ("digits", "cbas"), "data.dataset": "digits"}),
        # `fake` imitates what it is told to.
        (
            "--dataset fake --keyword cifar100",
            {"data.dataset": "fake", "data.num_classes": 100, "data.input_size": 32},
        ),
        (
            "--dataset imagenet --root x --keyword small_stem,imagenet --input_size 32 --num_classes 7",
            {"data.input_size": 32, "model.num_classes": 7, "model.stem.kind": "cifar"},
        ),
        ("--dataset fake --keyword imagenet", {"data.input_size": 224, "model.stem.kind": "imagenet"}),
        (
            "--dataset fake --keyword imagenet --input_size 64 --num_classes 7",
            {"data.input_size": 64, "data.num_classes": 7, "model.stem.kind": "imagenet"},
        ),
        (
            "--dataset fake --num_classes 7 --input_size 48",
            {"keywords": (), "data.num_classes": 7, "data.input_size": 48, "model.stem.kind": "cifar"},
        ),
        ("--dataset fake --num_classes 7 --input_size 128", {"model.stem.kind": "imagenet"}),
        ("--dataset fake --keyword cifar10 --fake_size 40", {"data.fake_size": 40}),
        # Augmentation.
        ("--aa", {"data.colour": True, "data.mixup_alpha": 0.0, "data.cutmix_alpha": 0.0}),
        ("--mixup_enable", {"data.mixup_alpha": 0.2, "data.cutmix_alpha": 0.0, "data.colour": False}),
        ("--mixup_enable --mixup_alpha 0.4", {"data.mixup_alpha": 0.4}),
        ("--cutmix_enable --cutmix_alpha 0.5", {"data.cutmix_alpha": 0.5, "data.mixup_alpha": 0.0}),
        ("--cutmix_enable", {"data.cutmix_alpha": 1.0}),
        ("--rand_augment 9", {"data.rand_augment": 9}),
        # Files.
        (
            "--dataset dali --root x --skip_corrupt 5",
            {"keywords": ("imagenet",), "data.dataset": "dali", "data.skip_corrupt": 5},
        ),
        (
            "--dataset imagenet --root x --ignore_orientation --max_value 4095",
            {"data.ignore_orientation": True, "data.max_value": 4095},
        ),
        # Validation.
        ("-b 48", {"data.batch_size": 48, "data.val_batch_size": 48}),
        ("-b 48 -v 10", {"data.batch_size": 48, "data.val_batch_size": 10}),
        ("-v 0", {"data.batch_size": 128, "data.val_batch_size": 0}),
        ("-e -b 1", {"data.batch_size": 1, "run.evaluate": True}),
        # Words that act outside the network.
        ("--keyword label-smooth", {"loss.label_smooth": 0.1}),
        ("--keyword label-smooth --label_smooth 0.2", {"loss.label_smooth": 0.2}),
        ("--label_smooth 0.2", {"loss.label_smooth": 0.2}),
        ("--keyword label-smooth --label_smooth 0", {"loss.label_smooth": 0.0}),
        ("--keyword lr-test", {"run.lr_test": True}),
        # Skips, stems and branches.
        ("--keyword bacs,preBN", {"model.block.order": "bacs", "model.stem.pre_norm": True}),
        ("--base 5", {"model.base": 5}),
        ("--width_alpha 0.25", {"model.width_alpha": 0.25}),
        # One seed for data and network; one warm-up for every quantizer.
        ("--seed 7", {"run.seed": 7, "data.seed": 7}),
        (
            f"{QUANTIZED} --stable_epoch 2",
            {"model.quant.fm.stable_epoch": 2, "model.quant.wt.stable_epoch": 2},
        ),
        # Methods per tag.
        (
            "--keyword cbas,pact,wt_lsq --fm_enable --wt_enable",
            {"model.quant.fm.method": "pact", "model.quant.wt.method": "lsq"},
        ),
        (
            "--keyword cbas,dorefa,wt_bin,wt_gamma --wt_enable --wt_bit 1",
            {
                "model.quant.wt.binary_scale": True,
                "model.quant.wt.gamma": True,
                "model.quant.fm.gamma": False,
            },
        ),
        # Folders are paths.
        (
            "--weights_dir w --log_dir l --resume_file r",
            {"run.weights_dir": Path("w"), "run.log_dir": Path("l"), "run.resume_file": Path("r")},
        ),
    ],
)
def test_meaning(line: str, expected: dict[str, Any]) -> None:
    """A command line and fields it leads to."""
    config = config_of(line)
    assert {name: field(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("line", "warnings"),
    [
        (QUANTIZED, []),
        ("--fm_bit 2", ["--fm_bit has no effect without --fm_enable"]),
        ("--mixup_alpha 0.2", ["--mixup_alpha has no effect without --mixup_enable"]),  # its default
        ("--opt_level O1", ["--opt_level has no effect without --fp16"]),
        ("--lr_policy cos --lr_custom_step 3", ["--lr_custom_step has no effect with --lr_policy cos"]),
        # A later option has made them idle.
        ("--dataset imagenet --root x --dataset digits", ["--root has no effect with the data set digits"]),
        ("--dataset imagenet --root x --dataset fake", []),
        (
            "--dataset fake --fake_size 8 --dataset digits",
            ["--fake_size has no effect with the data set digits"],
        ),
        (
            f"{QUANTIZED.replace('--fm_enable ', '').replace('--fm_bit 2', '--fm_bit 32')}",
            ["--fm_bit has no effect without --fm_enable"],
        ),
        # Its default.
        ("--skip_corrupt 0", ["--skip_corrupt has no effect with the data set digits"]),
        (
            "--dataset imagenet --root x --skip_corrupt 3 --ignore_orientation --dataset fake",
            [
                f"--{name} has no effect with the data set fake"
                for name in ("skip_corrupt", "ignore_orientation")
            ],
        ),
        ("--keyword cbas,dorefa", ["stays in full precision"]),
        ("--re_init", ["--re_init has no effect"]),
        (
            "--stable 5 --padding_after_quant",
            ["--padding_after_quant has no effect", "--stable has no effect"],
        ),
        ("--keyword bacs", ["bacs without the keyword preBN"]),
        ("--keyword bacs,preBN", []),
        ("--model pytorch-resnet18 --keyword origin", ["the keyword origin has no effect on this network"]),
        (f"{FIRST_LAST} --fm_first_signed", []),
        (
            f"{QUANTIZED} --fm_first_signed",
            ["--fm_first_signed has no effect without the keyword first-last"],
        ),
        *(
            (
                f"--model {model} --keyword cifar10,lsq,first-last --fm_enable --fm_first_signed",
                [f"--fm_first_signed has no effect on {model}, whose first layer has signed levels anyway"],
            )
            for model in (
                "mobilenetv1",
                "mobilenetv2",
                "vgg_small",
                "nin",
                "torchvision:resnet18",
                "timm:resnet18",
            )
        ),
        ("--model pytorch-resnet18 --keyword lsq,first-last --fm_enable --fm_first_signed", []),
        (
            f"{FIRST_LAST} --fm_first_signed --fm_half_range",
            ["--fm_first_signed has no effect with --fm_half"],
        ),
        (
            "--keyword cbas,xnor,first-last --fm_enable --fm_first_signed",
            ["--fm_first_signed has no effect with xnor, whose levels are symmetric"],
        ),
        (
            "--keyword cbas,lsq,first-last --fm_first_signed",
            ["has no effect without --fm_enable", "stays in full"],
        ),
        (f"{QUANTIZED} --wt_scale 2", ["--wt_scale has no effect with lsq"]),
        (f"{QUANTIZED} --wt_scale 2 --wt_grad_scale fan-scale", []),
        (
            "--keyword cbas,dorefa --wt_enable --wt_quant_group 1",
            ["--wt_quant_group has no effect with dorefa"],
        ),
        ("--keyword cbas,pact,wt_gamma --wt_enable --wt_quant_group 1", []),
        ("--keyword cbas,pact --wt_enable --re_init", ["--re_init has no effect: no quantizer"]),
        ("--keyword cbas,pact --fm_enable --re_init", []),
        ("--custom_lr 0.1", ["--custom_lr has no effect without --custom_lr_list"]),
        ("--custom_decay 0.1", ["--custom_decay has no effect without --custom_decay_list"]),
        ("--optimizer adam --nesterov", ["--nesterov has no effect with --optimizer ADAM"]),
        ("--fm_bit 32", ["--fm_bit has no effect without --fm_enable"]),
        (f"{QUANTIZED} --wt_ratio 0.5", ["--wt_ratio has no effect with the methods of this project"]),
        (
            f"{QUANTIZED} --wt_grad_delta 0.1 --keyword cbas,lsq",
            ["--wt_grad_delta has no effect with lsq, whose gradient does not"],
        ),
        (
            "--keyword cbas,xnor --fm_enable --fm_bit 1 --fm_grad_window 2 --fm_grad_type STE --fm_grad_type none",
            ["--fm_grad_window has no effect while --fm_grad_type is none"],
        ),
        (
            "--keyword cbas,xnor --fm_enable --fm_bit 1 --fm_grad_window 1",  # the default
            ["--fm_grad_window has no effect while --fm_grad_type is none"],
        ),
        ("--keyword cbas,xnor --fm_enable --fm_bit 1 --fm_grad_window 2 --fm_grad_type STE", []),
        (f"{QUANTIZED} --fm_grad_type STE-scale", ["--fm_grad_type STE-scale has no effect with lsq"]),
        (
            "--keyword cbas,dorefa,wt_bin,wt_gamma,ot_lsq,fm_lsq --fm_enable",
            [
                f"the keyword {w} has no effect without --{w[:2]}_enable"
                for w in ("wt_bin", "wt_gamma", "ot_lsq")
            ],
        ),
        ("--keyword cbas,xnor,gamma --fm_enable", ["the keyword gamma has no effect without --wt_enable"]),
        ("--keyword cbas,xnor,gamma --wt_enable", []),
        ("--keyword cbas,lq,progressive --wt_enable", ["progressive has no effect without --policy"]),
        ("--keyword cbas,lq --fm_enable --fm_scale 1", []),
        ("--keyword cbas,pact --fm_enable --fm_bit 1 --re_init", ["too small for one-bit activations"]),
        ("--keyword cbas,pact --fm_enable --fm_bit 1 --re_init --re_init_range mse", []),
        ("--keyword cbas,pact --fm_enable --fm_bit 1 --re_init --fm_half_range", []),
        ("--keyword cbas,pact,NReLU --fm_enable --fm_bit 1 --re_init", []),
        ("--keyword cbas,pact --fm_enable --fm_bit 1", []),
    ],
)
def test_warnings(line: str, warnings: list[str]) -> None:
    """What has no effect is said, and nothing else is."""
    found = config_of(line).warnings
    assert len(found) == len(warnings)
    assert all(expected in warning for expected, warning in zip(warnings, found, strict=True))


@pytest.mark.parametrize(
    ("line", "steps", "shortened"),
    [
        ("--epochs 90 --lr_custom_step 30,60 --epochs 40", (30,), True),
        ("--epochs 90 --lr_custom_step 30,60 --epochs 30", (30,), True),
        (
            "--epochs 90 --lr_custom_step 30,95 --epochs 1",
            (),
            True,
        ),  # the config's own mistake does not matter
        ("--epochs 1 --lr_custom_step 1 --epochs 2", (1,), True),
        ("--epochs 90 --lr_custom_step 30,60", (30, 60), False),
        ("--lr_custom_step 30,60", (30, 60), False),  # refused by utils.step.schedule.check_schedule
        ("--epochs 90 --lr_custom_step 30 --epochs 5 --lr_custom_step 8", (8,), True),  # as that
    ],
)
def test_epochs_that_replace_those_of_the_schedule(
    line: str, steps: tuple[int, ...], shortened: bool
) -> None:
    """What lies beyond falls away with a warning; written anew it stays, for the check to refuse."""
    config = config_of(line)
    assert config.schedule.custom_step == steps
    assert config.run.shortened == shortened
    dropped = [warning for warning in config.warnings if "falls away" in warning]
    written = line.split("--lr_custom_step ")[-1].split()[0].count(",") + 1
    assert len(dropped) == (written > len(steps))


def test_fake_images_in_place_of_another_data_set_imitate_it() -> None:
    config = config_of("--dataset dali --dataset fake")
    assert config == dataclasses.replace(
        config_of("--dataset fake --keyword imagenet"), run=config.run, origins=config.origins
    )
    assert config_of("--dataset cifar100 --dataset fake --dataset fake").model.num_classes == 100
    assert config_of("--dataset cifar100 --keyword cifar10 --dataset fake").model.num_classes == 10


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--decay_small", True),
        ("--no_decay_small", False),
        ("--decay_small --no-decay-small", False),
        ("--no_decay_small --decay_small", True),
    ],
)
def test_the_last_word_on_small_tensors_counts(line: str, expected: bool) -> None:
    assert config_of(line).optim.decay_small == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--dataset cifar10 --keyword cifar100",
            "--dataset cifar10 contradicts the keyword cifar100.*cifar10",
        ),
        ("--keyword cifar10,cifar100", "cifar10 contradicts cifar100"),
        (
            "--dataset fake",
            "--dataset fake: .*cifar10, cifar100, digits, glyphs, imagenet.*--num_classes and --input_size",
        ),
        ("--dataset fake --num_classes 5", "--dataset fake: "),
        ("--keyword dali", "unknown keyword 'dali'"),
        ("--dataset cifar10 --num_classes 7", "--num_classes 7: cifar10 has 10 classes"),
        (f"{QUANTIZED} --fm_bit 0", "--fm_bit 0: must be from 1 to 16"),
        (f"{QUANTIZED} --wt_bit 17", "--wt_bit 17: must be from 1 to 16"),
        (f"{QUANTIZED} --wt_level 1", "--wt_level 1: must be from 2"),
        (f"{QUANTIZED} --wt_level 5", "--wt_level 5 does not fit --wt_bit 2, which has 4 levels"),
        ("--fm_enable --keyword cbas", "--fm_enable: which quantizer"),
        ("--fm_enable --keyword dorefa", "--keyword: .*order.*cbas, cbsa, cabs, bacs, bcas"),
        ("--keyword cbas,dorefa,wt_bin --wt_enable --wt_bit 2", "wt_bin needs --wt_bit 1, not 4 levels"),
        (f"{QUANTIZED} --fm_grad_type Triangle", "--fm_grad_type Triangle belongs to binary"),
        ("--lr nan", "--lr nan: must be a number that is not negative"),
        ("--lr inf", "--lr inf: must be a number"),
        ("--weight_decay -1", "--weight_decay -1.0: must be"),
        ("--width_alpha inf", "--width_alpha inf: must be a number greater than 0"),
        ("--width_alpha 0", "--width_alpha 0.0: must be a number greater than 0"),
        ("--fm_boundary nan", "--fm_boundary nan: must be a number greater than 0"),
        ("--fm_boundary 1e39", r"--fm_boundary 1e\+39: must be from 1e-06 to 1e\+06"),
        ("--wt_scale 1e-7", r"--wt_scale 1e-07: must be from 1e-06 to 1e\+06"),
        ("--keyword cbas,lq --fm_enable --fm_scale 1.5", "--fm_scale 1.5: LQ-Nets' thresholds.* at most 1"),
        ("--fm_grad_window 0", "--fm_grad_window 0.0: must be from 1e-06"),
        ("--wt_grad_delta -1", r"--wt_grad_delta -1.0: must be from 0 to 1e\+06"),
        ("--wt_correlate nan", "--wt_correlate nan: give a finite number"),
        ("--delay inf", "--delay inf: must be a number"),
        ("--rand_augment 31", "--rand_augment 31: must be from 0 to 30"),
        ("--mixup_enable --mixup_alpha 0", "--mixup_alpha 0.0: must be a number greater than 0"),
        ("--cutmix_enable --cutmix_alpha nan", "--cutmix_alpha nan: must be a number greater than 0"),
        ("--max_value 0", "--max_value 0: must be from 1 to 65535"),
        ("--max_value 65536", "--max_value 65536: must be from 1 to 65535"),
        ("--skip_corrupt -1", "--skip_corrupt -1: must be a number that is not negative"),
        ("--momentum 1", "--momentum 1.0: must be at least 0 and less than 1"),
        ("--label_smooth nan", "--label_smooth nan: must be at least 0"),
        ("--epochs 0", "--epochs 0: must be a number greater than 0"),
        ("-b 1", "--batch_size 1: .* at least 2"),
        ("-v -1", "--val_batch_size -1: must be"),
        ("-e -v 0", "--evaluate needs validation images"),
        ("--seed -1", "--seed -1: must be from 0"),
        ("--seed 99999999999999999999", "--seed 9+: must be from 0"),
        ("-g -1", "--device_ids -1: GPUs are counted from 0"),
        ("-g 0 1 0", "--device_ids 0 1 0: each GPU takes one process"),
        ("--amp_dtype float16", "--amp_dtype float16 needs --fp16"),
        ("--amp_backend apex", "--amp_backend apex needs --fp16"),
        ("--amp_backend apex --fp16", "--amp_backend apex: NVIDIA removed amp from apex in 2025"),
        ("--world_size 2", "--world_size 2 belongs to --distributed"),
        ("--rank 1", "--rank 1 belongs to --distributed"),
        ("--distributed --world_size 2 --rank 2", "--rank 2: processes are counted from 0 to world_size - 1"),
        ("--distributed --world_size 0 --rank 0", "--world_size 0: must be at least 1"),
        ("--save_every -1", "--save_every -1: must be a number that is not negative"),
        ("--balanced_sampler --class_weights balanced", "even out the classes twice: keep one of them"),
        ("--input_size 0", "--input_size 0: must be a number greater than 0"),
        ("--input_size 32x-1", "--input_size 32x-1: must be a number greater than 0, or two, like 96x160"),
        ("--input_size 96x", "'96x' is no size: write 32, or height and width, like 96x160"),
        ("--input_size 3x96x160", "'3x96x160' is no size"),
        ("--input_size 96,160", "'96,160' is no size"),
        ("--keep 0", "--keep 0: must be a number greater than 0"),
        ("--mean 0.5,0.5,0.5", "--mean and --std belong together"),
        ("--mean 0.5,0.5 --std 0.5,0.5", "--mean: give three numbers"),
        ("--mean nan,0,0 --std 1,1,1", "--mean: give finite numbers"),
        ("--mean 0,0,0 --std nan,1,1", "--std: give finite numbers"),
        ("--mean 0,0,0 --std 0,1,1", "--std: must be greater than 0"),
        ("--mean 123.7,116,103 --std 1,1,1", "--mean: 123.7 is not of images in .*; divide all three by 255"),
        ("--mean 0,0,0 --std 1,58.4,1", "--std: 58.4 is not of images in .*; divide all three by 255"),
        ("--mean 0.5,-1,0.5 --std 1,1,1", "--mean: -1 is not of images in .*; give numbers from 0 to 1"),
        ("-r --resume_file x", "--resume contradicts --resume_file"),
        # Options that name what the run would not use.
        (
            "--root /my/photos --model torchvision:resnet18",
            "--root /my/photos .* digits, .*: write --dataset folder",
        ),
        ("--dataset glyphs --root x", "--root x has no effect .*--dataset folder"),
        ("--dataset fake --keyword cifar10 --root x", "--root x has no effect .*--dataset folder"),
        ("--fake_size 8", "--fake_size 8 has no effect .*: write --dataset fake"),
        ("--skip_corrupt 3", "--skip_corrupt 3 has no effect .* digits: write --dataset folder .* or leave"),
        ("--max_value 4095", "--max_value 4095 has no effect .* digits: write --dataset folder"),
        ("--ignore_orientation", "--ignore_orientation has no effect .* digits: write --dataset folder"),
        (
            "--keyword cbas,dorefa,lsq --fm_bit 2",
            "--fm_bit 2: activations are not quantized: add --fm_enable",
        ),
        (f"{QUANTIZED} --ot_level 3", "--ot_level 3: outputs are not quantized: add --ot_enable"),
        ("--keyword cbas,dorefa --fm_enable --wt_bit 2", "--wt_bit 2: weights .* add --wt_enable"),
        ("--opt_level O2", "--opt_level O2 has no effect without --fp16.*: add --fp16"),
        ("--re_init_range mse", "--re_init_range mse has no effect .*: add --re_init,"),
        (
            f"{QUANTIZED} --re_init --re_init_percentile 90",
            "90.0 has no .*: add .*--re_init_range percentile",
        ),
        ("--mixup_alpha 0.3", "--mixup_alpha 0.3 has no effect .*: add --mixup_enable"),
        ("--cutmix_alpha 0.3", "--cutmix_alpha 0.3 has no effect .*: add --cutmix_enable"),
        ("--freeze_momentum 0.5", "--freeze_momentum 0.5 has no effect .*: add --freeze_threshold"),
        (
            f"{QUANTIZED} --wt_grad_delta 0.1",
            "--wt_grad_delta 0.1 has no effect with lsq, whose gradient does not .*: choose ewgs, or leave",
        ),
        (
            f"{QUANTIZED} --fm_grad_window 2",
            "with lsq, whose gradient has no window: choose xnor or ReActNet, or leave --fm_grad_window out",
        ),
        (
            "--keyword cbas,xnor --fm_enable --fm_bit 1 --fm_grad_window 2",
            "--fm_grad_window 2.0 has no effect while --fm_grad_type is none: add --fm_grad_type STE or Triangle, or",
        ),
        (
            "--keyword cbas,xnor --wt_enable --wt_bit 1 --wt_grad_window 2 --policy none",
            "--wt_grad_window 2.0 has no effect while .*: add --wt_grad_type STE, or leave",
        ),
        (
            f"{QUANTIZED} --re_init_missing",
            "--re_init_missing has no effect without --pretrained: write --re_init",
        ),
        (f"{QUANTIZED} --proxquant_step 9", "--proxquant_step 9 has no effect .*: add the keyword proxquant"),
        ("--model pytorch-resnet18 --base 2", "--base 2: pytorch-resnet18 has no branches"),
    ],
)
def test_refused(line: str, message: str) -> None:
    """One line that names the option or keyword."""
    with pytest.raises(UserError) as caught:
        config_of(line)
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)


# As plain data -----------------------------------------------------------------------------------


def test_yaml_round_trip() -> None:
    """The dump holds every field, and comes back through YAML and JSON as it is."""
    config = config_of(
        f"{QUANTIZED} --mean 0.1,0.2,0.3 --std 1,1,1 --root some/where --lr_custom_step 3,5 --grad_clip 1"
    )
    plain = to_dict(config)
    assert yaml.safe_load(yaml.safe_dump(plain, sort_keys=False)) == plain
    assert json.loads(json.dumps(plain)) == plain
    assert plain["data"]["root"] == str(Path("some/where"))
    assert plain["data"]["mean"] == [0.1, 0.2, 0.3]
    assert plain["schedule"]["custom_step"] == [3, 5]
    assert plain["model"]["quant"]["fm"]["levels"] == 4
    assert plain["keywords"] == ["cifar10", "cbas", "dorefa", "lsq"]
    assert plain.keys() == {item.name for item in dataclasses.fields(Config)}
    assert plain["optim"].keys() == {item.name for item in dataclasses.fields(OptimConfig)}


def parts(value: Any) -> list[Any]:
    """A dataclass and all that it holds."""
    inside = [getattr(value, item.name) for item in dataclasses.fields(value)]
    return [value, *(part for item in inside if dataclasses.is_dataclass(item) for part in parts(item))]


def test_frozen() -> None:
    """No field of any part can be set, and none can be added."""
    found = parts(config_of(QUANTIZED))
    assert {type(part).__name__ for part in found} == {
        "Config",
        "ModelConfig",
        "BlockConfig",
        "StemConfig",
        "QuantConfig",
        "QuantizerConfig",
        "DataConfig",
        "LossConfig",
        "OptimConfig",
        "WeightsConfig",
        "ScheduleConfig",
        "PrecisionConfig",
        "DeviceConfig",
        "RunConfig",
        "ProbeConfig",
    }
    for part in found:
        for name in (*(item.name for item in dataclasses.fields(part)), "another"):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(part, name, None)


def test_equal_lines_are_equal_configurations() -> None:
    """Spellings do not matter, the order of options neither."""
    one = config_of("--keyword cifar10,cbas --lr 0.2 --iter-size 2")
    two = config_of("--iter_size=2 --lr 0.2 --keyword cifar10,cbas")
    assert one == two and one != config_of("--keyword cifar10,cbas --lr 0.2")


@pytest.mark.parametrize("value", ["grad_type: STE", "scale: 0.5"])
def test_a_policy_may_set_the_type_that_has_a_window(value: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(f"epoch: [{{at: [1], {value}}}]")
    line = f"--keyword cbas,xnor --bits 1 --fm_grad_window 2 --policy {tmp_path / 'p.yaml'}"
    if "grad_type" in value:
        assert not any("grad_window" in warning for warning in config_of(line).warnings)
    else:
        with pytest.raises(UserError, match="while --fm_grad_type is none"):
            config_of(line)
