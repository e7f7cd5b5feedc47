"""The tested code: its modules, its classes by part, and notes for the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from dinov2_attn.backbone.structure import Role
from dinov2_attn.grafting.targets import MODULES

# The global that upstream checks in every pass before it calls xFormers.
GATE = "XFORMERS_AVAILABLE"


@dataclass
class Code:
    """One imported copy of the code, and its classes as the plugin finds them.

    Attributes:
        package: The name of the package.
        modules: Its modules that define classes of DINOv2.
        parts: The classes by part, bases first.
        opened: The modules that found xFormers.
        passed_over: The modules that could not be imported, with the reason.
        notes: Lines for the head of the report.
        left_out: The classes that ``install`` leaves out, with the reasons.

    """

    package: str
    modules: list[ModuleType] = field(default_factory=list, repr=False)
    parts: dict[Role, list[type]] = field(default_factory=dict, repr=False)
    opened: list[ModuleType] = field(default_factory=list, repr=False)
    passed_over: dict[str, str] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list, repr=False)
    left_out: dict[str, str] = field(default_factory=dict, repr=False)

    def classes(self, part: Role) -> list[type]:
        """Return the classes that are ``part``, bases first."""
        return self.parts.get(part, [])

    def most_derived(self, part: Role) -> type | None:
        """Return the last class without subclasses, which a hub would build with."""
        found = self.classes(part)
        leaves = [c for c in found if not any(c is not d and issubclass(d, c) for d in found)]
        return leaves[-1] if leaves else None

    @property
    def gates(self) -> list[ModuleType]:
        """The modules that check for xFormers in every pass."""
        return [module for module in self.modules if GATE in vars(module)]

    def lacks(self, what: str) -> str:
        """Return the reason that there is no ``what``, with the modules that were not imported."""
        unseen = [f"{name} ({why})" for name, why in self.passed_over.items()]
        return f"{self.package} has no {what}" + (
            f" that can be imported: passed over {', '.join(unseen)}" if unseen else ""
        )

    def incomplete(self) -> str | None:
        """Return why the code cannot be tested; ``None`` if it can."""
        if self.passed_over and self.package in MODULES:
            return self.lacks("complete set of upstream's modules")
        if not self.classes(Role.ATTENTION):
            looked = ", ".join(module.__name__ for module in self.modules) or "no module"
            return (
                f"expected a class with qkv, proj and num_heads, as DINOv2's attention "
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


# The key of the tested code in pytest's configuration.
CODE = pytest.StashKey[Code]()
