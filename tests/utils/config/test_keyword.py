"""The keyword registry: its own sanity, what a list of words means, and what users add."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from utils.config import keyword
from utils.config.keyword import Keyword, registry, resolve
from utils.config.recorded import to_dict
from utils.config.resolve import read
from utils.config.resolve.families import FAMILIES
from utils.config.schema import TAGS, Config, ModelConfig, QuantizerConfig
from utils.errors import UserError

RECORDS = registry()
# The first part of a dotted name -> where that part is in `Config`.
SECTIONS = {
    "model": "model",
    "block": "model.block",
    "stem": "model.stem",
    "quant": "model.quant",
    "data": "data",
    "loss": "loss",
    "run": "run",
    "probe": "probe",
}
# Fields of every quantizer that a word sets for all tags at once -> their name in `QuantizerConfig`.
OF_ALL_TAGS = {
    "quant.custom_update": "custom_update",
    "quant.closed_form": "closed_form",
    "quant.proxquant": "proxquant_step",
    "quant.progressive": "progressive",
}


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the registry, so that what a test registers ends with it."""
    monkeypatch.setattr(keyword, "_REGISTRY", registry())


def places(name: str) -> list[list[str]]:
    """Where a field is in `Config`, by the dotted name that keywords use: the names to walk along."""
    if name in OF_ALL_TAGS:
        return [["model", "quant", tag, OF_ALL_TAGS[name]] for tag in TAGS]
    first, _, rest = name.partition(".")
    return [[*SECTIONS[first].split("."), *rest.split(".")]]


def field_type(name: str) -> Any:
    """The type of a field of `Config` by the dotted name that keywords use; an AssertionError without one."""
    cls: Any = None
    for place in places(name):
        cls = Config
        for part in place:
            assert dataclasses.is_dataclass(cls) and part in {
                item.name for item in dataclasses.fields(cls)
            }, name
            cls = typing.get_type_hints(cls)[part]
    return cls


# The registry ------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_record(record: Keyword) -> None:
    """A record names known words and real fields, has one line of help and does something or says why not."""
    assert record.help and "\n" not in record.help and record.group
    for other in (*record.excludes, *(word for group in keyword.requirements(record) for word in group)):
        assert other in RECORDS
    assert set(record.families) <= set(FAMILIES)
    assert record.rank in (0, 1, 2)
    assert record.sets or record.group == "older configs" or record.name == "cba"  # which says what is so
    for name, value in record.sets.items():
        assert isinstance(value, field_type(name)), name  # a switch, too: `True` is an int


def test_field_walk_refuses_what_is_no_field() -> None:
    """The walk of the test above finds a misspelt name."""
    assert field_type("quant.fm.method") is str
    for name in ("quant.fm.mothod", "block.ordr", "model.block.order.x"):
        with pytest.raises(AssertionError):
            field_type(name)


def test_every_word_of_the_specification_is_declared() -> None:
    """Words of networks, quantizers and training."""
    words = """
    imagenet cifar10 cifar100 digits cbas cbsa cabs bacs bcas origin fix singleconv real_skip identify_norm
    DCHR fix_pooling preBN patch_preBN_stem group-net TResNetStem TResNetStemMaxPool NReLU PReLU ReLU6 LReLU
    group-norm static-bn
    freeze-bn reverse-bn instance-norm zir fixup bias prone no_prone_downsample bn_before_restore
    ReShapeResolution first-last dorefa pact lq xnor lsq fm_lsq wt_lsq gamma debug label-smooth proxquant
    custom-update closed_form probe lr-test
    """
    assert set(words.split()) <= RECORDS.keys()


@pytest.mark.parametrize("name", RECORDS)
def test_a_word_reaches_the_configuration(name: str) -> None:
    """Each word that is there, with what it requires, sets its own fields of the configuration."""
    needed = [group[0] for group in keyword.requirements(RECORDS[name])]
    config = read(["--model", "resnet18", "--keyword", ",".join([name, *needed])])
    assert config.keywords[-1 - len(needed)] == name
    everything = to_dict(config)
    for field, value in RECORDS[name].sets.items():
        for place in places(field):
            found = everything
            for part in place:
                found = found[part]
            assert bool(found) if field in OF_ALL_TAGS else found == value
        assert config.origins[field] == f"keyword {name}"


