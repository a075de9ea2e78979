"""A method of a user's own is told nothing that is not so, and can do what the project's methods can."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

from tests import ROOT
from tests.starter import starter

PAGE = ROOT / "docs" / "architecture.md"
BLOCKS = re.findall(
    r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
)
METHOD, NORM, NETWORK = BLOCKS  # as the page shows them
WITHOUT, WITH = METHOD.replace(", record=RECORD", ""), METHOD
LINE = (
    "--keyword_file words.py --keyword cifar10,origin,cbsa,fixed --dataset fake --fake_size 16 -b 8 --width_alpha 0.1 "
    "--input_size 8 --fm_enable --wt_enable --fm_bit 3 --wt_bit 3 --epochs 1"
)


Start = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """A run with a method: status, output and errors."""
    folder = tmp_path_factory.mktemp("own")
    with starter(folder, tmp_path_factory.mktemp("output")) as program:

        def run(options: str, method: str, line: str = LINE, policy: str = "") -> tuple[int, str, str]:
            (folder / "words.py").write_text(method, encoding="utf-8")
            (folder / "policy.yaml").write_text(policy, encoding="utf-8")
            done = program(ROOT / "main.py", f"{line} {options}")
            return done.returncode, done.stdout, done.stderr

        yield run


def warnings_of(output: str) -> list[str]:
    """The warnings of a dry run."""
    return [line for line in output.splitlines() if line.startswith("warning: ")]


def test_of_a_method_without_a_record_nothing_is_claimed(start: Start) -> None:
    """Whatever it reads, no option is said to be without effect; `proxquant` and `--re_init` are taken."""
    options = (
        "--fm_boundary 2 --wt_boundary 3 --fm_scale 0.3 --fm_ratio 0.5 --fm_half_range --fm_grad_scale paper "
        "--wt_quant_group 1 --wt_grad_type STE-scale --re_init --re_init_range mse --dry_run"
    )
    status, output, errors = start(options, WITHOUT)
    assert (status, errors) == (0, "")
    assert warnings_of(output) == []
    status, output, errors = start("--keyword cifar10,origin,cbsa,fixed,proxquant,fm_lsq --dry_run", WITHOUT)
    assert (status, errors, warnings_of(output)) == (0, "", [])
    assert "lsq 3 bit, 8 levels" in output and "fixed 3 bit, 8 levels" in output


def test_a_record_says_what_has_no_effect(start: Start) -> None:
    """The same words as of the project's methods."""
    options = "--fm_boundary 2 --fm_half_range --fm_ratio 0.5 --wt_grad_scale paper --re_init --dry_run"
    status, output, errors = start(options, WITH)
    assert (status, errors) == (0, "")
    assert warnings_of(output) == [
        "warning: --wt_grad_scale has no effect with fixed",
        "warning: --re_init has no effect: no quantizer of this network reads it",
        "warning: --fm_ratio has no effect with fixed",
    ]
    status, _, errors = start("--wt_grad_type STE-scale --dry_run", WITH)
    assert status == 2 and "--wt_grad_type STE-scale does not go with fixed; write none or STE" in errors


def test_it_is_trained_under_a_policy_and_audited(start: Start) -> None:
    """With other levels and another range on the way, and blended in."""
    policy = "iteration: [{at: [1], tag: fm, half_range: false, bit: 2}]"
    options = "--policy policy.yaml --keyword cifar10,origin,cbsa,fixed,proxquant --proxquant_step 1 --audit"
    status, output, errors = start(options, WITH, policy=policy)
    assert (status, errors) == (0, "")
    assert "audit: passed: 40 quantizers within their levels" in output
    assert "quant_activation: half_range True -> False" in output


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("    def quantize(", "    def quantise(", "TypeError: Fixed has no quantize(self, x)"),
        (
            '"fixed", "fm", "wt"',
            '"fixed", "fm", "wx"',
            "ValueError: fixed: a tag is one of fm, wt, ot, not 'wx'",
        ),
        ('"fixed", "fm"', '"lsq", "fm"', "ValueError: lsq is registered twice for fm"),
        (
            '"boundary", "half',
            '"bondary", "half',
            "ValueError: a method cannot read 'bondary'; did you mean boundary",
        ),
        ("from model.quant import", "from model.uniform import", "CHANGELOG.md lists what has moved"),
        (
            "class Fixed(Quantizer)",
            "class Fixed",
            "TypeError: Fixed must be a class of model.quant.Quantizer's",
        ),
        ("record=RECORD", "record={}", "TypeError: fixed: record must be a MethodRecord, not a dict"),
        (
            "grad_types=frozenset()",
            "grad_types={'STEE'}",
            "ValueError: grad_types: 'STEE' is none of none, STE",
        ),
    ],
)
def test_a_mistake_in_it_is_one_line(start: Start, old: str, new: str, said: str) -> None:
    status, output, errors = start("--dry_run", METHOD.replace(old, new))
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("main.py: error: --keyword_file words.py: ") and said in errors, errors


def test_messages_propose_it(start: Start) -> None:
    """Where the project's own methods are listed."""
    status, _, errors = start("--keyword cifar10,origin,cbsa", WITH)
    assert status == 2 and "xnor, reactnet or fixed to --keyword" in errors, errors
    line = "--keyword cifar10,origin,cbsa,dorefa --quant_loss 1"
    status, _, errors = start(line, WITH)
    assert status == 2 and re.search("are of another scale than the weights; use lsq, .* or fixed", errors)


@pytest.mark.parametrize(
    ("text", "options"),
    [(NORM, "--keyword cifar10,cbas,quick-bn"), (NETWORK, "--model tiny --keyword cifar10")],
)
def test_the_other_examples_of_the_page_run(start: Start, text: str, options: str) -> None:
    line = "--keyword_file words.py --dataset fake --input_size 32 --dry_run"
    status, output, errors = start(options, text, line)
    assert (status, errors) == (0, "") and "nothing trained" in output


def test_a_fault_of_its_own_is_not_blamed_on_the_size_of_images(start: Start) -> None:
    method = WITH.replace("return ClipSTE.apply(x, *self._levels(x))", "return x[:1, :1]")
    status, _, errors = start("--dry_run", method)
    assert (
        status == 2 and "through the network's or the method's own fault or because of --input_size" in errors
    ), errors
