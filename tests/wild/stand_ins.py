"""Imports of a project that its model does not need: bare packages and stubs."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class Stub(ModuleType):
    """A module, and every name in it: takes any attribute, call, decoration and subclass."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


class _AnyAttribute(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _decorator


class _Anything(metaclass=_AnyAttribute):
    """A base class, or a decorator with arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _decorator

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else self


def _decorator(*args: Any, **kwargs: Any) -> Any:
    return args[0] if len(args) == 1 and callable(args[0]) else _Anything()


def stub(name: str) -> None:
    """Enter a ``Stub`` for ``name``; for the packages around it too if they are not there."""
    parts = name.split(".")
    is_there = parts[0] in sys.modules or importlib.util.find_spec(parts[0]) is not None
    start = len(parts) if is_there and not isinstance(sys.modules.get(parts[0]), Stub) else 1
    for end in range(start, len(parts) + 1):
        module = ".".join(parts[:end])
        entered = sys.modules.setdefault(module, Stub(module))
        if end > start:
            setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], entered)


def enter_bare(name: str, source: Path) -> None:
    """Enter package ``name`` of the folder ``source`` without running its ``__init__``."""
    package = ModuleType(name)
    package.__path__ = [str(source.joinpath(*name.split(".")))]
    package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    package.__spec__.submodule_search_locations = package.__path__
    sys.modules[name] = package
