"""The rule of the house: utils serves, model is served, main conducts (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests import ROOT
from utils.config.methods import methods

LONGEST = 450  # lines of a Python file
# Besides its own file: where the records are, and where the keywords are declared.
MAY_NAME_METHODS = ("utils/config/methods.py", "utils/config/vocabulary.py")


def sources() -> dict[str, Path]:
    """The modules of the project that are run or imported, by name."""
    files = [
        ROOT / "main.py",
        ROOT / "tools.py",
        *(ROOT / "utils").rglob("*.py"),
        *(ROOT / "model").rglob("*.py"),
    ]
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


def imported(name: str, path: Path, known: set[str]) -> set[str]:
    """The modules of the project that a module imports, wherever in it, also for its types alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            plain = [alias.name for alias in node.names if alias.name.split(".")[0] in ("model", "utils")]
            assert not plain, (
                f"{name} imports {plain}: write 'from ... import', which setup.py puts below one name"
            )
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & known) or {str(node.module)}
    return (found & known) - {name}


def import_graph() -> dict[str, set[str]]:
    """Each module, and those that it imports."""
    modules = sources()
    return {name: imported(name, path, set(modules)) for name, path in modules.items()}


def rooms(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The same of folders below `utils` and `model`, and of files that are in none."""

    def room(name: str) -> str:
        return ".".join(name.split(".")[:2])

    found: dict[str, set[str]] = {}
    for name, others in graph.items():
        if name not in ("utils", "model"):
            found.setdefault(room(name), set()).update({room(other) for other in others} - {room(name)})
    return found


def round_trip(graph: Mapping[str, set[str]]) -> str:
    """A circle of imports; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(reversed(error.args[1]))
    return ""


def test_imports_go_down_only() -> None:
    graph = import_graph()
    order = {"utils": 0, "model": 1, "main": 2, "tools": 2}
    upwards = [
        f"{name} -> {other}" for name, others in graph.items() for other in others
        if order[name.split(".")[0]] < order[other.split(".")[0]]
    ]  # fmt: skip
    assert not upwards
    assert round_trip(graph) == "" and round_trip(rooms(graph)) == ""


def test_no_file_is_long() -> None:
    files = [*sources().values(), *(ROOT / "benchmarks").glob("*.py")]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text("utf-8").splitlines()) for file in files}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_methods_are_named_in_their_records_and_their_own_files_alone() -> None:
    """Who must know what a method does asks its record or its quantizer."""
    known, found = methods(), []
    for path in sources().values():
        if str(path.relative_to(ROOT)) in MAY_NAME_METHODS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in known and path.stem != node.value:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}")
    assert not found
