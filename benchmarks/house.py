"""Draw which room of the house imports which, in docs/architecture.md: `python benchmarks/house.py`.

A room is a folder below `utils/` or `model/`, or a file directly in them or at the top. Arrows point at what is
imported; those that follow from others are left out. The picture is text in Mermaid's language, which code hosts draw;
`tests/test_house.py` compares it with the imports.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PICTURE = re.compile(r"^```mermaid\n.*?^```\n", re.MULTILINE | re.DOTALL)  # in the page
COLOURS = {"top": "#f6d5b8", "model": "#cfe3f3", "utils": "#d5ead9"}


def sources() -> dict[str, Path]:
    """The modules that are run or imported, by name."""
    files = [
        ROOT / "main.py",
        ROOT / "tools.py",
        *(ROOT / "utils").rglob("*.py"),
        *(ROOT / "model").rglob("*.py"),
    ]
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it, also for its types alone, and those that it names as text.

    Raises:
        ValueError: it imports in another way than `from ... import`, which `setup.py` can put below one name.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            plain = [alias.name for alias in node.names if alias.name.split(".")[0] in ("model", "utils")]
            if plain:
                raise ValueError(f"{path} imports {plain[0]}: write 'from ... import'")
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path} has a relative import, which cannot cross from model to utils")
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            constants = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            found |= {value for value in constants if isinstance(value, str)}
    return found


def import_graph() -> dict[str, set[str]]:
    """Each module, and those of the project that it imports."""
    modules = sources()
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = imported(path) & modules.keys()
        # `from utils.data import loader` imports the module, not only its folder.
        graph[name] = {each for each in found if not any(other.startswith(f"{each}.") for other in found)} - {
            name
        }
    return graph


def rooms(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The same of folders below `utils` and `model`, and of files that are in none."""

    def room(name: str) -> str:
        return ".".join(name.split(".")[:2])

    found: dict[str, set[str]] = {}
    for name, others in graph.items():
        if name not in ("utils", "model"):
            found.setdefault(room(name), set()).update({room(other) for other in others} - {room(name)})
    return found


def reduced(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The imports that do not follow from others."""

    def reaches(start: str, end: str) -> bool:
        return any(other == end or reaches(other, end) for other in graph[start])

    return {
        name: {other for other in others if not any(reaches(third, other) for third in others - {other})}
        for name, others in graph.items()
    }


def picture(graph: Mapping[str, set[str]]) -> str:
    """The rooms and their arrows: a block of the page in Mermaid's language."""
    lines = ["```mermaid", "flowchart TD"]
    for name in sorted(graph):
        folder = name.split(".")[0] if "." in name else "top"
        lines.append(f'    {name}["{label(name)}"]:::{folder}')
    lines += [
        f"    {name} --> {other}"
        for name, others in sorted(reduced(graph).items())
        for other in sorted(others)
    ]
    lines += [f"    classDef {folder} fill:{fill},stroke:#555,color:#000" for folder, fill in COLOURS.items()]
    return "\n".join([*lines, "```", ""])


def label(name: str) -> str:
    """The path of a room, from the repository's folder."""
    path = name.replace(".", "/")
    return f"{path}/" if (ROOT / path).is_dir() else f"{path}.py"


def main() -> None:
    """Write the picture into the page, and say where it is."""
    text = picture(rooms(import_graph()))
    PAGE.write_text(PICTURE.sub(lambda _: text, PAGE.read_text(encoding="utf-8"), count=1), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
