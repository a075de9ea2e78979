"""Draw which room of the house imports which, as docs/images/house.png: `python benchmarks/house.py`.

A room is a folder below `utils/` or `model/`, or a file directly in them or at the top. Arrows point at what is
imported; those that follow from others are left out. Rooms stand in rows, each below all rooms that import it. An arrow
gets a place of its own in each row that it passes, so that none runs through a box.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Mapping
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Line

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "house.png"
COLOURS = {"main": "#f6d5b8", "tools": "#f6d5b8", "model": "#cfe3f3", "utils": "#d5ead9"}
SIDES = {"model": 0, "main": 0, "tools": 1, "utils": 1}  # left and right of a row
WIDTH, HEIGHT, ROW = 1.7, 0.46, 1.0  # of a box, and from a row to the next
BESIDE_BOX, BESIDE_ARROW = 0.3, 0.45  # free space beside a box, and between two arrows
TRIES = 400  # orders of the rows that are tried

Stop = tuple[str, str, int] | str  # an arrow's place in a row that it passes, or a room
Arrow = tuple[Stop, ...]  # what it passes, from above to below


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


def heights(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """The row of each room, from 0: one above the highest that it imports, but directly below who imports it."""
    order = tuple(TopologicalSorter(graph).static_order())
    rows: dict[str, int] = {}
    for name in order:
        rows[name] = max((rows[other] + 1 for other in graph[name]), default=0)
    for name in reversed(order):
        rows[name] = min(
            (rows[above] - 1 for above, others in graph.items() if name in others), default=rows[name]
        )
    return rows


def reduced(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The imports that do not follow from others."""

    def reaches(start: str, end: str) -> bool:
        return any(other == end or reaches(other, end) for other in graph[start])

    return {
        name: {other for other in others if not any(reaches(third, other) for third in others - {other})}
        for name, others in graph.items()
    }


def arrows_of(graph: Mapping[str, set[str]], rows: Mapping[str, int]) -> list[Arrow]:
    """Each import as the places that its arrow goes through."""
    return [
        (name, *((name, other, row) for row in range(rows[name] - 1, rows[other], -1)), other)
        for name, others in sorted(graph.items())
        for other in sorted(others)
    ]


def side(stop: Stop) -> int:
    """Left for `model`, right for `utils`; an arrow is on the side of what it points at."""
    return SIDES[(stop if isinstance(stop, str) else stop[1]).split(".")[0]]


def ordered(levels: list[list[Stop]], arrows: list[Arrow]) -> list[list[Stop]]:
    """The rows with their places in an order that lets few arrows cross."""
    parts = [pair for arrow in arrows for pair in pairwise(arrow)]
    near: dict[Stop, list[Stop]] = {}
    for above, below in parts:
        near.setdefault(above, []).append(below)
        near.setdefault(below, []).append(above)
    row_of = {stop: row for row, level in enumerate(levels) for stop in level}

    def cost(found: list[list[Stop]]) -> float:
        at = {stop: place for level in found for place, stop in enumerate(level)}
        total = 0.0
        for i, (above, below) in enumerate(parts):
            total += 0.02 * abs(at[above] - at[below])
            for other_above, other_below in parts[i + 1 :]:
                if row_of[above] == row_of[other_above]:
                    total += (at[above] - at[other_above]) * (at[below] - at[other_below]) < 0
        return total

    best, lowest, chance = levels, float("inf"), random.Random(0)
    for _ in range(TRIES):
        found = [sorted(level, key=lambda stop: (side(stop), chance.random())) for level in levels]
        for sweep in range(8):
            at = {stop: place / len(level) for level in found for place, stop in enumerate(level)}
            for row in (range(len(found)), reversed(range(len(found))))[sweep % 2]:
                found[row].sort(
                    key=lambda stop: (side(stop), sum(at[s] for s in near[stop]) / len(near[stop]))
                )
                at |= {stop: place / len(found[row]) for place, stop in enumerate(found[row])}
        if (price := cost(found)) < lowest:
            best, lowest = [list(level) for level in found], price
    return best


