"""The pictures of the quantizers' transfer functions, and the pictures that the documentation shows."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.transfer import METHODS, Panel, curves, draw, main, quantizer
from tests import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")

PANELS = {
    f"{method}: {panel.title}": panel for method, rows in METHODS.items() for row in rows for panel in row
}


def panel(method: str, row: int, column: int) -> Panel:
    return METHODS[method][row][column]


def numbers(panel: Panel) -> dict[str, np.ndarray]:
    found = curves(panel)
    result = {"x": found.x.numpy(), "q": found.q.numpy(), "dq_dx": found.dq_dx.numpy()}
    return result if found.dq_dc is None else {**result, "dq_dc": found.dq_dc.numpy()}


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    path = draw("pact", tmp_path / "new")
    assert path == tmp_path / "new" / "transfer-pact.png"
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    height, width, _ = pixels.shape
    assert width > 900 > height > 250
    # Each curve's colour is there; the output's is mixed with the white behind it.
    for colour in ((128, 185, 217), (213, 94, 0), (0, 158, 115)):
        assert (np.abs(pixels.astype(int) - colour).max(axis=2) < 12).sum() > 100


def test_an_unknown_method_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["lqs"])
    assert stopped.value.code == 2
    assert "lqs is no method; choose from dorefa, pact, lsq" in capsys.readouterr().err


@pytest.mark.parametrize("name", PANELS)
def test_every_panel_shows_the_levels_it_is_for(name: str) -> None:
    found = numbers(PANELS[name])
    levels = len(np.unique(found["q"].round(5)))
    signs = name.startswith("apot: weight") and "bits" in name  # of which zero has two
    assert levels == quantizer(PANELS[name]).levels - signs
    assert all(np.isfinite(values).all() for values in found.values())
    assert (found["dq_dx"] != 0).mean() > 0.2


def test_lsq_is_drawn_as_its_formula_says() -> None:
    found = numbers(panel("lsq", 0, 1))
    x = found["x"].astype(np.float64)
    level = np.round(3 * x.clip(0, 1)) / 3
    inside = (x >= 0) & (x <= 1)
    away = np.abs(3 * x - np.floor(3 * x) - 0.5) > 1e-3  # from thresholds, where float32 may round otherwise
    np.testing.assert_allclose(found["q"][away], level[away], atol=1e-6)
    np.testing.assert_array_equal(found["dq_dx"], inside)
    np.testing.assert_allclose(found["dq_dc"][away], np.where(inside, level - x, level)[away], atol=1e-6)


def test_pact_is_drawn_as_its_formula_says() -> None:
    found = numbers(panel("pact", 0, 2))
    np.testing.assert_array_equal(found["dq_dc"], found["x"] >= 1)
    np.testing.assert_array_equal(found["dq_dx"], (found["x"] >= 0) & (found["x"] < 1))


def test_bireal_is_drawn_as_its_formula_says() -> None:
    found = numbers(panel("bireal", 0, 1))
    np.testing.assert_allclose(found["dq_dx"], (2 - 2 * np.abs(found["x"])).clip(0), atol=1e-6)
    np.testing.assert_array_equal(found["q"], np.where(found["x"] < 0, -1, 1))


# ---- the documentation's pictures


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_pictures_of_the_documentation_exist(page: Path) -> None:
    for name in PICTURE.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / name).is_file(), f"{page.name} shows {name}, which is not there"


def test_the_quantizers_page_shows_every_picture() -> None:
    page = (ROOT / "docs" / "quantizers.md").read_text(encoding="utf-8")
    shown = set(PICTURE.findall(page))
    assert {f"images/transfer-{method}.png" for method in METHODS} <= shown
