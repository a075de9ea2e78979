"""Draws which room of the house imports which, into docs/images/house.png: `python benchmarks/house.py`.

A room is a folder below `utils/` or `model/`, or a file directly in them or at the top. Arrows point at what is
imported;
those that follow from others are left out. Rooms stand as low as their imports allow.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from graphlib import TopologicalSorter
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project is run from its folder

from tests.test_house import import_graph, rooms  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "house.png"
COLOURS = {"main": "#f6d5b8", "tools": "#f6d5b8", "model": "#cfe3f3", "utils": "#d5ead9"}
STEP_X, STEP_Y, WIDTH, HEIGHT = 2.05, 1.0, 1.75, 0.5


def heights(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """The row of each room, from 0: one above the highest that it imports."""
    rows: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        rows[name] = max((rows[other] + 1 for other in graph.get(name, ())), default=0)
    return rows


def reduced(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The imports that do not follow from others."""

    def reaches(start: str, end: str) -> bool:
        return any(other == end or reaches(other, end) for other in graph.get(start, ()))

    return {
        name: {other for other in others if not any(reaches(third, other) for third in others - {other})}
        for name, others in graph.items()
    }


def draw(graph: Mapping[str, set[str]], path: Path) -> None:
    """Draw rooms in rows, and arrows between them."""
    rows = heights(graph)
    levels = [sorted(name for name in rows if rows[name] == row) for row in range(max(rows.values()) + 1)]
    widest = max(map(len, levels))
    places: dict[str, tuple[float, float]] = {}
    for row, names in enumerate(levels):
        for column, name in enumerate(names):
            # Neighbouring rows are shifted, so that fewer arrows run through boxes.
            shift = 0.25 * (-1) ** row
            places[name] = STEP_X * (column + (widest - len(names)) / 2 + shift), STEP_Y * row
    figure = Figure(figsize=(2.1 * widest, 0.95 * len(levels)), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-STEP_X, STEP_X * widest)
    axes.set_ylim(-0.6, STEP_Y * len(levels) - 0.3)
    for name, others in reduced(graph).items():
        for other in others:
            (x, y), (to_x, to_y) = places[name], places[other]
            arrow = FancyArrowPatch(
                (x, y - HEIGHT / 2), (to_x, to_y + HEIGHT / 2), arrowstyle="-|>", mutation_scale=9,
                color="#777777", linewidth=0.9, connectionstyle=f"arc3,rad={0.06 if to_x >= x else -0.06}",
                zorder=1,
            )  # fmt: skip
            axes.add_patch(arrow)
    for name, (x, y) in places.items():
        colour = COLOURS[name.split(".")[0]]
        box = FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2), WIDTH, HEIGHT, boxstyle="round,pad=0.02,rounding_size=0.08",
            facecolor=colour, edgecolor="#555555", linewidth=0.8, zorder=2,
        )  # fmt: skip
        axes.add_patch(box)
        axes.text(x, y, name.replace(".", "/"), ha="center", va="center", fontsize=9, zorder=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Draw the picture, and say where it is."""
    draw(rooms(import_graph()), PICTURE)
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
