"""MNN's converter, which makes a file of a network that is described as JSON in the words of MNN's schema.

`MNN.tools`, the converter's usual door, installs a package with pip when it is imported, and reports conversions to a
server (findings/mnn-tools-install.sh). Its core alone is called therefore, and in a process of its own: it writes on
standard output, and its exit status is 0 whatever happens.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError

CONVERTER = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"

LEFT_OUT = "Invalid"  # begins the line about an entry that the schema does not have


def convert(network: Mapping[str, Any], path: Path) -> None:
    """Write a network as a file of MNN.

    Args:
        network: the entries of the schema's table `Net`.
        path: the file.

    Raises:
        UserError: the converter writes none, or leaves out an entry.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "network.json", Path(folder) / "network.mnn"
        given.write_text(json.dumps(network), "utf-8")
        options = ["-f", "JSON", "--modelFile", str(given), "--MNNModel", str(made)]
        command = [sys.executable, "-c", CONVERTER, *options]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        lines = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        left_out = [line for line in lines if line.startswith(LEFT_OUT)]
        if left_out or done.returncode or not made.is_file():
            said = (left_out or lines or [""])[0 if left_out else -1]
            raise UserError(
                f"MNN's converter does not take this network ({said or f'exit status {done.returncode}'}); "
                "export --to onnx"
            )
        path.write_bytes(made.read_bytes())
