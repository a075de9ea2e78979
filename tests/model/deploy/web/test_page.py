"""The page that classifies images, in a real browser: the answers of torch, and no request to elsewhere."""

from __future__ import annotations

import functools
import http.server
import json
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.deploy import web
from model.deploy.graph import deploy_graph
from model.deploy.onnx_qdq import qdq_model
from model.deploy.web import runtime
from model.load import Trained, load_trained
from tests.browser import browser, needs_browser
from tests.main.runs import LSQ, done_in
from utils.data.transform import ImageTransform
from utils.errors import UserError

ANSWER = """
const [address, name, done] = arguments;
fetch(address).then((answer) => answer.blob()).then((blob) => classifyFile(new File([blob], name))).then(done);
"""
DRAWN = """
const [done] = arguments;
const wait = () => (window.answer ? done(window.answer) : setTimeout(wait, 20));
wait();
"""
SIZE = 16
TRANSFORMS = {
    "crop": ImageTransform(size=SIZE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), resize_ratio=256 / 224),
    "whole": ImageTransform(size=SIZE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), resize_ratio=None),
}


def images(folder: Path) -> list[str]:
    """Images of several shapes, kinds and orientations."""
    rng = np.random.default_rng(0)
    for name, (high, wide) in {
        "same": (SIZE, SIZE),
        "wide": (41, 97),
        "high": (70, 33),
        "small": (7, 9),
    }.items():
        coarse = Image.fromarray(rng.integers(256, size=(5, 5, 3), dtype=np.uint8))
        coarse.resize((wide, high), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    wide = Image.open(folder / "wide.png")
    wide.convert("L").save(folder / "grey.png")
    turned = wide.getexif()
    turned[0x0112] = 6
    wide.save(folder / "turned.jpg", exif=turned, quality=95, subsampling=0)
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = done_in(tmp_path_factory.mktemp("run"), f"{LSQ} --case a --epochs 1")
    found = load_trained(folder / "weights" / "resnet20" / "a-checkpoint.pth.tar")
    return replace(found, classes=tuple(f"</script> {i}" for i in range(found.config.model.num_classes)))


@pytest.fixture(scope="module")
def folder(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a network, once for each way of preparing an image, and images beside it."""
    folder = tmp_path_factory.mktemp("pages")
    model = qdq_model(deploy_graph(trained.network, (3, SIZE, SIZE)))
    try:
        engine = runtime.files()
    except UserError as error:
        pytest.skip(str(error))
    for name, transform in TRANSFORMS.items():
        web.write(replace(trained, transform=transform), model, engine, folder / name)
    (folder / "images").mkdir()
    images(folder / "images")
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("selenium.webdriver")
    with browser(tmp_path_factory.mktemp("profile")) as started:
        started.set_script_timeout(60)
        yield started


def opened(driver: Any, address: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get(address)
    WebDriverWait(driver, 60, poll_frequency=0.05).until(lambda d: d.execute_script("return window.ready"))


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMS)
def test_its_answers_are_those_of_torch(
    driver: Any, served: str, folder: Path, trained: Trained, name: str
) -> None:
    """An image is prepared as in validation: PNG exactly, JPEG but for how it is decoded."""
    driver.get_log("performance")
    opened(driver, f"{served}/{name}/")
    transform = TRANSFORMS[name]
    for path in sorted((folder / "images").iterdir()):
        answer = driver.execute_async_script(ANSWER, f"/images/{path.name}", path.name)
        expected = transform(path)
        seen = torch.tensor(answer["input"]).reshape(expected.shape)
        difference = (seen - expected).abs()
        assert difference.max() < (3.01 / 255 / min(transform.std) if path.suffix == ".jpg" else 1e-5), (
            path.name
        )
        with torch.no_grad():
            logits = trained.network(seen[None])[0]
        torch.testing.assert_close(torch.tensor(answer["logits"]), logits, rtol=1e-3, atol=1e-3)
        assert answer["probabilities"] == pytest.approx(logits.softmax(0).tolist(), abs=1e-3)
        first = driver.find_element("css selector", "#classes li span").text
        assert first == trained.labels[int(logits.argmax())]
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 5 and all(url.startswith((served, "data:")) for url in asked)
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


@needs_browser
@pytest.mark.slow
def test_what_is_drawn_is_classified(driver: Any, served: str) -> None:
    from selenium.webdriver import ActionChains

    opened(driver, f"{served}/crop/")
    pad = driver.find_element("id", "pad")
    ActionChains(driver).move_to_element(pad).click_and_hold().move_by_offset(40, 50).release().perform()
    answer = driver.execute_async_script(DRAWN)
    assert len(set(answer["input"])) > 2 and len(driver.find_elements("css selector", "#classes li")) == 5
    status = driver.execute_async_script("classifyFile(new File(['no'], 'a.png')).then(arguments[0])")
    assert status is None
    assert driver.find_element("id", "status").text == "a.png: not an image that this browser can read"


# The engine's files ----------------------------------------------------------------------------------


def test_without_a_network_the_line_says_what_to_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # an earlier one, which knows no proxy
    with pytest.raises(UserError) as error:
        runtime.files()
    path = tmp_path / "lowbit" / f"onnxruntime-web-{runtime.VERSION}.tgz"
    assert "cannot fetch https://registry.npmjs.org/" in str(error.value)
    assert str(error.value).endswith(f"put it at {path}") and not path.parent.exists()


def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "lowbit" / f"onnxruntime-web-{runtime.VERSION}.tgz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(UserError, match=r"is not onnxruntime-web .*; remove it, or download"):
        runtime.files()
