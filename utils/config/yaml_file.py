"""Reading a user's YAML or JSON file, with mistakes as one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError


def read_yaml(path: str | os.PathLike[str], option: str) -> Any:
    """The content of a YAML or JSON file that an option names.

    Raises:
        UserError: it cannot be read, is no such file, or has a name twice in one mapping.
    """
    where = f"{option} {os.fspath(path)}"
    try:
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise UserError(f"{where}: is a pipe or a device: write its text into a file")
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(f"{where}: cannot be read ({reason})") from error
    try:
        try:
            return json.loads(text, object_pairs_hook=_mapping)
        except (ValueError, RecursionError):  # YAML has nearly all of JSON, but no tabs
            loader = _Loader(text)
            try:
                return loader.get_single_data()
            finally:
                loader.dispose()
    except _TwiceError as error:
        raise UserError(f"{where}: {error} is written twice in one mapping: keep one of them") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no YAML ({' '.join(str(error).split()):.200})") from error


class _TwiceError(Exception):
    """A name that a mapping has twice; readers of YAML and JSON take the last one without a word."""


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of JSON."""
    _refuse_twice([name for name, _ in pairs])
    return dict(pairs)


def _refuse_twice(names: list[str]) -> None:
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise _TwiceError(repr(twice))


class _Loader(yaml.SafeLoader):
    """YAML's own types; checked before `<<` has copied the names of other mappings."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """See PyYAML's Composer."""
        node = super().compose_mapping_node(anchor)
        _refuse_twice([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return node
