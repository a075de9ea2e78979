"""A folder with a page that classifies images in a browser: the ONNX file, onnxruntime-web, and nothing from elsewhere.

The page prepares an image as validation does: `page.js` has the resizing and the crop of `utils.data.transform` again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from model.deploy.web.runtime import NAMES, VERSION
from utils.checkpoint.exported import NETWORK

if TYPE_CHECKING:
    from onnx import ModelProto

    from model.load import Trained

PAGE = "index.html"
OWN = ("page.js", "page.css")
_HERE = Path(__file__).parent


def write(trained: Trained, model: ModelProto, engine: Mapping[str, bytes], folder: Path) -> None:
    """Write the page of a network.

    Args:
        trained: says how images are prepared, and what the classes are called.
        model: the network, input `input`, output `logits`.
        engine: the files of onnxruntime-web (`runtime.files`).
        folder: is made. Browsers load no module from a file: `python -m http.server --directory FOLDER` serves it.
    """
    folder.mkdir()
    for name, content in engine.items():
        (folder / name).write_bytes(content)
    (folder / NETWORK).write_bytes(model.SerializeToString())
    described = {
        "network": NETWORK,
        "title": f"{trained.config.model.name}, {trained.source.name}",
        "classes": list(trained.labels),
        "images": trained.transform.to_dict(),
    }
    # In a script element only "</" and "<!--" mean something to a browser.
    text = json.dumps(described).replace("<", "\\u003c")
    page = Template((_HERE / "page.html").read_text(encoding="utf-8"))
    (folder / PAGE).write_text(page.substitute(network=text, version=VERSION), encoding="utf-8")
    for name in OWN:
        (folder / name).write_bytes((_HERE / name).read_bytes())


def is_page(folder: Path) -> bool:
    """Whether a folder, and no link to one, has the files that `write` makes and no others."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        files = {entry.name: entry.is_file() for entry in folder.iterdir()}
    except OSError:
        return False
    return {NETWORK, PAGE, "page.js"} <= set(files) <= {NETWORK, PAGE, *OWN, *NAMES} and all(files.values())
