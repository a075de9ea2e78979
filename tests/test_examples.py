"""Every public name has a docstring with an example, and every example in a docstring does what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest

import model
import utils
from model import audit, calibrate, convert, quant
from model.layers import bits, factory, norms
from model.networks import build
from model.quantizers import registry
from utils.config import keyword, methods

DOORS = (quant, convert, audit, calibrate)
SHOWN = (
    build.register_model,
    factory.conv,
    factory.linear,
    norms.norm,
    keyword.Keyword,
    keyword.register,
)  # in docs
MODULES = sorted(
    found.name for top in (model, utils) for found in pkgutil.walk_packages(top.__path__, f"{top.__name__}.")
)
OPTIONAL = ("torchvision", "nvidia")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an example registers ends with it."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(methods, "_RECORDS", dict(methods._RECORDS))
    monkeypatch.setattr(bits, "LAYERS", dict(bits.LAYERS))
    monkeypatch.setattr(build, "_MODELS", dict(build._MODELS))
    monkeypatch.setattr(keyword, "_REGISTRY", dict(keyword._REGISTRY))


def public(door: ModuleType) -> Iterator[tuple[str, object]]:
    """What a program may import from a module."""
    for name in door.__all__:
        yield name, getattr(door, name)


def test_public_names_have_documented_methods_and_an_example() -> None:
    missing = [f"{thing.__name__} has no example" for thing in SHOWN if ">>> " not in (thing.__doc__ or "")]
    for door in DOORS:
        for name, thing in public(door):
            if ">>> " not in (thing.__doc__ or ""):
                missing.append(f"{door.__name__}.{name} has no example")
            if not inspect.isclass(thing):
                continue
            for part, value in vars(thing).items():
                if (
                    inspect.isfunction(value)
                    and not part.startswith("_")
                    and not inspect.getdoc(getattr(thing, part))
                ):
                    missing.append(f"{door.__name__}.{name}.{part} has no docstring")
    assert not missing


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_nothing_is_public_by_accident(door: ModuleType) -> None:
    """Functions and classes that a module defines are in its `__all__`, or their names begin with an underscore."""
    own = {name for name, value in vars(door).items() if getattr(value, "__module__", "") == door.__name__}
    assert {name for name in own if not name.startswith("_") and callable(vars(door)[name])} <= set(
        door.__all__
    )


def test_examples_run() -> None:
    """Those of all modules; each imports what it needs, so that it can be copied."""
    runner, count, texts = doctest.DocTestRunner(), 0, []
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            assert str(error.name).partition(".")[0] in OPTIONAL, error
            continue
        for test in doctest.DocTestFinder(exclude_empty=True).find(module, name, globs={}):
            found = runner.run(test, out=texts.append)
            count += bool(found.attempted)
    assert not runner.summarize(verbose=False).failed, "".join(texts)
    assert count > 35
