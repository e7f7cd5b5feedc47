"""The targets of ``install``: a live model, or a package that is or will be imported."""

from __future__ import annotations

import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dinov2_attn._compat_imports import is_initializing
from dinov2_attn.errors import IncompatibleUpstreamError

if TYPE_CHECKING:
    from dinov2_attn.backbone.structure import Role


@dataclass(frozen=True)
class LiveModel:
    """The classes behind a model: two models of the same classes are one target."""

    label: str
    classes: frozenset[type]

    def __str__(self) -> str:
        return self.label


@dataclass(eq=False)
class Package:
    """A package whose classes are to be grafted, and the error if that failed.

    ``modules`` gives the role that each module must have. Without it the whole package is
    searched.
    """

    name: str
    modules: dict[str, str] = field(default_factory=dict)
    fallback: bool = True
    failure: Exception | None = None

    def covers(self, module: str) -> bool:
        """Return whether ``module`` is one to search."""
        if self.modules:
            return module in self.modules
        return module == self.name or module.startswith(f"{self.name}.")

    def pending(self, grafted: bool) -> list[str]:
        """Return what is not imported yet: modules of upstream, or a package without grafts."""
        if self.modules:
            return [name for name in self.modules if name not in sys.modules]
        return [] if grafted else [self.name]

    def is_complete(self, arrived: ModuleType | None = None) -> bool:
        """Return whether no module that could hold classes to graft remains to be imported."""
        modules = self.imported()
        if self.modules or self.name not in modules:
            return False
        begun = any(m is not arrived and is_initializing(m) for m in modules.values())
        return not (begun or any(map(_may_come, modules.values())))

    def imported(self) -> dict[str, ModuleType]:
        """Return by name what has been imported, or is being imported."""
        # A copy, made at once: other threads import meanwhile.
        modules = sys.modules.copy()
        return {name: m for name, m in modules.items() if m is not None and self.covers(name)}

    def classes(self, arrived: ModuleType | None = None) -> Iterator[tuple[type, Role]]:
        """Yield the classes to graft in every complete module, ``arrived`` included."""
        # Not above: nothing here imports torch before upstream has.
        from dinov2_attn.backbone.structure import classes_in

        for name, module in self.imported().items():
            if module is arrived or not is_initializing(module):
                found = dict(classes_in(module))
                needed = self.modules.get(name)
                if needed is not None and needed not in {role.name for role in found.values()}:
                    raise _missing(needed, name)
                yield from found.items()


# In the source of every module that defines an attention class: `self.qkv = …`.
_PROJECTION = re.compile(r"\.qkv\b")


def _may_come(module: ModuleType) -> bool:
    """Return whether a module below the package ``module``, not imported yet, may have attention.

    Packages below that are imported are asked themselves.
    """
    return _may_come_below(module.__name__, getattr(module, "__path__", ()))


def _may_come_below(package: str, places: Iterable[str]) -> bool:
    return any(
        _may_attend(finder, name)
        for finder, name, _ in pkgutil.iter_modules(list(places), f"{package}.")
        if name not in sys.modules
    )


def _may_attend(finder: Any, module: str) -> bool:
    """Return whether the source of ``module``, or below it, has a projection or is hidden."""
    spec = finder.find_spec(module)
    get_source = getattr(spec and spec.loader, "get_source", lambda _: None)
    source = get_source(module)
    if source is None or _PROJECTION.search(source):
        return True
    return _may_come_below(module, spec.submodule_search_locations or ())


def _missing(role: str, module: str) -> IncompatibleUpstreamError:
    return IncompatibleUpstreamError(
        f"a class in {module} with the structure of upstream's {role.lower()}",
        "none",
        "Upstream moved or renamed them: call install(model) with a live model instead.",
    )


# Other modules of these projects have attention of others (adapters and detectors in eval/), so
# their places are named. A vendored copy is searched.
UPSTREAM_MODULES = {
    "dinov2.layers.attention": "ATTENTION",
    "dinov2.layers.block": "BLOCK",
    "dinov2.models.vision_transformer": "TRANSFORMER",
}
DINOV3_MODULES = {
    "dinov3.layers.attention": "ATTENTION",
    "dinov3.layers.block": "BLOCK",
    "dinov3.models.vision_transformer": "TRANSFORMER",
}
# By the name of the package.
MODULES = {"dinov2": UPSTREAM_MODULES, "dinov3": DINOV3_MODULES}
