"""The page about runs in a real browser: what is clicked does what it says, without an error or a request."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import browser as start_browser
from tests.browser import needs_browser
from tests.main.runs import done_in
from utils.report import run_files
from utils.report.html import page

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.remote.webdriver import WebDriver  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

pytestmark = [pytest.mark.slow, needs_browser]
TINY = "--dataset fake --width_alpha 0.125 --input_size 16 -b 8 --fake_size 32 --epochs 2 --keyword cifar10,cbas,origin"
BITS = "--fm_enable --wt_enable --re_init"
LINES = {
    "full": TINY,
    "two": f"{TINY},dorefa,lsq {BITS} --fm_bit 2 --wt_bit 2",
    "four": f"{TINY},dorefa,lsq {BITS} --fm_bit 4 --wt_bit 4",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page about three real runs."""
    folder = done_in(
        tmp_path_factory.mktemp("runs"), *(f"{line} --case {case}" for case, line in LINES.items()),
        "-e --case two --pretrained weights/resnet20/two-checkpoint.pth.tar",
    )  # fmt: skip
    path = folder / "report.html"
    path.write_text(page.render(run_files.read([folder / "exp" / case for case in LINES])), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    """A browser with a profile of its own."""
    with start_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def browser(started: WebDriver, written: Path) -> Iterator[WebDriver]:
    """The browser with the page opened anew; afterwards: no message in its console and no request but for the page."""
    started.get_log("browser"), started.get_log("performance")
    started.get(written.as_uri())
    yield started
    assert started.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in started.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [written.as_uri()]


def until(browser: WebDriver, condition: Callable[[WebDriver], Any]) -> None:
    """Wait until something is the case; fails after a while."""
    WebDriverWait(browser, 20, poll_frequency=0.05).until(condition)


def find(browser: WebDriver, selector: str) -> list[WebElement]:
    return browser.find_elements("css selector", selector)


def click(browser: WebDriver, element: WebElement) -> None:
    """Click as a user does, once the element is on the screen."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    element.click()


def column(browser: WebDriver, table: str, number: int) -> list[str]:
    """The cells of a column, from 1, of the rows that are shown."""
    script = (
        "return [...document.querySelectorAll(arguments[0] + ' tbody tr')].filter((row) => !row.hidden)"
        ".map((row) => row.children[arguments[1] - 1].textContent.trim())"
    )
    return browser.execute_script(script, table, number)


def titles(browser: WebDriver, parent: str) -> list[str]:
    return [element.text for element in find(browser, f"{parent} .gtitle")]


def test_every_figure_is_drawn(browser: WebDriver) -> None:
    """With lines or bars in it, as wide as its place and nothing beside it."""
    figures = find(browser, ".figure")
    assert len(figures) == 3 + 1 + 2 + 2 + 2 + 1  # curves, size, levels, over epochs, classes, operations
    for figure in figures:
        assert figure.find_elements(
            "css selector", ".scatterlayer .trace, .barlayer .trace, .heatmaplayer image"
        )
        assert figure.size["height"] > 200
    width = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    inner, outer = browser.execute_script(width)
    assert inner == outer


def test_a_narrow_window_is_enough(browser: WebDriver) -> None:
    browser.set_window_size(520, 800)
    try:
        until(browser, lambda _: find(browser, ".figure .main-svg")[0].size["width"] < 520)
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    finally:
        browser.set_window_size(1280, 900)


def test_a_legend_entry_hides_a_run(browser: WebDriver) -> None:
    """Its validation and its training together, and shows them again."""
    script = "return document.querySelector('[data-figure=curve0]')._fullData.map((trace) => trace.visible)"
    assert browser.execute_script(script) == [True] * 6
    entry = find(browser, "[data-figure=curve0] .legendtoggle")[1]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", entry)
    webdriver.ActionChains(browser).move_to_element(entry).click().perform()
    hidden = [True, True, "legendonly", "legendonly", True, True]
    until(browser, lambda driver: driver.execute_script(script) == hidden)


def test_tables_are_sorted(browser: WebDriver) -> None:
    """By number where there are numbers, either way round, those without one last; names with layer2 before layer10."""
    table = "#quantizer0"
    heads = find(browser, f"{table} .sort")
    click(browser, heads[5])  # clipped
    values = [float(text) for text in column(browser, table, 6)]
    assert values == sorted(values) and len(set(values)) > 1
    click(browser, heads[5])
    assert [float(text) for text in column(browser, table, 6)] == sorted(values, reverse=True)
    click(browser, heads[7])  # changed, which activations have not
    texts = column(browser, table, 8)
    assert len(texts) == 40 and texts[20:] == [""] * 20 and "" not in texts[:20]
    assert [head.get_attribute("aria-sort") for head in find(browser, f"{table} thead th")][5:8] == [
        None,
        None,
        "ascending",
    ]
    click(browser, heads[0])
    assert column(browser, table, 1) == sorted(column(browser, table, 1))


def test_tables_are_filtered(browser: WebDriver) -> None:
    (field,) = find(browser, "#quantizer0 .filter")
    field.send_keys("layer2 weight")
    names = column(browser, "#quantizer0", 1)
    assert names and all("layer2" in name and "weight" in name for name in names)
    field.clear()
    field.send_keys("nothing like it")
    assert column(browser, "#quantizer0", 1) == []


def test_tabs_show_another_run(browser: WebDriver) -> None:
    first, second = find(browser, "[data-group=quantizer] button")
    assert (first.text, second.text) == ("two", "four")
    click(browser, second)
    assert [panel.is_displayed() for panel in find(browser, "#quantizers .panel")] == [False, True]
    assert second.get_attribute("aria-selected") == "true"
    assert set(column(browser, "#quantizer1", 4)) == {"16"}


def test_levels_of_a_chosen_quantizer(browser: WebDriver) -> None:
    """A click on its name, the list, the epoch and the scale change what is drawn."""
    assert titles(browser, "#histograms") == ["two, epoch 2: 4 levels", "four, epoch 2: 16 levels"]
    lines = [
        len(figure.find_elements("css selector", ".shapelayer path"))
        for figure in find(browser, "#histograms .figure")
    ]
    assert lines == [4, 16]
    link = find(browser, "#quantizer0 [data-quantizer]")[-1]
    name = link.text
    click(browser, link)
    assert Select(find(browser, "#layer")[0]).first_selected_option.text == name
    slider = "const field = document.getElementById('moment'); field.value = 0; field.dispatchEvent(new Event('input'))"
    browser.execute_script(slider)
    until(browser, lambda _: titles(browser, "#histograms")[0] == "two, epoch 1: 4 levels")
    axis = "return document.querySelector('#histograms .figure').layout.yaxis.type"
    assert browser.execute_script(axis) == "log"
    click(browser, find(browser, "#logarithmic")[0])
    assert browser.execute_script(axis) == "linear"


def test_figures_over_epochs(browser: WebDriver) -> None:
    counts = "return [...document.querySelectorAll('#over .figure:not([hidden])')].map((figure) => figure.data.length)"
    assert browser.execute_script(counts) == [20, 20]
    metric, tag = (Select(find(browser, f"#{name}")[0]) for name in ("metric", "tag"))
    assert [option.text for option in tag.options] == ["activations", "weights"]
    assert "basis (LQ-Nets)" not in [option.text for option in metric.options]
    metric.select_by_value("changed")
    (none,) = find(browser, "#none")
    assert none.is_displayed() and browser.execute_script(counts) == []
    tag.select_by_value("wt")
    assert browser.execute_script(counts) == [20, 20]
    assert not none.is_displayed()
    for value in ("dead", "update", "changed", "range") * 2:  # faster than they are drawn
        metric.select_by_value(value)


def test_only_what_differs(browser: WebDriver) -> None:
    differing = column(browser, "#fields", 1)
    assert "model.quant.wt.levels" in differing and "optim.lr" not in differing
    click(browser, find(browser, "#differences")[0])
    assert len(column(browser, "#fields", 1)) > 3 * len(differing)
    find(browser, "#configuration .filter")[0].send_keys("optim.lr")
    assert column(browser, "#fields", 1) == ["optim.lr"]


def test_the_contents_lead_to_the_sections(browser: WebDriver) -> None:
    for link in find(browser, "nav a"):
        target = str(link.get_attribute("href")).partition("#")[2]
        assert find(browser, f"section#{target}")
    click(browser, link)
    assert browser.current_url.endswith("#configuration")


def test_a_cell_of_the_confusion_matrix_shows_its_images(browser: WebDriver) -> None:
    (figure,), (plot, _) = find(browser, "#classes [data-examples]"), find(browser, "#classes .nsewdrag")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", figure)
    for cell, pictures in browser.execute_script("return DATA.examples[0]").items():
        true, called = map(int, cell.split(","))
        place = browser.execute_script(
            "const {xaxis, yaxis} = arguments[0]._fullLayout, [x, y] = arguments[1];"
            "return [xaxis.l2p(x) - xaxis._length / 2, yaxis.l2p(y) - yaxis._length / 2]",
            figure,
            [called, true],
        )
        ActionChains(browser).move_to_element_with_offset(plot, *map(round, place)).pause(
            0.3
        ).click().perform()
        text = f"{true} called {called}: "
        until(browser, lambda _, text=text: text in find(browser, "#classes .examples")[0].text)
        assert len(find(browser, "#classes .examples img")) == len(pictures) > 0
