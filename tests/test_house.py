"""The rule of the house: utils serves, model is served, main conducts (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from benchmarks.house import PAGE, PICTURE, import_graph, imported, picture, rooms, sources
from tests import ROOT
from utils.config.methods import PROJECT

LONGEST = 450  # lines of a Python file
NAME_METHODS = ("utils/config/methods.py", "utils/config/vocabulary.py")  # the records, and the keywords
KNOW_CLASSES = ("model/quant.py", "model/quantizers/")  # may import the methods' own files
ELSEWHERE = ("tests", "exp", "weights", "data", "build")  # folders that are no code, or tests


def round_trip(graph: Mapping[str, set[str]]) -> str:
    """A circle of imports; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(reversed(error.args[1]))
    return ""


def faults_of(place: str, path: Path) -> list[str]:
    """How a file breaks the rules about other programs' parts and about methods' names."""
    found, own = [], place.removeprefix("model/quantizers/").removesuffix(".py")
    outside = imported(path) & {"main", "tools", "tests", "benchmarks"}
    if place.startswith(("utils/", "model/")):
        found += [f"{place} imports {name}" for name in sorted(outside)]
    if not place.startswith(KNOW_CLASSES):
        papers = {f"model.quantizers.{method}" for method in PROJECT}
        found += [f"{place} imports {name}" for name in sorted(imported(path) & papers)]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        texts = [node] if isinstance(node, ast.Constant) else []
        if place in NAME_METHODS:  # they may name methods, but nobody compares
            texts = [each for each in ast.walk(node) if isinstance(each, ast.Constant)] * isinstance(
                node, ast.Compare
            )
        for text in texts:
            words = set(re.split(r"\W+", text.value)) - {""} if isinstance(text.value, str) else set()
            if words and words <= PROJECT and words != {own}:
                found.append(f"{place}:{text.lineno}: {text.value!r}")
    return found


def test_imports_go_down_only() -> None:
    graph = import_graph()
    order = {"utils": 0, "model": 1, "main": 2, "tools": 2}
    upwards = [
        f"{name} -> {other}"
        for name, others in graph.items()
        for other in others
        if order[name.split(".")[0]] < order[other.split(".")[0]]
    ]
    assert not upwards
    assert round_trip(graph) == "" and round_trip(rooms(graph)) == ""


def test_the_picture_shows_the_imports() -> None:
    assert PICTURE.findall(PAGE.read_text("utf-8")) == [picture(rooms(import_graph()))], (
        "run python benchmarks/house.py"
    )


def test_no_file_is_long() -> None:
    files = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ELSEWHERE]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]
    assert len(files) > 100
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in files}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_methods_are_named_in_their_records_and_their_own_files_alone() -> None:
    """Who must know what a method does asks its record or its quantizer."""
    assert not [
        fault for path in sources().values() for fault in faults_of(path.relative_to(ROOT).as_posix(), path)
    ]


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("utils/x.py", "same = method == 'lsq'"),
        ("model/x.py", "same = method in ('lsq', 'pact')"),
        ("model/x.py", "same = method in 'lsq pact'.split()"),
        ("model/x.py", "table = {'xnor': 1}"),
        ("utils/report/lsq.py", "same = method == 'lsq'"),
        ("utils/config/vocabulary.py", "same = method == 'lsq'"),
        ("model/watch/x.py", "from model.quantizers.lsq import LSQ"),
        ("utils/x.py", "import main"),
        ("model/x.py", "def f():\n    from tests import oracle"),
    ],
)
def test_what_breaks_the_rule_is_seen(tmp_path: Path, place: str, line: str) -> None:
    (tmp_path / "x.py").write_text(line, encoding="utf-8")
    assert faults_of(place, tmp_path / "x.py")


@pytest.mark.parametrize("line", ["from .frame import Quantizer", "import model.quant"])
def test_imports_that_cannot_be_put_below_one_name_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.py").write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.py (has a relative import|imports model\.quant)"):
        imported(tmp_path / "x.py")
