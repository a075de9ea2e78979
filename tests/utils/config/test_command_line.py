"""The command line: options in every spelling, and mistakes that are answered at once."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from tests import ROOT
from utils.config.command_line import parse
from utils.config.option import Option
from utils.config.options import OPTIONS
from utils.config.resolve import read
from utils.errors import UserError


def a_value(option: Option) -> str:
    """A text that the option takes."""
    return option.choices[0] if option.choices else "1"


def written(option: Option, spelling: str) -> list[str]:
    """The option on a command line."""
    return [spelling] if option.kind is bool else [spelling, a_value(option)]


@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
def test_every_spelling(option: Option) -> None:
    """With `_`, with `-` and by its aliases: the same value."""
    for spelling in (f"--{option.name}", f"--{option.name.replace('_', '-')}", *option.aliases):
        arguments = written(option, spelling)
        given = parse(arguments)
        expected = True if option.kind is bool else option.kind(a_value(option))
        assert given[option.name] == expected
        assert given.explicit == {option.name}
        others = {name: o.default for name, o in OPTIONS.items() if name != option.name}
        assert {name: given[name] for name in others} == others


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("-j4 -g0", {"workers": 4, "device_ids": (0,)}),
        ("-b 32 -v 16 -s 5", {"batch_size": 32, "val_batch_size": 16, "save_freq": 5}),
        ("-v0", {"val_batch_size": 0}),
        ("-e -r", {"evaluate": True, "resume": True}),
        ("-er", {"evaluate": True, "resume": True}),
        ("-m resnet18", {"model": "resnet18"}),
        ("--arch resnet18", {"model": "resnet18"}),
        ("--arch=resnet18", {"model": "resnet18"}),
        ("--wd 5e-4", {"weight_decay": 5e-4}),
        ("--learning-rate 0.2", {"lr": 0.2}),
        ("-g 0 1 2", {"device_ids": (0, 1, 2)}),
        ("-g 0,1", {"device_ids": (0, 1)}),
        ("--fm-quant-group=-4", {"fm_quant_group": -4}),
        ("--fm-quant-group -4", {"fm_quant_group": -4}),
        ("--lr 0.1 --lr 0.3", {"lr": 0.3}),  # the last one counts
        ("--lr_custom_step 30,60", {"lr_custom_step": (30, 60)}),
        ("--mean 0.1,0.2,0.3", {"mean": (0.1, 0.2, 0.3)}),
        ("--keyword cifar10,cbas", {"keyword": ("cifar10", "cbas")}),
    ],
)
def test_forms(arguments: str, expected: dict[str, Any]) -> None:
    """Short forms, forms with `=`, lists, negative numbers and repetition."""
    given = parse(arguments.split())
    assert {name: given[name] for name in expected} == expected
    assert given.explicit == expected.keys()


def test_spaces_around_keywords_are_ignored() -> None:
    """And so are empty words."""
    assert parse(["--keyword", " cifar10 , cbas,"])["keyword"] == ("cifar10", "cbas")


def test_a_dash_in_a_value_is_kept() -> None:
    """Only the name of an option is rewritten."""
    given = parse(["--case=my-run", "--keyword", "label-smooth"])
    assert (given["case"], given["keyword"]) == ("my-run", ("label-smooth",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--opt_level O5", r"--opt_level O5 is not known; write one of O0, O1, O2, O3"),
        ("--epoch 3", r"unknown option --epoch: did you mean .*--epochs"),
        ("--fm-bits 3", r"unknown option --fm_bits: did you mean .*--fm_bit"),
        ("--fm_bits=3", r"unknown option --fm_bits=3: did you mean .*--fm_bit"),
        *(
            (
                f"{word} 5",
                f"unknown option {word}: the learning-rate warm-up is --wakeup_epoch, .* or --wakeup, [^-]*$",
            )
            for word in (
                "--warmup_epochs",
                "--warmup_steps",
                "--warm_up",
                "--lr_warmup_epochs",
                "--wakeup_epochs",
            )
        ),
        ("--zzzz", r"unknown option --zzzz: .*--help"),
        ("resnet18", r"'resnet18' is no option: .*--help"),
        ("--fm_bit two", r"--fm_bit two: write a whole number: bits of the activation quantizer"),
        ("--max_value 12bit", r"--max_value 12bit: write a whole number: value of 16-bit"),
        ("--lr", r"--lr needs a value: base learning rate"),
        ("--bits", r"--bits needs a value: .* 2, ternary, or weights/activations like 2/4"),
        ("--full_precision", r"--full_precision needs a value: .* patterns .* like layer3\.2\.\*"),
        ("--dry-run=true", r"--dry_run takes no value: write --dry_run alone, or leave it out"),
        (
            "--epochs 1 --balanced_sampler 1",
            r"'1' is no option: --balanced_sampler takes no value, leave 1 out",
        ),
        (
            "-b 64 --input_size 48 64",
            r"'64' is no option: --input_size takes one value, write --input_size 48x64",
        ),
        ("--lr_custom_step 2 3", r"'3' is no option: --lr_custom_step takes one value, with commas"),
        ("--case=a b", r"'b' is no option: --case takes one value"),
        ("--lr_custom_step 30,x", r"--lr_custom_step: .*'30,x'"),
        ("--dataset mnist", r"--dataset mnist is not known; write one of digits,"),
        ("--evaluate=1", r"--evaluate"),
        ("-g zero", r"--device_ids"),
        (
            "--epo 3",
            r"unknown option --epo",
        ),  # no abbreviations, which would change meaning with a new option
    ],
)
def test_mistakes(arguments: str, message: str) -> None:
    """One line that names the option and, where there are some, close names."""
    with pytest.raises(UserError, match=message) as caught:
        parse(arguments.split())
    assert "\n" not in str(caught.value)


def test_help_and_parsing_need_no_heavy_module() -> None:
    """The help, a mistake and a whole parse load the standard library alone; the help lists every option."""
    code = """
import contextlib, io, sys
import main
text = io.StringIO()
with contextlib.redirect_stdout(text), contextlib.redirect_stderr(io.StringIO()):
    try:
        main.main(["--help"])
    except SystemExit as stop:
        assert stop.code == 0, stop.code
    assert main.main(["--list_keywords"]) == 0
    assert main.main(["--fm_bit", "0"]) == 2
    main.resolve(main.parse(["--keyword", "cifar10,cbas,dorefa,lsq", "--fm_enable", "--wt_enable"]))
heavy = {"torch", "torchvision", "numpy", "sklearn", "yaml", "matplotlib", "PIL", "tqdm"} & set(sys.modules)
assert not heavy, heavy
print(text.getvalue())
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    entries = [" ".join(entry.split()) for entry in re.split(r"\n(?=  -)|\n\n", done.stdout)]
    for option in OPTIONS.values():
        spellings = [*option.aliases, f"--{option.name}"]
        (entry,) = [entry for entry in entries if re.match(rf"{spellings[0]}\b", entry)]
        assert all(re.search(rf"(^|[ ,]){spelling}\b", entry) for spelling in spellings)


@pytest.mark.parametrize("name", ["unresume_scope", "full_precision"])
def test_none_takes_names_back_and_stands_alone(name: str) -> None:
    line = f"--keyword cifar10,cbas,lsq --bits 2 --pretrained a.pth --{name} fc,layer1.*"
    assert parse(f"{line} --{name} none".split())[name] == ()
    with pytest.raises(UserError, match=f"--{name} none,fc: none stands alone"):
        read(f"{line} --{name} none,fc".split())
