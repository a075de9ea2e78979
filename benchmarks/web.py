"""Measures an exported network in a headless browser, beside the float network and in turn with it, on one thread.

    python benchmarks/web.py                         # ResNet-18 at 224 pixels, 2 bits
    python benchmarks/web.py --bits ternary --size 64

The engine is that of the pages of `--to web`. A browser compiles its code again while it runs, so that the first runs
do not count.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import statistics
import tempfile
import threading
from pathlib import Path
from typing import Any

import engines
import numpy as np
import torch

from model.deploy.verify import cpu
from model.deploy.web import runtime
from tests.browser import browser

WARM_UP = 10
PAGE = """<!doctype html><script type="module">
import * as ort from "./ort.wasm.min.mjs";
ort.env.wasm.numThreads = 1;
window.measure = async (names, shape, warmUp, repeats) => {
  const count = shape.reduce((product, side) => product * side, 1);
  const input = new ort.Tensor("float32", Float32Array.from({ length: count }, () => Math.random()), shape);
  const sessions = [];
  for (const name of names) sessions.push(await ort.InferenceSession.create(name, { executionProviders: ["wasm"] }));
  const times = [];
  for (let i = -warmUp; i < repeats; i++) {
    const row = [];
    for (const session of sessions) {
      const began = performance.now();
      await session.run({ input });
      row.push(performance.now() - began);
    }
    if (i >= 0) times.push(row);
  }
  return times;
};
window.ready = true;
</script>"""
CALL = "const done = arguments[4]; measure(...[...arguments].slice(0, 4)).then(done, (error) => done(String(error)));"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a line for each request."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def measured(
    folder: Path, names: list[str], shape: tuple[int, ...], repeats: int
) -> tuple[str, list[list[float]]]:
    """The browser's version, and the milliseconds of each file in each round."""
    from selenium.webdriver.support.ui import WebDriverWait

    handler = functools.partial(Quiet, directory=str(folder))
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        tempfile.TemporaryDirectory() as profile,
        browser(Path(profile)) as driver,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        driver.set_script_timeout(1800)
        driver.get(f"http://127.0.0.1:{server.server_address[1]}/")
        WebDriverWait(driver, 60).until(lambda d: d.execute_script("return window.ready"))
        found = driver.execute_async_script(CALL, names, shape, WARM_UP, repeats)
        version = driver.capabilities["browserVersion"]
        server.shutdown()
    if isinstance(found, str):
        raise SystemExit(found)
    return version, found


def main() -> None:
    """Print the ratio and its quartiles."""
    parser = argparse.ArgumentParser(description="Measures an exported network in a headless browser.")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--bits", default="2")
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = (1, 3, options.size, options.size)
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [
            engines.write(folder, options.model, options.bits, image, ["onnx"])["onnx, 8-bit sums"],
            engines.write(folder, options.model, "float", image, ["onnx"])["onnx"],
        ]
        for file, content in runtime.files().items():
            (folder / file).write_bytes(content)
        (folder / "index.html").write_text(PAGE, "utf-8")
        version, times = measured(folder, [path.name for path in paths], shape, options.repeats)
    low, middle, high = statistics.quantiles([plain / own for own, plain in times], n=4)
    own, plain = (statistics.median(column) for column in zip(*times, strict=True))
    print(
        f"{options.bits} bits with 8-bit sums {own:.0f} ms, float {plain:.0f} ms, {options.repeats} pairs of runs"
    )
    print(f"{middle:.2f} times faster, quartiles {low:.2f} to {high:.2f}")
    used = f"onnxruntime-web {runtime.VERSION}, Chromium {version}; {cpu()}"
    print(f"{options.model}, {options.size} pixels, one thread; {used}")


if __name__ == "__main__":
    main()
