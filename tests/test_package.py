"""The package `lowbit`: built, installed beside a program with modules of the same names, used as the README does."""

from __future__ import annotations

import re
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "model", "utils", "tests/test_package.py")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
ALONE = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
BUILD = (
    "from setuptools import build_meta; build_meta.build_sdist('../made'); build_meta.build_wheel('../made')"
)

# The modules that other programs import need torch and nothing else. Of the rest, only these may ask for more.
OPTIONAL = {"numpy", "yaml", "tqdm", "jinja2", "PIL", "torchvision", "sklearn", "pyvips", "nvidia", "tensorboard",
            "matplotlib", "plotly", "timm"}  # fmt: skip
PROGRAM = f"""
import importlib, pkgutil, sys

import torch
import model, utils  # the program's own

before = set(sys.modules)
from lowbit.model import audit, calibrate, convert, quant

assert model.mine == utils.mine == "untouched" and "lowbit" not in model.__file__
assert not {{name.partition(".")[0] for name in set(sys.modules) - before}} & {OPTIONAL}

import lowbit

failed = []
for found in pkgutil.walk_packages(lowbit.__path__, "lowbit."):
    try:
        importlib.import_module(found.name)
    except ImportError as error:
        failed += [f"{{found.name}}: {{error}}"] * (str(error.name).partition(".")[0] not in {OPTIONAL})
assert not failed, failed
assert not [name for name in sys.modules if name.startswith(("model.", "utils."))]
"""
# A checkpoint, without a word about its network.
LOAD = f"""
from PIL import Image
from lowbit.model.load import load

network, transform, classes = load({str(ROOT / "tests/recorded/lsq.pth.tar")!r})
assert network(transform(Image.new("RGB", (40, 30)))[None]).shape == (1, 10) and classes == ()
"""
# The repository's modules beside the installed ones, in a process whose program has no `model` of its own.
BOTH = """
import torch
import lowbit.model.quant as installed
import model.quant as repository
from lowbit.model.audit import audit
from lowbit.model.convert import quantize
from model.convert import quantize as of_the_repository

def refusal(function, *arguments):
    try:
        function(*arguments)
    except TypeError as error:
        return str(error)

for one, convert in ((installed, quantize), (repository, of_the_repository)):
    wt = one.QuantizerConfig(tag="wt", enable=True, method="lsq", levels=4, proxquant_step=2)
    network, config = torch.nn.Sequential(torch.nn.Linear(3, 2)), one.QuantConfig(wt=wt, first_last=True)
    convert(network, config)
    network(torch.ones(2, 3)).sum().backward()

print(refusal(quantize, network, config))
print(refusal(audit, network, [torch.ones(2, 3)]))
"""
MIXED = (
    "quantize: config is of utils.config.schema, another copy of lowbit.utils.config.schema: import both from one "
    "package: write QuantConfig(fm=..., wt=...)\n"
    "0.quant_weight is a quantizer of model.quantizers.frame, another copy of lowbit.model.quantizers.frame: import "
    "both from one package\n"
)


def run(command: Sequence[str | Path], folder: Path) -> str:
    """The output of a program that must succeed without a word of complaint."""
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def readme_example() -> str:
    """The code of the README's section."""
    section = (ROOT / "README.md").read_text("utf-8").partition("## As a library\n")[2]
    return section.partition("```python\n")[2].partition("```")[0]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources, and what an earlier version has left in `build/`."""
    folder = tmp_path_factory.mktemp("package") / "checkout"
    for name in SOURCES:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    stale = folder / "build/lib/lowbit/model/stale.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("raise SystemExit\n", encoding="utf-8")
    return folder


def sources_in(folder: Path) -> set[Path]:
    """The files that git would see."""
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {path for path in files if path.parts[0] != "build" and not path.parts[0].endswith(".egg-info")}


@pytest.mark.slow
def test_the_package_is_built_installed_and_used(checkout: Path) -> None:
    """Through a source distribution, whose wheel is the same as the checkout's."""
    before, made, world = sources_in(checkout), checkout.parent / "made", checkout.parent / "world"
    made.mkdir()
    run([sys.executable, "-c", BUILD], checkout)  # as pip does
    assert sources_in(checkout) == before
    (sdist,), (wheel,) = made.glob("*.tar.gz"), made.glob("*.whl")
    with tarfile.open(sdist) as archive:
        assert not [name for name in archive.getnames() if "/tests" in name or "stale" in name]

    venv.create(world, with_pip=False)
    python = world / "bin/python"
    (packages,) = world.glob("lib/python*/site-packages")
    (packages / "environment.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    run([*PIP, "--python", python, "install", *ALONE, sdist], made)
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if name.startswith("lowbit/")]
        for name in files:
            text = archive.read(name)
            assert (packages / name).read_bytes() == text
            assert not re.search(rb"^\s*(>>> |\.\.\. )?(from|import) (model|utils)\b", text, re.MULTILINE), (
                name
            )
    kept = {f"lowbit/{path}" for path in before if path.parts[0] in ("model", "utils")}
    assert set(files) == kept | {"lowbit/__init__.py"}

    program = checkout.parent / "program"
    program.mkdir()
    for name in ("model.py", "utils.py"):
        (program / name).write_text('mine = "untouched"\n', encoding="utf-8")
    (program / "program.py").write_text(PROGRAM + LOAD + readme_example(), encoding="utf-8")
    output = run([python, "program.py"], program)
    assert "left because it\n" in output and "conv1  is the first layer\n" in output
    assert output.endswith("\npassed: 38 quantizers within their levels\n")
    assert run([python, "-c", BOTH], checkout) == MIXED


@pytest.mark.slow
def test_an_editable_installation_is_refused(checkout: Path) -> None:
    """In one line of the project's own, which says what to do instead."""
    done = subprocess.run(
        [*PIP, "install", "--editable", ".", *ALONE[:-1], "--target", checkout.parent / "nowhere"],
        cwd=checkout, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count(
        " with -e: leave -e out, or run main.py in the repository's folder"
    ) == 1
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("text", ["import model.quant\n", "def f():\n    import os, utils.text as text\n"])
def test_an_import_that_cannot_be_moved_is_refused(checkout: Path, text: str) -> None:
    module = checkout / "utils/bad.py"
    module.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", checkout.parent / "other"],
        cwd=checkout, capture_output=True, text=True, check=False,
    )  # fmt: skip
    module.unlink()
    assert done.returncode == 1
    line = text.count("\n")
    assert (
        done.stderr
        == f"error: utils/bad.py, line {line}: write 'from ... import' for modules of the project\n"
    )