def positions(levels: list[list[Stop]], arrows: list[Arrow]) -> dict[Stop, tuple[float, float]]:
    """Where rooms and arrows are: near what they are connected with, and apart from their neighbours."""
    near: dict[Stop, list[Stop]] = {}
    for arrow in arrows:
        for above, below in pairwise(arrow):
            near.setdefault(above, []).append(below)
            near.setdefault(below, []).append(above)

    def apart(left: Stop, right: Stop) -> float:
        boxes = isinstance(left, str) + isinstance(right, str)
        return BESIDE_ARROW if boxes == 0 else WIDTH * boxes / 2 + BESIDE_BOX

    across: dict[Stop, float] = {}
    for level in levels:
        for place, stop in enumerate(level):
            across[stop] = across[level[place - 1]] + apart(level[place - 1], stop) if place else 0.0
        middle = (across[level[0]] + across[level[-1]]) / 2
        across |= {stop: across[stop] - middle for stop in level}
    for _ in range(300):
        for level in levels:
            for place, stop in enumerate(level):
                wanted = sum(across[other] for other in near[stop]) / len(near[stop])
                low = across[level[place - 1]] + apart(level[place - 1], stop) if place else -1e9
                high = (
                    across[level[place + 1]] - apart(stop, level[place + 1])
                    if place + 1 < len(level)
                    else 1e9
                )
                across[stop] = min(max(wanted, low), max(low, high))
    return {stop: (across[stop], ROW * row) for row, level in enumerate(levels) for stop in level}


def line_of(points: list[tuple[float, float]]) -> Line:
    """A line from the bottom of a box to the top of another, bent between rows and upright beside boxes."""
    (x, y), *passed, last = points
    path, codes = [(x, y - HEIGHT / 2)], [Line.MOVETO]
    for to_x, to_y in (*passed, last):
        x, y = path[-1]
        half = (y + to_y + HEIGHT / 2) / 2
        path += [(x, half), (to_x, half), (to_x, to_y + HEIGHT / 2)]
        codes += [Line.CURVE4] * 3
        if (to_x, to_y) != last:
            path.append((to_x, to_y - HEIGHT / 2))
            codes.append(Line.LINETO)
    return Line(path, codes)


def draw(graph: Mapping[str, set[str]], path: Path) -> None:
    """Draw rooms in rows, and arrows between them."""
    graph = reduced(graph)
    rows = heights(graph)
    arrows = arrows_of(graph, rows)
    levels: list[list[Stop]] = [[] for _ in range(max(rows.values()) + 1)]
    for name, row in sorted(rows.items()):
        levels[row].append(name)
    for arrow in arrows:
        for stop in arrow:
            if not isinstance(stop, str):
                levels[stop[2]].append(stop)
    at = positions(ordered(levels, arrows), arrows)

    left, right = (edge(x for x, _ in at.values()) for edge in (min, max))
    figure = Figure(figsize=(right - left + WIDTH + 0.4, ROW * len(levels)), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(left - WIDTH / 2 - 0.2, right + WIDTH / 2 + 0.2)
    axes.set_ylim(-ROW / 2, ROW * (len(levels) - 0.5))
    # Several arrows leave and reach a box side by side, in the order in which they come.
    leaving: dict[Stop, list[Arrow]] = {}
    reaching: dict[Stop, list[Arrow]] = {}
    for arrow in arrows:
        leaving.setdefault(arrow[0], []).append(arrow)
        reaching.setdefault(arrow[-1], []).append(arrow)

    def shifted(arrow: Arrow, all_of_it: list[Arrow], next_stop: int) -> float:
        beside = sorted(all_of_it, key=lambda one: at[one[next_stop]][0])
        return 0.28 * (beside.index(arrow) - (len(beside) - 1) / 2)

    for arrow in arrows:
        (x, y), *passed, (to_x, to_y) = (at[stop] for stop in arrow)
        x += shifted(arrow, leaving[arrow[0]], 1)
        to_x += shifted(arrow, reaching[arrow[-1]], -2)
        axes.add_patch(
            FancyArrowPatch(
                path=line_of([(x, y), *passed, (to_x, to_y)]), arrowstyle="-|>", mutation_scale=10,
                color="#6b6b6b", linewidth=1.3, zorder=1,
            )
        )  # fmt: skip
    for name in rows:
        x, y = at[name]
        box = FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2), WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=COLOURS[name.split(".")[0]], edgecolor="#555555", linewidth=0.8, zorder=2,
        )  # fmt: skip
        axes.add_patch(box)
        text = name.replace(".", "/") + (".py" if is_file(name) else "/")
        axes.text(x, y, text, ha="center", va="center", fontsize=10, zorder=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def is_file(name: str) -> bool:
    """Whether a room is a file, not a folder."""
    return (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()


def main() -> None:
    """Draw the picture, and say where it is."""
    draw(rooms(import_graph()), PICTURE)
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
