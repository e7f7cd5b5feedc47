"""Identify the revision of upstream below the grafts, and what differs from it.

This never replaces the proof. Unknown code that passes the proof is grafted, and reported as
unknown.
"""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov2_attn.errors import UpstreamDriftWarning
from dinov2_attn.history import eras
from dinov2_attn.history.digests import digest_of
from dinov2_attn.history.eras import Code
from dinov2_attn.history.projects import (
    ATTENTION,
    BLOCKS,
    DINOV2,
    MODELS,
    PROJECTS,
    Project,
    project_of,
)

# What a class or a module's globals hold by a name, below our graft on it.
Owner = type | dict[str, Any]
Original = Callable[[Owner, str], object]

_PROVED = "verified by contract and behaviour"


@dataclass(frozen=True)
class FunctionDigest:
    """A function that the grafts rely on, with its digest, ``None`` without source.

    ``author`` is the module of the function, if it is of another package than the class.
    """

    name: str
    digest: str | None
    author: str = ""

    def __str__(self) -> str:
        return self.name + (f" (of {self.author})" if self.author else "")


def recognise(original: Original, classes: Iterable[type]) -> str:
    """Return which revisions have the code of ``classes``, which were proved at install.

    ``attention and blocks as in 12592a9 … 7764ea0 (2025-06-11 … 2026-06-03), verified``;
    if upstream never had that code, what of it is upstream's and what is not.
    """
    classes = list(classes)
    project = project_of(classes)
    seen = _look_at_all(original, project, classes)
    pair = [*seen[ATTENTION], *seen[BLOCKS]]
    if seen[ATTENTION] and seen[BLOCKS] and eras.agreeing(_code(pair), project):
        parts = [_say(f"{ATTENTION} and {BLOCKS}", pair, project)]
    else:
        sections = (ATTENTION, BLOCKS)
        parts = [_say(section, seen[section], project) for section in sections if seen[section]]
    if seen[MODELS]:
        parts.append(_say(MODELS, seen[MODELS], project))
    known = {name for section in project.relied_on.values() for name in section}
    parts += [
        f"{cls.__module__}.{cls.__qualname__} {_PROVED}"
        for cls in classes
        if cls.__name__ not in known
    ]
    return "; ".join(parts)


def is_known(original: Original, cls: type) -> bool:
    """Return whether some revision of upstream has the very code of ``cls``."""
    project = project_of([cls])
    found = [f for part in _look_at_all(original, project, [cls]).values() for f in part]
    if not found or any(function.digest is None for function in found):
        return False
    return bool(eras.agreeing(_code(found), project))


def warn_of_drift(original: Original, target: Hashable, classes: Iterable[type]) -> None:
    """Warn if upstream's own package holds code that no revision known here does.

    Forks are not warned of: other packages, and packages of the same name that do not keep what
    only the latest code of upstream has. A package is judged when all of it is imported, so that
    one warning names every change.
    """
    classes = list(classes)
    for project in PROJECTS:
        own = [cls for cls in classes if _package(cls.__module__) == project.package]
        if own:
            _warn_of(project, original, own, whole=isinstance(target, str))


def _warn_of(project: Project, original: Original, own: list[type], *, whole: bool) -> None:
    seen = _look_at_all(original, project, own)
    found = [function for section in seen.values() for function in section]
    if (whole and not all(seen.values())) or any(s.digest is None for s in found):
        return
    shared = eras.shared_with_nearest(_code(found), project)
    if not eras.are_latest(eras.agreeing(shared, project), project):
        return
    changed = [*_unmatched(shared, found), *(_missing(shared, found, project) if whole else ())]
    if changed:
        warnings.warn(
            f"{project} is no revision of upstream that is known here. It is as in "
            f"{eras.span(eras.agreeing(shared, project), project)} but for {', '.join(changed)}. "
            "Weights are still proved, so it works. "
            f"To report it: dinov2-attn verify {_checkout(project)} --update",
            UpstreamDriftWarning,
            stacklevel=3,
        )


def _say(what: str, functions: list[FunctionDigest], project: Project) -> str:
    if any(function.digest is None for function in functions):
        return f"{what} {_PROVED}, source not available"
    code = _code(functions)
    shared = eras.shared_with_nearest(code, project)
    if not shared:
        return f"{what} as in no known revision, {_PROVED}"
    span = eras.span(eras.agreeing(shared, project), project)
    text = f"{what} as in {span}{project.owner}"
    if shared == code:
        return f"{text}, verified"
    return f"{text} but for {', '.join(_unmatched(shared, functions))}, {_PROVED}"


def _look_at_all(
    original: Original, project: Project, classes: list[type]
) -> dict[str, list[FunctionDigest]]:
    return {s: _look(original, names, classes) for s, names in project.relied_on.items()}


def _look(
    original: Original, names: Mapping[str, tuple[str, ...]], classes: list[type]
) -> list[FunctionDigest]:
    """Return the functions of ``classes`` by upstream's names, without duplicates."""
    seen = [
        s for cls in classes for s in _function_digests(original, cls, names.get(cls.__name__, ()))
    ]
    return list(dict.fromkeys(seen))


def _function_digests(
    original: Original, cls: type, names: Iterable[str]
) -> Iterator[FunctionDigest]:
    module: dict[str, Any] = {}  # where `cls` was written, by way of its functions
    for name in names:
        head, _, last = name.rpartition(".")
        owner = cls if head == cls.__name__ else module.get(head, module)
        function = _find(original, owner, last)
        if function is None:  # then what called it has another digest too
            continue
        scope = getattr(function, "__globals__", {})
        author = scope.get("__name__", "")
        if author == cls.__module__:
            module = scope
        foreign = _package(author) != _package(cls.__module__)
        yield FunctionDigest(name, digest_of(function), author if foreign else "")


def _find(original: Original, owner: Owner, name: str) -> object:
    """Return what a class or a module's globals hold by ``name``, without our graft on it."""
    places = owner.__mro__ if isinstance(owner, type) else (owner,)
    for place in places:
        if name in (vars(place) if isinstance(place, type) else place):
            found = original(place, name)
            return found.__func__ if isinstance(found, staticmethod) else found
    return None


def _code(functions: Iterable[FunctionDigest]) -> Code:
    return frozenset((function.name, function.digest or "") for function in functions)


def _unmatched(shared: Code, functions: list[FunctionDigest]) -> list[str]:
    return [str(s) for s in functions if (s.name, s.digest) not in shared]


def _missing(shared: Code, functions: list[FunctionDigest], project: Project = DINOV2) -> list[str]:
    """Return what a package lacks. A missing method is inherited from known code."""
    names = {function.name for function in functions}
    missing = (sorted({*era.digests} - names) for era in eras.agreeing(shared, project))
    return [f"{name} (gone)" for name in min(missing, key=len)]


def _checkout(project: Project) -> str:
    """Return the folder that the project was imported from, quoted for a shell."""
    init = getattr(sys.modules.get(project.package), "__file__", None)
    return shlex.quote(str(Path(init).parent.parent)) if init else "PATH"


def _package(module: str) -> str:
    return module.partition(".")[0]