@pytest.mark.parametrize("name", ["", "two words", "a,b", "a\tb"])
def test_a_name_must_be_one_word(own_registry: None, name: str) -> None:
    """It could not be written on the command line."""
    with pytest.raises(UserError, match="cannot be a keyword"):
        keyword.register(Keyword(name=name, group="mine", help="mine"))


def test_a_name_is_taken_once(own_registry: None) -> None:
    """The second declaration is refused."""
    with pytest.raises(UserError, match="'cbas' is declared already"):
        keyword.register(Keyword(name="cbas", group="mine", help="mine"))


# Resolution --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["cbos"], ["unknown keyword 'cbos', did you mean ", "cbas"]),
        (["Origin"], ["'Origin', did you mean origin"]),
        (["NRelU"], ["'NRelU'", "NReLU"]),
        (["qqqqq"], ["'qqqqq', see --list_keywords"]),
        (
            ["padding_after_quant"],
            ["'padding_after_quant', which is an option: write --padding_after_quant"],
        ),
        (["cbas", "bacs"], ["cbas contradicts bacs"]),
        (
            ["cbas", "cbsa", "bcas"],
            ["cbas contradicts cbsa", "cbas contradicts bcas", "cbsa contradicts bcas"],
        ),
        (["lq", "pact"], ["lq contradicts pact"]),
        (["dorefa", "pact"], ["dorefa contradicts pact"]),
        (["pact", "lsq"], ["pact contradicts lsq"]),
        (["lsq", "pact"], ["lsq contradicts pact"]),
        (["gamma", "dorefa"], ["gamma contradicts dorefa"]),
        (["dorefa", "gamma"], ["dorefa contradicts gamma"]),
        (["cifar10", "digits"], ["cifar10 contradicts digits"]),
        (["imagenet", "cifar100"], ["imagenet contradicts cifar100"]),
        (["wt_lsq"], ["wt_lsq needs dorefa or pact"]),
        (["wt_bin"], ["wt_bin needs dorefa or pact"]),
        (
            ["cbos", "cbas", "bacs", "gamma", "dorefa", "wt_bni"],
            ["'cbos'", "cbas contradicts bacs", "gamma contradicts dorefa", "'wt_bni', did you mean wt_bin"],
        ),
    ],
)
def test_mistakes_of_a_list(words: list[str], messages: list[str]) -> None:
    """All of them at once, in one line that says which words."""
    with pytest.raises(UserError, match=r"^--keyword: ") as caught:
        resolve(words, "resnet")
    for message in messages:
        assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "fm", "wt", "ot"),
    [
        (["dorefa"], "dorefa", "dorefa", "dorefa"),
        (["pact"], "pact", "pact", "pact"),
        (["lsq"], "lsq", "lsq", "lsq"),
        (["dorefa", "lsq"], "lsq", "lsq", "lsq"),
        (["lsq", "dorefa"], "lsq", "lsq", "lsq"),  # the rank counts, not the place
        (["dorefa", "wt_lsq"], "dorefa", "lsq", "dorefa"),
        (["wt_lsq", "fm_lsq", "dorefa"], "lsq", "lsq", "dorefa"),
        (["ot_lsq", "pact"], "pact", "pact", "lsq"),
    ],
)
def test_a_refinement_wins_over_its_base(words: list[str], fm: str, wt: str, ot: str) -> None:
    """`dorefa` < `lsq` < `wt_lsq`, in any order."""
    fields = resolve(words, "resnet").fields
    assert [fields[f"quant.{tag}.method"] for tag in TAGS] == [fm, wt, ot]


