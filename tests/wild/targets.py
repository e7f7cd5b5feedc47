"""Every target by its name."""

from __future__ import annotations

from tests.wild.built_apart import BUILT_APART
from tests.wild.on_github import ON_GITHUB
from tests.wild.on_pypi import ON_PYPI
from tests.wild.target import Target

ALL: list[Target] = [*ON_PYPI, *ON_GITHUB, *BUILT_APART]


def named(name: str) -> Target:
    """Return the target of this name; exit with the names there are."""
    for target in ALL:
        if target.name == name:
            return target
    raise SystemExit(f"no target {name!r}; there are: {', '.join(t.name for t in ALL)}")
