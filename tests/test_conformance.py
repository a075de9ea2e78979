"""The published cases hold, and the checker fails where it should."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import ROOT
from tests.conformance import Result, fill, load_cases, main, run_case, state_value
from utils.errors import UserError

FOLDER = ROOT / "tests" / "conformance"
CASES = {case["name"]: case for case in load_cases(FOLDER)}

Arrays = dict[str, np.ndarray]


@pytest.mark.parametrize("name", CASES)
def test_published_case(name: str) -> None:
    result = run_case(FOLDER, CASES[name])
    assert result.passed, "\n".join(result.problems)


def test_every_array_belongs_to_a_case() -> None:
    assert {path.stem for path in FOLDER.glob("*.npz")} == CASES.keys()


# The checker itself --------------------------------------------------------------------------------


def altered(
    tmp_path: Path,
    name: str,
    arrays: Callable[[Arrays], object] = lambda arrays: None,
    case: Callable[[dict[str, Any]], object] = lambda case: None,
) -> Result:
    """The result of a copy of the case `name` after `arrays` and `case` have changed its parts."""
    record = json.loads(json.dumps(CASES[name]))
    with np.load(FOLDER / f"{name}.npz") as stored:
        data = {key: stored[key].copy() for key in stored.files}
    arrays(data)
    case(record)
    np.savez(tmp_path / f"{name}.npz", **data)
    return run_case(tmp_path, record)


def element(key: str, add: float, count: int = 1) -> Callable[[Arrays], object]:
    """Add to the first elements of an array."""

    def change(arrays: Arrays) -> None:
        arrays[key].reshape(-1)[:count] += np.float32(add)

    return change


def scaled(key: str, factor: float) -> Callable[[Arrays], object]:
    """Multiply an array."""

    def change(arrays: Arrays) -> None:
        arrays[key] *= np.float32(factor)

    return change


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    """Rename an entry of arrays or parameters."""
    return lambda entries: entries.update({new: entries.pop(old)})


def argument(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    """Replace within the arguments."""
    return lambda case: case.update(argv=[word.replace(old, new) for word in case["argv"]])


UNALTERED = ("lsq-fm-2", "lsq-wt-2-perchannel", "resnet20-lsq-2bit")


@pytest.mark.parametrize("name", UNALTERED)
def test_a_copy_passes(tmp_path: Path, name: str) -> None:
    result = altered(tmp_path, name)
    assert result.passed
    assert result.line().startswith(f"ok    {name}: ")


STEP = 1.3714132 / 3  # two bits in [0, clip_val] of the case lsq-fm-2


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("lsq-fm-2", scaled("y", 1 + 5e-5), "y deviates"),
        ("lsq-fm-2", element("y", STEP, count=2), "y deviates"),  # 2 of 1152 are more than 1 in 1000
        ("lsq-fm-2", element("y", 2.5 * STEP), "y deviates"),  # not a neighbouring level
        ("lsq-fm-2", element("y", np.nan), "y deviates"),
        ("lsq-fm-2", lambda a: a.update(y=a["y"][:2]), "y has the shape"),
        ("lsq-fm-2", scaled("gx", 1 + 5e-4), "gx deviates"),
        ("lsq-fm-2", element("gx", 0.1, count=2), "gx deviates"),
        ("lsq-fm-2", scaled("grad.clip_val", 1 + 5e-4), "grad.clip_val deviates"),
        ("lsq-fm-2", scaled("param.clip_val", 1.01), "deviates"),
        ("lsq-fm-2", renamed("param.clip_val", "param.step"), "clip_val is not a published one"),
        ("lsq-fm-2", lambda a: a.update({"param.step": np.ones(1)}), "no parameter is called step"),
        ("lsq-fm-2", scaled("param.level_num", 2), "level_num is [4]"),
        ("lsq-fm-2", lambda a: a.update({"initial.clip_val": np.float32([1.1])}), "initial.clip_val"),
        ("lsq-fm-2", lambda a: a.update({"after.clip_val": np.float32([1.1])}), "after.clip_val"),
        ("lsq-wt-2-perchannel", element("param.clip_val", 0.1), "deviates"),
        ("lsq-wt-2-perchannel", scaled("grad.clip_val", -1), "grad.clip_val deviates"),
        ("lsq-wt-2", lambda a: a.update({"param.clip_val": np.float32([1.0])}), "clip_val has the shape"),
        ("resnet20-fp-official", scaled("logits", 1.002), "logits deviates"),
        ("resnet20-fp-official", lambda a: a.update(logits=a["logits"][:, :-1]), "logits deviates"),
        ("resnet20-fp-official", element("gx0", 1.0), "gx0 deviates"),
    ],
)  # fmt: skip
def test_altered_arrays_fail(
    tmp_path: Path, name: str, change: Callable[[Arrays], object], problem: str
) -> None:
    result = altered(tmp_path, name, arrays=change)
    assert not result.passed
    assert problem in "; ".join(result.problems)
    assert result.line().startswith(f"FAIL  {name}: ")


def in_parameters(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda case: change(case["parameters"])


def gradient(name: str, norm: float = 1.0, inner: float = 1.0) -> Callable[[dict[str, Any]], object]:
    """Multiply what is recorded of a gradient."""

    def change(case: dict[str, Any]) -> None:
        case["grads"][name][0] *= norm
        case["grads"][name][1] *= inner

    return change


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("resnet20-fp-official", in_parameters(renamed("fc.bias", "fc.offset")), "no state is called fc.off"),
        ("resnet20-fp-official", in_parameters(lambda p: p.pop("fc.bias")), "fc.bias is not a published one"),
        ("resnet20-fp-official", in_parameters(lambda p: p.update({"fc.bias": [9]})), "fc.bias has the"),
        ("resnet20-fp-official", lambda c: c.update(gx_norm=c["gx_norm"] * 1.01), "gx_norm deviates"),
        ("resnet20-fp-official", gradient("conv1.weight", norm=1.01), "norm of conv1.weight's gradient"),
        ("resnet20-fp-official", gradient("fc.bias", inner=-1), "probe of fc.bias's gradient"),
        ("resnet20-fp-official", lambda c: c["grads"].pop("fc.bias"), "fc.bias has a gradient"),
        ("resnet20-fp-official", lambda c: c["grads"].update(x=[0, 0]), "x is not a parameter"),
        ("resnet20-fp-official", argument("cbsa", "cabs"), "deviates"),
        ("resnet20-fp-official", argument("fix_pooling", "fix_poling"), "did you mean fix_pooling"),
        ("resnet20-fp-official", argument("resnet20", "resnet32"), "the state layer1.3"),
        ("resnet20-lsq-2bit", argument("var-mean", "none"), "deviates"),
        ("resnet20-lsq-2bit", argument(",lsq", ""), "no state is called"),
        ("lsq-fm-2", argument("dorefa,lsq", "dorefa"), "no parameter is called clip_val"),
        ("lsq-fm-2", lambda c: c["argv"].remove("--fm_enable"), "--fm_enable is not given"),
        ("lsq-fm-2", lambda c: c["argv"].append("--fm_bits"), "unknown option --fm_bits"),
        ("lsq-fm-2", lambda c: c.update(kind="network"), "the kind is 'network'"),
        ("lsq-fm-2", lambda c: c.pop("tag"), "'tag' is not recorded"),
        ("lsq-fm-2", lambda c: c.update(name="lsq-fm-3"), "FileNotFoundError"),
        ("lsq-fm-2-group8", lambda c: c.update(shape=[1, 12, 1, 1]), "does not divide"),
    ],
)  # fmt: skip
def test_altered_records_fail(
    tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    result = altered(tmp_path, name, case=change)
    assert not result.passed
    assert problem in "; ".join(result.problems)


@pytest.mark.parametrize("direction", [1, -1])
def test_one_element_may_fall_to_the_neighbouring_level(tmp_path: Path, direction: int) -> None:
    def change(arrays: Arrays) -> None:
        middle = np.flatnonzero(np.isclose(arrays["y"].reshape(-1), STEP))[0]
        arrays["y"].reshape(-1)[middle] += np.float32(direction * STEP)

    assert altered(tmp_path, "lsq-fm-2", arrays=change).passed


def test_the_neighbouring_level_is_that_of_the_group(tmp_path: Path) -> None:
    """A step of the group with the widest levels is too far in the one with the narrowest."""

    def change(arrays: Arrays) -> None:
        clips = arrays["param.clip_val"].reshape(-1)
        narrow = int(clips.argmin())
        row = arrays["y"][narrow].reshape(-1)
        assert clips.max() > 1.1 * clips.min()
        row[row.argmin()] += 2 / 3 * clips.max()

    assert not altered(tmp_path, "lsq-wt-2-perchannel", arrays=change).passed


def test_a_case_without_gradients_is_compared_by_its_output(tmp_path: Path) -> None:
    def change(arrays: Arrays) -> None:
        for name in ("gy", "gx", "grad.clip_val"):
            del arrays[name]

    result = altered(tmp_path, "lsq-fm-2", arrays=change)
    assert result.passed
    assert result.deviations.keys() == {"y"}


def test_a_model_without_gradients_is_compared_by_its_logits(tmp_path: Path) -> None:
    def drop(case: dict[str, Any]) -> None:
        del case["grads"], case["gx_norm"]

    result = altered(tmp_path, "resnet20-fp-official", arrays=lambda a: a.pop("gx0"), case=drop)
    assert result.passed
    assert result.deviations.keys() == {"logits"}


@pytest.mark.parametrize("size", [(1, 8, 3, 5), (7, 8, 1, 1)])
def test_activations_of_any_size(tmp_path: Path, size: tuple[int, ...]) -> None:
    x = fill("any size", size)

    def change(arrays: Arrays) -> None:
        clip = arrays["param.clip_val"]
        inside = (x >= 0) & (x <= clip)
        y = clip * np.round(3 * np.clip(x / clip, 0, 1)) / 3
        slope = np.where(inside, (y - x) / clip, y / clip)
        arrays.update(x=x, y=y, gy=np.ones(size, np.float32), gx=inside.astype(np.float32))
        arrays["grad.clip_val"] = slope.sum(keepdims=True).reshape(1).astype(np.float32)

    assert altered(tmp_path, "lsq-fm-2", arrays=change).passed


def test_the_mode_reaches_the_quantizer(tmp_path: Path) -> None:
    """In training the counter goes from 1 to 2, in evaluation it stays."""
    for train, count in ((True, 2.0), (False, 1.0)):
        result = altered(
            tmp_path,
            "lsq-fm-2",
            arrays=lambda a, count=count: a.update({"after.iteration": np.float32([count])}),
            case=lambda c, train=train: c.update(train=train),
        )
        assert result.passed, result.problems


@pytest.mark.parametrize("train", [False, True])
def test_a_scale_of_closed_form_has_its_published_name(tmp_path: Path, train: bool) -> None:
    """The recorded case once more with a scale, which is called `basis`, beside a table."""

    def change(arrays: Arrays) -> None:
        codes, scale = arrays["y"].copy(), np.float32(0.8)
        arrays.update({"param.basis": np.full(1, scale), "param.auxil": np.zeros(1, np.float32)})
        if train:
            best = (arrays["x"] * codes).sum(dtype=np.float64) / (codes**2).sum(dtype=np.float64)
            scale = np.float32(0.9 * scale + 0.1 * best)
            arrays["after.basis"] = np.full(1, scale)
        for name in ("y", "gx", "grad.alpha0", "grad.alpha1", "grad.alpha2"):
            arrays[name] *= scale

    def keyword(case: dict[str, Any]) -> None:
        argument("non-uniform", "non-uniform,closed_form")(case)
        case["train"] = train

    result = altered(tmp_path, "nonuniform-fm-2", arrays=change, case=keyword)
    assert result.passed, result.problems
    assert ("after.basis" in result.deviations) == train


def test_a_model_of_closed_form_has_its_published_names(tmp_path: Path) -> None:
    def change(case: dict[str, Any]) -> None:
        argument("fm_non-uniform", "fm_non-uniform,closed_form")(case)
        places = [name.rpartition(".")[0] for name in case["parameters"] if name.endswith(".alpha0")]
        case["parameters"] |= {f"{place}.{name}": [1] for place in places for name in ("basis", "auxil")}

    result = altered(tmp_path, "pytorch-resnet18-nonuniform-2bit", case=change)
    assert result.passed, result.problems


def test_buffers_of_this_project_alone_may_be_there(tmp_path: Path) -> None:
    result = altered(tmp_path, "resnet20-lsq-2bit", case=lambda case: case["argv"].extend(["--stable", "1"]))
    assert result.passed, result.problems


def test_the_data_set_brings_its_keyword(tmp_path: Path) -> None:
    """As it does in a training."""

    def change(case: dict[str, Any]) -> None:
        argument("imagenet,", "")(case)
        case["argv"] += ["--dataset", "imagenet"]

    result = altered(tmp_path, "resnet18-fp-cbsa", case=change)
    assert result.passed, result.problems


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("bn.running_var", (3,), lambda v: 0.75 + 0.25 * abs(v)),
        ("conv.quant_weight.clip_val", (3, 1, 1, 1), lambda v: 0.75 + 0.25 * abs(v)),
        ("quant_activation.alpha2", (1,), lambda v: 0.75 + 0.25 * abs(v)),
        ("quant_weight.gamma", (4, 1, 1, 1), lambda v: 0.75 + 0.25 * abs(v)),
        ("layer1.0.scales.3", (1,), lambda v: 0.75 + 0.25 * abs(v)),
        ("layer1.0.fixup_scale", (1,), lambda v: 0.75 + 0.25 * abs(v)),
        ("layer1.0.fixup_bias1a", (1,), lambda v: 0.1 * v),
        ("bn.weight", (5,), lambda v: 1 + 0.1 * v),
        ("fc.bias", (5,), lambda v: 0.1 * v),
        ("bn.running_mean", (5,), lambda v: 0.1 * v),
        ("fc.weight", (2, 8), lambda v: v / 2),
        ("conv.weight", (2, 2, 2, 2), lambda v: v / 2),
    ],
)
def test_state_values(
    name: str, shape: tuple[int, ...], expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    value = state_value(name, shape)
    assert value is not None
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, expected(fill(name, shape).astype(np.float64)), rtol=1e-6)


@pytest.mark.parametrize("name", ["q.basis", "q.level_num", "q.iteration", "bn.num_batches_tracked"])
def test_tables_and_counters_are_kept(name: str) -> None:
    assert state_value(name, (1,)) is None


# The command ---------------------------------------------------------------------------------------


def command(python: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The real command in its own process."""
    return subprocess.run(
        [python, "-m", "tests.conformance", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def copy_cases(folder: Path, *names: str) -> None:
    for name in names:
        shutil.copy(FOLDER / f"{name}.npz", folder)
    (folder / "index.json").write_text(json.dumps([CASES[name] for name in names]))


def test_command(tmp_path: Path, interpreter: str) -> None:
    """It goes on after a failure; `test_exit_status_in_process` shows that it passes."""
    copy_cases(tmp_path, "lsq-fm-2", "pact-fm-2", "dorefa-fm-2", "resnet20-fp-official")
    (tmp_path / "lsq-fm-2.npz").write_bytes(b"PK\x03\x04 not whole")
    (tmp_path / "pact-fm-2.npz").unlink()
    done = command(interpreter, tmp_path)
    assert done.returncode == 1, done.stderr
    lines = [line.split()[:2] for line in done.stdout.splitlines()]
    assert lines[:-1] == [
        ["FAIL", "lsq-fm-2:"],
        ["FAIL", "pact-fm-2:"],
        ["ok", "dorefa-fm-2:"],
        ["ok", "resnet20-fp-official:"],
    ]
    assert done.stdout.splitlines()[-1] == "2 passed, 2 failed"


def test_compressed_arrays_that_are_damaged_fail(tmp_path: Path) -> None:
    with np.load(FOLDER / "lsq-fm-2.npz") as stored:
        np.savez_compressed(tmp_path / "lsq-fm-2.npz", **{key: stored[key] for key in stored.files})
    assert run_case(tmp_path, CASES["lsq-fm-2"]).passed
    file = tmp_path / "lsq-fm-2.npz"
    content = bytearray(file.read_bytes())
    begin = 30 + int.from_bytes(content[26:28], "little") + int.from_bytes(content[28:30], "little")
    content[begin] = 0xFF  # a kind of block that there is not
    file.write_bytes(content)
    assert run_case(tmp_path, CASES["lsq-fm-2"]).line().startswith("FAIL  lsq-fm-2: error: Error -3 while")


def test_what_is_no_case_is_a_line_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its reason, in front of a good case that still counts."""
    good = CASES["lsq-fm-2"]

    def changed(name: str, **new: Any) -> dict[str, Any]:
        return {key: value for key, value in {**good, "name": name, **new}.items() if value is not None}

    wrong = {
        "twice": (good | {"name": "twice"}, "2 cases have this name"),
        "kind": (changed("kind", kind="layer"), "the kind is 'layer', must be quantizer or model"),
        "no argv": (changed("no argv", argv=None), "it has no argv"),
        "text": (changed("text", argv="--keyword dorefa"), "its argv is not a list of options"),
        "help": (changed("help", argv=["--help"]), "its argv is not a list of options"),
        "word": (changed("word", argv=["--keyword", "dorfea", "--fm_enable"]), "dorfea"),
        "tag": (changed("tag", tag="zz"), "zz"),
        "shape": (changed("shape", shape=None), "'shape' is not recorded"),
        "off": (changed("off", argv=["--keyword", "dorefa,lsq"]), "--fm_enable is not given"),
    }
    for name in (*wrong, "lsq-fm-2"):
        shutil.copy(FOLDER / "lsq-fm-2.npz", tmp_path / f"{name}.npz")
    cases = [wrong["twice"][0], *(case for case, _ in wrong.values()), "no case", None, good]
    (tmp_path / "index.json").write_text(json.dumps(cases))
    assert main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(cases) + 1
    for line, reason in zip(lines[1:], (reason for _, reason in wrong.values()), strict=False):
        assert line.startswith("FAIL  ") and reason in line
    assert lines[-2].startswith("ok    lsq-fm-2: ") and lines[-1] == f"1 passed, {len(cases) - 1} failed"


@pytest.mark.parametrize("text", [None, "", "[]", "{}"])
def test_folder_without_cases(tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        load_cases(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "index.json" in capsys.readouterr().err


def test_exit_status_in_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_cases(tmp_path, "lsq-fm-2")
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 0 failed"
    np.savez(tmp_path / "lsq-fm-2.npz", y=np.zeros(1))
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 1 failed"


def test_a_result_without_a_comparison_has_not_passed() -> None:
    result = Result("empty")
    assert not result.passed
    assert result.line() == "FAIL  empty: nothing to compare"


@pytest.mark.parametrize("worst", [0.25, np.inf, np.nan])
def test_a_failure_shows_its_largest_deviation(worst: float) -> None:
    """Not only the first one that was too large; one that is no number is larger than all."""
    result = Result("case")
    for quantity, deviation in (("y", 2e-5), ("gx", worst), ("grad.clip_val", 3e-3)):
        result.compare(quantity, deviation, 1e-5)
    line = result.line()
    assert line.startswith(f"FAIL  case: {worst:.1e} gx; y deviates by 2.0e-05")
    assert line.endswith("(and 2 more)")


def test_filling_leaves_the_random_state_alone() -> None:
    np.random.seed(0)
    wanted = np.random.standard_normal(3)
    np.random.seed(0)
    fill("x", (100,))
    assert (np.random.standard_normal(3) == wanted).all()
