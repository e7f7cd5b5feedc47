"""The code to be proved: its modules, its classes by part, and what was noticed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from dinov2_attn.backbone.structure import Role
from dinov2_attn.grafting.targets import UPSTREAM

# The global by which upstream decides, whenever it runs, whether to call xFormers.
GATE = "XFORMERS_AVAILABLE"


@dataclass
class Code:
    """One copy of the code, imported, and its classes as the plugin finds them.

    ``opened`` are the modules that found xFormers; ``passed_over`` says of a module why it
    could not be imported.
    """

    package: str
    modules: list[ModuleType] = field(default_factory=list, repr=False)
    parts: dict[Role, list[type]] = field(default_factory=dict, repr=False)
    opened: list[ModuleType] = field(default_factory=list, repr=False)
    passed_over: dict[str, str] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list, repr=False)

    def classes(self, part: Role) -> list[type]:
        """Return the classes that are ``part``, bases first."""
        return self.parts.get(part, [])

    def most_derived(self, part: Role) -> type | None:
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
        if not self.classes(Role.ATTENTION):
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
