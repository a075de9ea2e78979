"""The typed configuration as plain data, as checkpoints and packed files hold it, and back."""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.config.schema import Config
from utils.errors import UserError


def to_dict(config: Any) -> Any:
    """A configuration as plain dictionaries, lists and strings, for YAML and for checkpoints."""
    if dataclasses.is_dataclass(config):
        values = {item: getattr(config, item.name) for item in dataclasses.fields(config)}
        return {
            item.name: to_dict(value)
            for item, value in values.items()
            if value or not item.metadata.get("optional")
        }
    if isinstance(config, Mapping):
        return {str(name): to_dict(value) for name, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def from_dict(values: object, source: str) -> Config:
    """The configuration that a file holds; fields that it does not have keep their defaults.

    Fields that this version does not know are left out, but for those of the network: that would be another one.

    Args:
        values: what `to_dict` has made of it.
        source: the file, for messages.

    Raises:
        UserError: a field is unknown, of another type, or has a value that is not taken.

    Example:
        >>> from utils.config.recorded import from_dict, to_dict
        >>> from utils.config.schema import Config, ModelConfig
        >>> config = Config(model=ModelConfig(input_size=(96, 160)))
        >>> from_dict(to_dict(config), "x.pth.tar") == config
        True
    """
    return _value(Config, values, f"the configuration in {source}")


def _value(kind: Any, value: Any, where: str) -> Any:
    """A value of an annotated type from plain data."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _one_of(arguments, value, where)
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is not Ellipsis and len(arguments) != len(value):
            raise _unfit(where, value)
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_value(one, item, where) for one, item in zip(kinds, value, strict=True))
    if origin in (dict, collections.abc.Mapping) and isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        known = typing.get_type_hints(kind)
        unknown = [str(name) for name in value if name not in known]
        if unknown and "model" in where.split(", "):
            raise UserError(f"{where} has {unknown[0]}, which this version does not know: use a newer one")
        parts = {
            name: _value(known[name], item, f"{where}, {name}")
            for name, item in value.items()
            if name in known
        }
        return _made(kind, parts, where)
    if kind is Any:
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = kind in (bool, int, float, str, types.NoneType) and type(value) is kind
    if not plain:
        raise _unfit(where, value)
    return value


def _one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    for kind in kinds:
        with contextlib.suppress(UserError):
            return _value(kind, value, where)
    raise _unfit(where, value)


def _made(kind: Any, parts: dict[str, Any], where: str) -> Any:
    try:
        return kind(**parts)
    except (UserError, TypeError) as error:
        raise UserError(f"{where} is damaged: {error}") from error


def _unfit(where: str, value: Any) -> UserError:
    return UserError(f"{where} is damaged: it is {value!r:.80}")
