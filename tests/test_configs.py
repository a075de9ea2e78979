"""The example configs: valid shell, named by a pattern, accepted by a dry run at the bits of their names."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import main
import tools
from model.layers.quantized import quantizers
from model.networks import build
from tests import ROOT
from utils.checkpoint.run_state import differences
from utils.config.recorded import to_dict
from utils.config.resolve import read
from utils.config.resolve.data_and_run import DATASETS
from utils.config.schema import Config

sys.path.insert(0, str(ROOT / "benchmarks"))

import digits
import recipes

sys.path.pop(0)

CONFIGS = sorted(path.name for path in (ROOT / "config").iterdir() if path.is_file())
METHODS = {  # METHOD of a name -> the quantizers that the printed table names
    "dorefa": {"dorefa"}, "pact": {"pact"}, "lsq": {"lsq"}, "lsqplus": {"lsqplus"}, "ewgs": {"ewgs"},
    "stableqat": {"stableqat"}, "apot": {"apot"},
    "n2uq": {"n2uq"}, "lq": {"lq"}, "fatnn": {"fatnn"}, "xnor": {"xnor"},
    "xnor++": {"xnor"}, "bireal": {"xnor"}, "groupnet": {"xnor"}, "fixup": set(), "reactnet": {"reactnet"},
}  # fmt: skip
PRECISIONS = {"fp": None, "1bit": (1, 2), "ternary": (2, 3), "2bit": (2, 4), "3bit": (3, 8), "4bit": (4, 16)}
POLICIES = {  # what a run with a policy begins with
    "progressive": {("lsq", 8, 256)}, "mixed": {("lsq", 2, 4), ("lsq", 4, 16)}, "freeze": {("lsq", 2, 4)},
}  # fmt: skip
BEST = "-model_best.pth.tar"


def bash(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """Run train.sh as from a shell that has no settings of its own."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("NPROC", "TORCHRUN", "FASTDIR")
    }
    return subprocess.run(
        ["bash", str(ROOT / "train.sh"), *arguments],
        env={**inherited, "PYTHON": python},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@functools.cache
def argv(name: str) -> tuple[str, ...]:
    """The options that train.sh gives main.py for a config."""
    done = bash("--print", f"config/{name}")
    assert (done.returncode, done.stderr) == (0, "")
    python, script, *options = shlex.split(done.stdout)
    assert (python, script) == (sys.executable, "main.py")
    # Tests run elsewhere than in the repository's root.
    return tuple(
        str(ROOT / option) if option.startswith("config/policies/") else option for option in options
    )


@functools.cache
def config_of(name: str) -> Config:
    """A config as the program understands it; one for DALI with imitated images, since DALI needs a GPU."""
    return read((*argv(name), *(["--dataset", "fake"] if ".dali." in name else [])))


NETWORKS: dict[str, nn.Module] = {}


def network_of(name: str) -> nn.Module:
    """A config's network without values; many configs have the same."""
    model = config_of(name).model
    if repr(model) not in NETWORKS:
        with torch.device("meta"):
            NETWORKS[repr(model)] = build.build_network(model)
    return NETWORKS[repr(model)]


def shapes(name: str, quantized: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a config's checkpoints, with or without what belongs to quantizers."""
    network = network_of(name)
    prefixes = tuple(f"{prefix}." for prefix, _ in quantizers(network))
    return {
        entry: tuple(value.shape)
        for entry, value in network.state_dict().items()
        if quantized or not (prefixes and entry.startswith(prefixes))
    }


def imitate_data(name: str) -> list[str]:
    """Options that stand in for data and weights which need not be there."""
    small = ["--pretrained", "none", "-b", "2", "-v", "2"]
    if "--distill_teacher" in argv(name):
        small += ["--distill_teacher", "none"]
    dataset = name.split(".")[3]
    if dataset in ("imagenet", "folder", "dali"):
        small += ["--input_size", "32"]
    return small if dataset in ("digits", "fake") else [*small, "--dataset", "fake"]


def printed_bits(text: str) -> set[tuple[str, int, int]]:
    """Method, bits and levels of the quantizers in a dry run's table; three levels take two bits."""
    return {
        (method, 2 if width == "ternary" else int(width.removesuffix(" bit")), int(levels))
        for method, width, levels in re.findall(r"(\w+) (ternary|\d+ bit), (\d+) levels", text)
    }


def expected_bits(name: str) -> set[tuple[str, int, int]]:
    """What the name of a config says that the table shows."""
    _, method, _, dataset, precision, _ = name.split(".")
    if precision in POLICIES:
        return POLICIES[precision]
    bits = PRECISIONS[precision.partition("-")[0]]
    if bits is None:
        return set()
    # FATNN's weights are ternary; at two bits LSQ takes their place.
    methods = {"fatnn", "lsq"} if (method, precision) == ("fatnn", "2bit") else METHODS[method]
    paper = (
        method in ("lsq", "lsqplus", "ewgs", "stableqat")
        and precision != "1bit"
        and dataset in ("imagenet", "dali", "cifar10", "cifar100")
    )
    ends = {(method, 8, 256)} if paper else set()  # the first and the last layer
    return {(found, *bits) for found in methods} | ends


@pytest.mark.parametrize("name", CONFIGS)
def test_name_follows_the_pattern(name: str) -> None:
    config, method, phase, dataset, precision, network = name.split(".")
    assert config == "config"
    assert method in METHODS
    assert phase in ("eval", "train-scratch", "finetune")
    assert dataset in (*DATASETS, "folder", "fake")
    assert precision.partition("-")[0] in (*PRECISIONS, *POLICIES)  # 2bit-ema: with averaged weights
    assert network in build.models()


@pytest.mark.parametrize("name", CONFIGS)
def test_valid_shell(name: str) -> None:
    done = subprocess.run(["bash", "-n", ROOT / "config" / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", CONFIGS)
def test_name_says_what_is_in_it(name: str) -> None:
    _, _, phase, dataset, _, network = name.split(".")
    config = config_of(name)
    arguments = argv(name)
    assert arguments[arguments.index("--dataset") + 1] == dataset
    assert config.data.dataset == {"dali": "fake", "folder": "imagenet"}.get(dataset, dataset)
    assert config.model.name == network
    assert config.run.evaluate == (phase == "eval")
    assert (config.run.pretrained == "none") == (phase == "train-scratch")
    assert config.warnings == ()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.split(".")[4] not in POLICIES])
def test_bits_of_a_name_are_those_of_its_quantizers(name: str) -> None:
    """A policy sets others; its dry run shows them."""
    found = {(quantizer.config.method, quantizer.levels) for _, quantizer in quantizers(network_of(name))}
    assert found == {(method, levels) for method, _, levels in expected_bits(name)}


@pytest.mark.parametrize("name", [name for name in CONFIGS if ".1bit." in name])
def test_signs_are_not_taken_behind_a_relu(name: str) -> None:
    config = config_of(name).model
    norm_is_last = config.block.order == "cabs"
    assert norm_is_last or config.activation == "none" or config.quant.fm.method != "xnor"


def comments(name: str) -> str:
    """The remarks of a config and of the ones that it begins with."""
    text = (ROOT / "config" / name).read_text(encoding="utf-8")
    own = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    begun = re.search(r"^source config/(\S+)$", text, flags=re.MULTILINE)
    return f"{own}\n{comments(begun[1])}" if begun else own


AUTHORS = (  # of methods, who have published their code
    "aim-uofa/model-quantization", "allenai/XNOR-Net", "bohanzhuang/Group-Net-image-classification",
    "hongyi-zhang/Fixup", "liuzechun/Bi-Real-net", "microsoft/LQ-Nets",
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CONFIGS if ".eval." not in name])
def test_says_where_its_recipe_is_from(name: str) -> None:
    """A paper or the authors' code, where the data set is one that papers have, or that it is a choice of ours."""
    said = comments(name)
    assert re.search(r"\brecipe\b", said, flags=re.IGNORECASE)
    if name.split(".")[3] in ("imagenet", "dali", "cifar10", "cifar100"):
        _, found, recipe = said.partition("\n# Recipe: ")
        assert found and re.search(rf"\barXiv \d{{4}}\.\d{{5}}\b|{'|'.join(AUTHORS)}|our choice", recipe)


@pytest.mark.parametrize("name", [name for name in CONFIGS if ".eval." in name])
def test_says_what_it_evaluates(name: str) -> None:
    """The config whose checkpoint it is."""
    (named,) = set(re.findall(r"config\.\S+\.\w+", comments(name).splitlines()[0]))
    assert config_of(named).run.case + BEST == config_of(name).run.pretrained


def test_every_case_is_another_one() -> None:
    cases = [config_of(name).run.case for name in CONFIGS]
    assert len(set(cases)) == len(cases)


@pytest.mark.parametrize("name", [name for name in CONFIGS if ".train-scratch." not in name])
def test_pretrained_weights_are_those_of_another_config(name: str) -> None:
    pretrained = config_of(name).run.pretrained
    assert pretrained is not None
    assert pretrained.endswith(BEST)
    sources = [other for other in CONFIGS if config_of(other).run.case + BEST == pretrained]
    assert len(sources) == 1
    evaluated = ".eval." in name
    assert evaluated or ".fp." in sources[0]
    assert config_of(sources[0]).model.name == config_of(name).model.name
    assert shapes(name, quantized=evaluated) == shapes(sources[0], quantized=evaluated)


def test_a_teacher_is_the_network_of_another_config() -> None:
    """In full precision, for the same images, and of the network that the config names."""
    taught = [name for name in CONFIGS if "--distill_teacher" in argv(name)]
    assert len(taught) > 20
    for name in taught:
        distill = config_of(name).loss.distill
        assert distill is not None
        (source,) = [
            other for other in CONFIGS if config_of(other).run.case + BEST == str(distill.pretrained)
        ]
        assert source.split(".")[3:5] == [name.split(".")[3], "fp"], name
        assert config_of(source).model.name == distill.teacher.name, name


@pytest.mark.parametrize("name", [name for name in CONFIGS if ".eval." in name])
def test_an_evaluation_takes_the_norms_of_the_checkpoint(name: str) -> None:
    assert config_of(name).run.evaluate
    assert config_of(name).run.bn_batches == 0


def of_each_kind() -> list[str]:
    """One config of each method with each network, way of training or policy; their data are imitated anyway."""
    found: dict[object, str] = {}
    for name in sorted(CONFIGS, key=lambda name: ".fp." in name):  # rather one that quantizes
        _, method, _, _, precision, network = name.split(".")
        way = precision if precision in POLICIES else precision.partition("-")[2]
        found.setdefault((method, network, way), name)
    return sorted(found.values())


@pytest.mark.parametrize("name", of_each_kind())
def test_dry_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status = main.main([*argv(name), *imitate_data(name), "--dry_run"])
    done = capsys.readouterr()
    assert (status, done.err) == (0, "")
    assert printed_bits(done.out) == expected_bits(name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_those_for_a_folder_of_images_learn_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand, on computed photographs of four classes; smaller and shorter, for the time that it takes."""
    made = f"--keyword make-fake-imagenet --root {tmp_path / 'photos'} --num_classes 4 --fake_size 160"
    assert tools.main([*made.split(), "--image_size", "96x80"]) == 0
    monkeypatch.setenv("PHOTOS", str(tmp_path / "photos"))
    configs = {name: 5 if ".xnor." in name else 8 for name in CONFIGS if ".folder." in name}
    lines = {name: shlex.split(bash("--print", f"config/{name}").stdout)[2:] for name in configs}
    assert len(configs) == 2
    monkeypatch.chdir(tmp_path)
    for name, epochs in configs.items():
        small = f"--input_size 64 --width_alpha 0.25 --epochs {epochs} -v 60 -j 0 --case {name}"
        assert main.main([*lines[name], *small.split()]) == 0, capsys.readouterr().err
        summary = json.loads((tmp_path / "exp" / name / "summary.json").read_text())
        assert summary["audit"].startswith("passed") and summary["bits"] == "1/1"
        assert summary["last_top1"] > 50, name  # 25 by chance


@pytest.mark.parametrize(
    "name", ["config.dorefa.train-scratch.digits.fp.resnet20", "config.lsq.finetune.cifar100.2bit.resnet20"]
)
def test_dry_run_through_the_launcher(name: str, interpreter: str) -> None:
    done = bash(f"config/{name}", *imitate_data(name), "--dry_run", python=interpreter)
    assert (done.returncode, done.stderr) == (0, "")
    assert printed_bits(done.stdout) == expected_bits(name)


def test_the_table_of_results_names_the_configs() -> None:
    """Every row's config is there and is of the row's network and bits; every trained network has a row."""
    page = (ROOT / "docs" / "result_cls.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\|.*\| ResNet-(\d+) \| (\S+) \|.*\(\.\./config/(\S+)\) \|$", page, flags=re.MULTILINE
    )
    precisions = {
        "32": "fp",
        "ternary": "ternary",
        **{f"{bits}/{bits}": f"{bits}bit" for bits in range(1, 5)},
    }
    for depth, bits, name in rows:
        assert name in CONFIGS
        assert name.split(".")[4:] == [precisions[bits], f"resnet{depth}"]
    named = {name for _, _, name in rows}
    measured = ("imagenet", "cifar10", "cifar100")
    trained = {name for name in CONFIGS if name.split(".")[3] in measured and ".eval." not in name}
    assert trained - named == {name for name in trained if ".bireal.train-scratch." in name}  # only starts


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("dorefa.train-scratch.glyphs.fp.resnet20", recipes.WHOLE[recipes.BLOCK]),
        ("reactnet.train-scratch.glyphs.fp.resnet20", recipes.WHOLE[recipes.REACT_BLOCK]),
        ("lsq.finetune.glyphs.2bit.resnet20", recipes.longer(recipes.TWO)),
        ("reactnet.finetune.glyphs.1bit.resnet20", recipes.longer(recipes.WIDE)),
    ],
)
def test_the_recipes_for_glyphs_are_those_that_were_measured(name: str, row: recipes.Method) -> None:
    """The figures beside these configs are of the rows of benchmarks/recipes.py."""
    recipe = recipes.FULL if row in recipes.WHOLE.values() else row.recipe
    options = f"{recipe} {row.options}".format(teacher=f"glyphs-fp-resnet20{BEST}")
    measured = read(digits.command("glyphs-all", "case", 1, row.block, row.keywords, options)[2:])
    assert differences(to_dict(measured), to_dict(config_of(f"config.{name}"))) == {}
