"""Builds the package `lowbit` that other programs install: `model/` and `utils/` under one name.

In the repository they are top-level packages, since `main.py` and files of users import them so. Under these names
they would collide with the modules of a program that they are installed beside. So the copies in the wheel import
each other as `lowbit.model` and `lowbit.utils`; nothing else of them changes. `lowbit` alone holds the version.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools import setup
from setuptools.command.build import build
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel
from setuptools.command.sdist import sdist

PACKAGE = "lowbit"
FOLDERS = ("model", "utils")
DOOR = '''"""Low-bit quantization of image classifiers; `model.quant` and `model.convert` are where to begin."""

__version__ = "{version}"
'''
NAMES = "|".join(FOLDERS)
EXAMPLE = re.compile(rf"^(\s*(?:>>>|\.\.\.) from )({NAMES})\b", re.MULTILINE)
# The last line of the traceback in an example.
RAISED = re.compile(rf"^(\s+)({NAMES})(?=\.[\w.]+Error: )", re.MULTILINE)


def under_one_name(text: str, name: str) -> str:
    """A module of the project with its imports of the project's packages below `PACKAGE`, those of examples too."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] in FOLDERS for alias in node.names):
            raise SystemExit(
                f"error: {name}, line {node.lineno}: write 'from ... import' for modules of the project"
            )
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in FOLDERS:
            line = lines[node.lineno - 1]
            head, rest = line[: node.col_offset], line[node.col_offset :]
            lines[node.lineno - 1] = head + rest.replace("from ", f"from {PACKAGE}.", 1)
    text = EXAMPLE.sub(rf"\g<1>{PACKAGE}.\g<2>", "".join(lines))
    return RAISED.sub(rf"\g<1>{PACKAGE}.\g<2>", text)


class CleanBuild(build):
    """Builds in a folder of its own: modules that an earlier version left in `build/` are not packed again."""

    def finalize_options(self) -> None:
        self._folder = TemporaryDirectory()  # removed with the command
        self.build_base = self._folder.name
        super().finalize_options()


class BuildPackage(build_py):
    """Copies the modules and makes their imports those of one package."""

    def run(self) -> None:
        super().run()
        door = DOOR.format(version=self.distribution.get_version())
        Path(self.build_lib, PACKAGE, "__init__.py").write_text(door, encoding="utf-8")

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        made = super().build_module(module, module_file, package)
        path = Path(self.get_module_outfile(self.build_lib, package.split("."), module))
        text = under_one_name(path.read_text(encoding="utf-8"), module_file)
        path.write_text(text, encoding="utf-8")
        return made


class NotEditable(editable_wheel):
    """Refuses `pip install -e`, which would put `model` and `utils` themselves on the path."""

    def run(self) -> None:
        raise SystemExit(
            "error: the package is made from model/ and utils/ with other imports, so it cannot be installed "
            "with -e: leave -e out, or run main.py in the repository's folder"
        )


class SourcesAlone(sdist):
    """Packs what the package is built from, without tests."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, [file for file in files if Path(file).parts[0] != "tests"])


HERE = Path(__file__).parent
packages = {
    ".".join((PACKAGE, *file.parent.relative_to(HERE).parts)): str(file.parent.relative_to(HERE))
    for folder in FOLDERS
    for file in sorted((HERE / folder).rglob("__init__.py"))
}
setup(
    packages=list(packages),
    package_dir=packages,
    package_data={"": [f"*.{kind}" for kind in ("css", "h", "html", "js")]},  # of any of the packages
    include_package_data=False,
    cmdclass={
        "build": CleanBuild,
        "build_py": BuildPackage,
        "editable_wheel": NotEditable,
        "sdist": SourcesAlone,
    },
)