def test_origins_name_the_word_that_won() -> None:
    """Not the one it overrode."""
    origins = resolve(["wt_lsq", "dorefa", "cbsa"], "resnet").origins
    assert origins == {
        "quant.fm.method": "dorefa",
        "quant.wt.method": "wt_lsq",
        "quant.ot.method": "dorefa",
        "block.order": "cbsa",
    }


def test_a_word_twice_is_one_word() -> None:
    """It does not contradict itself."""
    assert resolve(["cbas", "cbas"], "resnet").fields == {"block.order": "cbas"}


def test_equal_values_do_not_contradict(own_registry: None) -> None:
    """Two words may agree."""
    for name in ("one", "two"):
        keyword.register(Keyword(name=name, group="mine", help="mine", sets={"extra.x": 1}))
    assert resolve(["one", "two"], "resnet").fields == {"extra.x": 1}


def test_a_word_without_effect_is_a_warning() -> None:
    """Words of the flexible networks do nothing to torchvision's."""
    words = ["origin", "dorefa", "cbas"]
    assert resolve(words, "resnet").warnings == ()
    warnings = resolve(words, "pytorch").warnings
    assert [[word for word in words if f" {word} " in warning] for warning in warnings] == [
        ["origin"],
        ["cbas"],
    ]
    assert all("no effect" in warning for warning in warnings)


# Words of the user's own -------------------------------------------------------------------------

GOOD = """
from utils.config.keyword import Keyword, register

register(Keyword(
    name="lucky", group="mine", help="a factor of mine", sets={"extra.factor": 7, "extra.names": ("a", "b")},
    excludes=("digits",), requires=(("cifar10", "cifar100"),), families=("resnet",),
))
register(Keyword(name="my-order", group="mine", help="the program's own field", sets={"block.order": "cabs"}))
"""


def write(folder: Path, text: str) -> str:
    """A file of keywords."""
    path = folder / "my_words.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_users_word_arrives_everywhere(own_registry: None, tmp_path: Path) -> None:
    """In the network's and every quantizer's `extra`, in the list, under the rules of all words."""
    config = read(["--keyword_file", write(tmp_path, GOOD), "--keyword", "lucky,cifar10"])
    expected = {"factor": 7, "names": ("a", "b")}
    assert config.model.extra == expected
    quant = config.model.quant
    assert [part.extra for part in (quant.fm, quant.wt, quant.ot)] == [expected] * 3
    assert config.origins["extra.factor"] == "keyword lucky"
    assert to_dict(config)["model"]["extra"] == {"factor": 7, "names": ["a", "b"]}
    assert "lucky" in keyword.table() and "a factor of mine" in keyword.table()
    with pytest.raises(UserError, match=r"lucky contradicts digits.*lucky needs cifar10 or cifar100"):
        resolve(["lucky", "digits"], "resnet")
    with pytest.raises(UserError, match="'luky', did you mean lucky"):
        resolve(["luky"], "resnet")
    with pytest.raises(UserError, match="my-order contradicts cbas"):
        resolve(["my-order", "cbas"], "resnet")
    assert resolve(["my-order"], "resnet").fields == {"block.order": "cabs"}
    assert "no effect" in resolve(["lucky", "cifar10"], "pytorch").warnings[0]


