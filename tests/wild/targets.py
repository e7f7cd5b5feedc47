"""Every target by its name."""

from __future__ import annotations

from tests.wild.projects import (
    geometry,
    libraries,
    lightly,
    meta,
    recognition,
    uniception,
    wheels,
)
from tests.wild.target import Target

ON_PYPI: list[Target] = [*wheels.TARGETS, *lightly.TARGETS, *libraries.TARGETS]
ON_GITHUB: list[Target] = [
    *meta.TARGETS,
    *geometry.TARGETS,
    *recognition.TARGETS,
    *uniception.TARGETS,
]
ALL: list[Target] = [*ON_PYPI, *ON_GITHUB]


def named(name: str) -> Target:
    """Return the target of this name; exit with the names there are."""
    for target in ALL:
        if target.name == name:
            return target
    raise SystemExit(f"no target {name!r}; there are: {', '.join(t.name for t in ALL)}")
