"""Import the tested code from the given place, and from no other."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from dinov2_attn.backbone.structure import classes_in
from dinov2_attn.errors import in_one_line
from dinov2_attn.grafting.targets import MODULES
from dinov2_attn.proof.conformance.code import GATE, Code

# In the source of every module that defines one of the parts: `self.qkv`, `qkv_bias`.
_WORD = "qkv"


def load(package: str, path: str | None) -> Code:
    """Import ``package``, from ``path`` if given. Raise ``pytest.UsageError`` if it is missing."""
    folders = _make_importable(package.partition(".")[0], path)
    code = Code(package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream warns whether xFormers is available
        _enter(code, folders)
        names = MODULES.get(package) or _modules_with_parts(package)
        for name in names:
            _import(code, name)
    code.opened = [module for module in code.gates if getattr(module, GATE)]
    for module in code.modules:
        for cls, part in classes_in(module):
            known = code.parts.setdefault(part, [])
            if cls not in known:
                known.append(cls)
    return code


def _make_importable(top: str, path: str | None) -> list[str]:
    """Put ``path`` first on the Python path, and return the folders of the package ``top``."""
    if path is None:
        spec = importlib.util.find_spec(top)
        if spec is None:
            raise pytest.UsageError(
                f"expected an importable package {top}; found none. "
                "Give its place: --dinov2 PATH (a checkout, a site-packages folder, a wheel)."
            )
    else:
        entry = str(Path(path).expanduser().resolve())
        spec = importlib.machinery.PathFinder.find_spec(top, [entry])
        if spec is None:
            raise pytest.UsageError(
                f"expected {entry} to hold the package {top}; found none there. Name the folder "
                "that contains the package, not the package; --package NAME chooses another."
            )
        _require_no_other(top, spec)
        sys.path.insert(0, entry)
    return list(spec.submodule_search_locations or [])


def _require_no_other(top: str, spec: importlib.machinery.ModuleSpec) -> None:
    imported = sys.modules.get(top)
    if imported is not None and imported.__file__ != spec.origin:
        raise pytest.UsageError(
            f"expected {top} of {spec.origin}; found that this process has imported "
            f"{imported.__file__} already. Run the suite in a process of its own."
        )


def _enter(code: Code, folders: list[str]) -> None:
    """Import the package; if its ``__init__`` fails, import its modules without it.

    Copies are vendored in large programs. Their attention needs PyTorch only, but the ``__init__``
    of the program may need dependencies that are missing here.
    """
    before = set(sys.modules)
    top, *rest = code.package.split(".")
    try:
        _require_from(
            importlib.import_module(code.package), ["/".join([f, *rest]) for f in folders]
        )
        return
    except Exception as error:  # the surrounding program can raise anything
        reason = f"{type(error).__name__}: {in_one_line(error)}"
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == top:
            del sys.modules[name]
    for depth in range(len(rest) + 1):
        name = ".".join([top, *rest[:depth]])
        _enter_bare(name, ["/".join([folder, *rest[:depth]]) for folder in folders])
    code.notes.append(f"{code.package} entered without its __init__ ({reason})")


def _require_from(module: ModuleType, expected: list[str]) -> None:
    """Raise ``ImportError`` for another copy, which wins if the right one has no ``__init__``."""
    found = [*getattr(module, "__path__", []), str(module.__file__)]
    if not any(place.startswith(tuple(expected)) for place in found):
        raise ImportError(f"Python prefers the one at {found[0]}")


def _enter_bare(name: str, folders: list[str]) -> None:
    package = ModuleType(name)
    package.__path__ = folders
    package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    sys.modules[name] = package
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, package)


def _modules_with_parts(package: str) -> Iterator[str]:
    """Yield the modules of ``package`` whose source mentions the projection."""
    module = sys.modules[package]
    if _mentions_parts(module.__spec__):
        yield package
    if hasattr(module, "__path__"):
        yield from _below(package, list(module.__path__))


def _below(package: str, folders: list[str]) -> Iterator[str]:
    for finder, name, is_package in pkgutil.iter_modules(folders, f"{package}."):
        if _mentions_parts(finder.find_spec(name, None)):
            yield name
        if is_package:
            child = name.rpartition(".")[2]
            yield from _below(name, [f"{folder}/{child}" for folder in folders])


def _mentions_parts(spec: importlib.machinery.ModuleSpec | None) -> bool:
    get_source = getattr(spec and spec.loader, "get_source", None)
    return get_source is not None and spec is not None and _WORD in (get_source(spec.name) or "")


def _import(code: Code, name: str) -> None:
    try:
        code.modules.append(importlib.import_module(name))
    except Exception as error:  # foreign code; test_install reports what is missing
        code.passed_over[name] = f"{type(error).__name__}: {in_one_line(error)}"
