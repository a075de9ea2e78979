"""Builds the package `lowbit` that other programs install: `model/` and `utils/` under one name.

In the repository they are top-level packages, since `main.py` and files of users import them so. Under these names
they would collide with the modules of a program that they are installed beside. So the copies in the wheel import
each other as `lowbit.model` and `lowbit.utils`; nothing else of them changes.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PACKAGE = "lowbit"
FOLDERS = ("model", "utils")
DOOR = '''"""Low-bit quantization of image classifiers; `model.quant` and `model.convert` are where to begin."""
'''
EXAMPLE = re.compile(rf"^(\s*(?:>>>|\.\.\.) from )({'|'.join(FOLDERS)})\b", re.MULTILINE)


def under_one_name(text: str) -> str:
    """A module of the project with its imports of the project's packages below `PACKAGE`, those of examples too."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in FOLDERS:
            line = lines[node.lineno - 1]
            head, rest = line[: node.col_offset], line[node.col_offset :]
            lines[node.lineno - 1] = head + rest.replace("from ", f"from {PACKAGE}.", 1)
    return EXAMPLE.sub(rf"\g<1>{PACKAGE}.\g<2>", "".join(lines))


class BuildPackage(build_py):
    """Copies the modules and makes their imports those of one package."""

    def run(self) -> None:
        if self.editable_mode:
            raise SystemExit(
                "error: the package is made from model/ and utils/ with other imports, so it cannot be installed "
                "with -e: leave -e out, or run main.py in the repository's folder"
            )
        super().run()
        Path(self.build_lib, PACKAGE, "__init__.py").write_text(DOOR, encoding="utf-8")

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        made = super().build_module(module, module_file, package)
        path = Path(self.get_module_outfile(self.build_lib, package.split("."), module))
        path.write_text(under_one_name(path.read_text(encoding="utf-8")), encoding="utf-8")
        return made


HERE = Path(__file__).parent
packages = {
    ".".join((PACKAGE, *file.parent.relative_to(HERE).parts)): str(file.parent.relative_to(HERE))
    for folder in FOLDERS
    for file in sorted((HERE / folder).rglob("__init__.py"))
}
setup(
    packages=list(packages),
    package_dir=packages,
    package_data={f"{PACKAGE}.utils.report.html": ["page.*"]},
    cmdclass={"build_py": BuildPackage},
)
