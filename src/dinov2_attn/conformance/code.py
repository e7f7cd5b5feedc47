"""The code to be proved: made importable, imported, and its classes found by structure."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from dinov2_attn.surgery.targets import UPSTREAM, UPSTREAM_MODULES
from dinov2_attn.upstream.anatomy import Part, classes_in

# Every module that defines one of the parts has it in its source: `self.qkv`, `qkv_bias`.
_WORD = "qkv"

# The global by which upstream decides, whenever it runs, whether to call xFormers.
GATE = "XFORMERS_AVAILABLE"


@dataclass
class Code:
    """One copy of the code: its modules, its classes by part, and what was noticed.

    ``opened`` are the modules that found xFormers; ``passed_over`` says of a module why it
    could not be imported.
    """

    package: str
    modules: list[ModuleType] = field(default_factory=list, repr=False)
    parts: dict[Part, list[type]] = field(default_factory=dict, repr=False)
    opened: list[ModuleType] = field(default_factory=list, repr=False)
    passed_over: dict[str, str] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list, repr=False)

    def classes(self, part: Part) -> list[type]:
        """Return the classes that are ``part``, bases first."""
        return self.parts.get(part, [])

    def most_derived(self, part: Part) -> type | None:
        """Return the class that a hub would build with: the last one nobody derives from."""
        found = self.classes(part)
        leaves = [c for c in found if not any(c is not d and issubclass(d, c) for d in found)]
        return leaves[-1] if leaves else None

    @property
    def gates(self) -> list[ModuleType]:
        """The modules that ask, whenever they run, whether xFormers is there."""
        return [module for module in self.modules if GATE in vars(module)]

    def lacks(self, what: str) -> str:
        """Say that nothing here is ``what``, and what could not be looked at."""
        unseen = [f"{name} ({why})" for name, why in self.passed_over.items()]
        return f"{self.package} has no {what}" + (
            f" that can be imported: passed over {', '.join(unseen)}" if unseen else ""
        )

    def incomplete(self) -> str | None:
        """Say why this cannot be proved, if what makes it DINOv2 is not there."""
        if self.passed_over and self.package == UPSTREAM:
            return self.lacks("complete set of upstream's modules")
        if not self.classes(Part.ATTENTION):
            looked = ", ".join(module.__name__ for module in self.modules) or "no module"
            return (
                f"expected a class with qkv, proj, num_heads and scale, as DINOv2's attention "
                f"has; found that {self.lacks('such class')}. Looked at: {looked}. "
                "Choose another package with --package NAME."
            )
        return None

    def describe(self) -> list[str]:
        """Return lines for the head of a report."""
        where = sorted({str(Path(m.__file__ or "").parent) for m in self.modules})
        found = [c.__qualname__ for classes in self.parts.values() for c in classes]
        head = f"dinov2-attn: proving {self.package} at {', '.join(where) or 'no place'}"
        unseen = [f"passed over {name} ({why})" for name, why in self.passed_over.items()]
        lines = [f"found {', '.join(found) or 'no class'}", *self.notes, *unseen]
        return [head, *(f"dinov2-attn: {line}" for line in lines)]


# Where a run keeps the code that it proves.
CODE = pytest.StashKey[Code]()


def load(package: str, path: str | None) -> Code:
    """Import ``package``, from ``path`` if given. Raises ``pytest.UsageError``."""
    folders = _make_importable(package.partition(".")[0], path)
    code = Code(package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream announces whether it found xFormers
        _enter(code, folders)
        names = UPSTREAM_MODULES if package == UPSTREAM else _modules_with_parts(package)
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
    """Put ``path`` ahead of everything, and return the folders of the package ``top``."""
    if path is None:
        spec = importlib.util.find_spec(top)
        if spec is None:
            raise pytest.UsageError(
                f"expected a package {top} that Python finds; found none. "
                "Say where it is: --dinov2 PATH (a checkout, a site-packages folder, a wheel)."
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
    """Import the package, or walk around an ``__init__`` that cannot run here.

    Copies are vendored inside of large programs. Their attention needs PyTorch alone, and
    where the program's own dependencies are missing, its packages are entered without
    running their code.
    """
    before = set(sys.modules)
    top, *rest = code.package.split(".")
    try:
        _require_from(
            importlib.import_module(code.package), ["/".join([f, *rest]) for f in folders]
        )
        return
    except Exception as error:  # the program around the copy can raise anything
        reason = f"{type(error).__name__}: {error}"
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == top:
            del sys.modules[name]
    for depth in range(len(rest) + 1):
        name = ".".join([top, *rest[:depth]])
        _enter_bare(name, ["/".join([folder, *rest[:depth]]) for folder in folders])
    code.notes.append(f"{code.package} entered without its __init__ ({reason})")


def _require_from(module: ModuleType, expected: list[str]) -> None:
    """Refuse another copy, which wins where the one asked for has no ``__init__``."""
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
    """Name the modules of ``package`` whose source speaks of a projection."""
    module = sys.modules[package]
    if package in sys.modules and _speaks_of_parts(module.__spec__):
        yield package
    if hasattr(module, "__path__"):
        yield from _below(package, list(module.__path__))


def _below(package: str, folders: list[str]) -> Iterator[str]:
    for finder, name, is_package in pkgutil.iter_modules(folders, f"{package}."):
        if _speaks_of_parts(finder.find_spec(name, None)):
            yield name
        if is_package:
            child = name.rpartition(".")[2]
            yield from _below(name, [f"{folder}/{child}" for folder in folders])


def _speaks_of_parts(spec: importlib.machinery.ModuleSpec | None) -> bool:
    get_source = getattr(spec and spec.loader, "get_source", None)
    return get_source is not None and spec is not None and _WORD in (get_source(spec.name) or "")


def _import(code: Code, name: str) -> None:
    try:
        code.modules.append(importlib.import_module(name))
    except Exception as error:  # foreign code; what matters is missed by test_install
        code.passed_over[name] = f"{type(error).__name__}: {error}"