def test_without_a_users_words_extra_is_empty() -> None:
    """The default."""
    config = read(["--keyword", "cifar10"])
    assert config.model == ModelConfig(num_classes=10, stem=config.model.stem) and config.model.extra == {}
    assert config.model.quant.wt == QuantizerConfig(tag="wt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise ValueError('out of\\nluck')", "ValueError: out of luck"),
        ("import sys; sys.exit('gone')", "SystemExit: gone"),
        ("register(", "SyntaxError: .*never closed"),
        ("import no_such_module_at_all", "ModuleNotFoundError: .*no_such_module_at_all"),
        (
            "from utils.config.keyword import Keyword, register\nregister(Keyword(name='x'))",
            "TypeError: .*help",
        ),
        (GOOD.replace("lucky", "cbas", 1), "'cbas' is declared already"),
        (GOOD.replace("lucky", "a b", 1), "'a b' cannot be a keyword"),
        (
            GOOD.replace("block.order", "block.ordr"),
            "my-order sets block.ordr, which nothing reads; write block.order",
        ),
        (
            GOOD.replace("extra.factor", "factor"),
            "lucky sets factor, which nothing reads; write extra.factor",
        ),
        (
            GOOD.replace(": 7", ": print"),
            "lucky sets extra.factor to <built-in function print>.*cannot be saved",
        ),
        (GOOD.replace(": 7", ": {1: 2}"), "lucky sets extra.factor to .*cannot be saved"),
    ],
)
def test_mistakes_of_a_file(own_registry: None, tmp_path: Path, text: str, message: str) -> None:
    """One line that names the file and what is wrong in it."""
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=message) as caught:
        keyword.load_file(path)
    assert str(caught.value).startswith(f"--keyword_file {path}: ") and "\n" not in str(caught.value)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    """A folder is no file either."""
    for path in (tmp_path / "none.py", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            keyword.load_file(str(path))


# The edge ----------------------------------------------------------------------------------------

MODEL_FILES = sorted((ROOT / "model").rglob("*.py"))


def test_folder_is_a_second_name_of_imagenet() -> None:
    """As it is of the data set; nobody's own keyword takes it."""
    for line in ("--dataset folder --keyword {},cbas,origin", "--keyword {},cbas --distill_teacher resnet20 "
                 "--distill_pretrained a.pth --distill_keyword {},cbas"):  # fmt: skip
        one, two = (read(line.format(word, word).split()) for word in ("folder", "imagenet"))
        assert one == two and "imagenet" in one.keywords
    with pytest.raises(UserError, match="second name of the keyword imagenet"):
        keyword.register(keyword.Keyword(name="folder", group="mine", help="mine"))


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.name)
def test_networks_see_no_keywords(path: Path) -> None:
    """`model/` reads typed fields: none of its identifiers names keywords, and no word is looked for."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case (
                ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.FunctionDef(name=name)
            ):
                assert "keyword" not in name.lower(), f"line {node.lineno}: {name}"
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                modules = [alias.name for alias in aliases]
                modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not any("keyword" in module for module in modules), f"line {node.lineno}"
            case ast.Compare(left=ast.Constant(value=str(text)), ops=[ast.In() | ast.NotIn()]):
                assert text not in RECORDS or not RECORDS[text].sets, (
                    f"line {node.lineno}: {text!r} is looked for"
                )


def test_there_are_networks_to_look_at() -> None:
    """The test above has files."""
    assert {"resnet.py", "quant.py", "build.py"} <= {path.name for path in MODEL_FILES}


# The pages ---------------------------------------------------------------------------------------


def test_the_table_lists_every_word_under_its_group() -> None:
    """Once, with its help, what it needs and excludes, and whether it is there."""
    lines = keyword.table().splitlines()
    groups = [line for line in lines if not line.startswith(" ")]
    assert groups == [f"{group}:" for group in dict.fromkeys(record.group for record in RECORDS.values())]
    for record in RECORDS.values():
        (line,) = [line for line in lines if line.split()[:1] == [record.name] and line.startswith("  ")]
        assert record.help in line
        assert all(word in line for word in record.excludes)


def test_the_documented_table_is_not_stale() -> None:
    """docs/keywords.md is what `python -m utils.config.vocabulary` prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "utils.config.vocabulary"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    page = (ROOT / "docs" / "keywords.md").read_text(encoding="utf-8")
    assert page == done.stdout, "make it anew: python -m utils.config.vocabulary > docs/keywords.md"
    assert all(f"| `{name}` |" in page for name in RECORDS)


def test_list_keywords_prints_the_table(tmp_path: Path) -> None:
    """The words of the user's file with it, and no error."""
    command = [sys.executable, "-W", "error", str(ROOT / "main.py"), "--list_keywords"]
    command += ["--keyword_file", write(tmp_path, GOOD)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(keyword.table())
    assert "mine:\n  lucky" in done.stdout
