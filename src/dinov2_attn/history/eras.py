"""Upstream's history: in which commits the functions changed that the grafts rely on.

``eras.json`` and ``eras_dinov3.json`` in this folder have one entry for each era: commits between
which none of these functions changed, and the digests that differ from the era before. These
projects have no releases and never changed their version, so only the code identifies a revision.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby

from dinov2_attn.history.digests import digests_in
from dinov2_attn.history.projects import ATTENTION, BLOCKS, DINOV2, Project

# Functions by name with their digests.
Code = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Commit:
    """One commit of upstream: seven digits of its hash and the day of its commit."""

    name: str
    date: str

    def __str__(self) -> str:
        return f"{self.name} {self.date}"


@dataclass(frozen=True)
class Era:
    """Commits in a row with the same code, oldest first, and the digests of that code."""

    commits: tuple[Commit, ...]
    digests: Mapping[str, str]

    @property
    def code(self) -> Code:
        """The digests as a set that others can be compared with."""
        return frozenset(self.digests.items())


@cache
def table(project: Project = DINOV2) -> tuple[Era, ...]:
    """Return the eras of ``project``, oldest first."""
    return loads(files(__package__).joinpath(project.table).read_text(encoding="utf-8"))


def agreeing(code: Code, project: Project = DINOV2) -> list[Era]:
    """Return the eras that hold all of ``code``."""
    return [era for era in table(project) if code <= era.code]


def shared_with_nearest(code: Code, project: Project = DINOV2) -> Code:
    """Return what ``code`` has in common with the era that it agrees with most."""
    return max((code & era.code for era in table(project)), key=len)


def are_latest(eras: Iterable[Era], project: Project = DINOV2) -> bool:
    """Return whether all of ``eras`` have the attention and the blocks of the newest one.

    A new revision of upstream is nearest to these. A fork is nearest to older ones, or shares only
    what many have.
    """
    relied_on = {
        name for part in (ATTENTION, BLOCKS) for f in project.relied_on[part].values() for name in f
    }
    latest = frozenset(item for item in table(project)[-1].code if item[0] in relied_on)
    return all(latest <= era.code for era in eras)


def span(eras: Iterable[Era], project: Project = DINOV2) -> str:
    """Return a range as text: ``12592a9 … 7764ea0 (2025-06-11 … 2026-06-03)``."""
    every = table(project)
    places = sorted(every.index(era) for era in eras)
    # A change that was reverted later leaves two ranges with a gap between them.
    runs = groupby(enumerate(places), key=lambda item: item[1] - item[0])
    return " or ".join(_run([every[place] for _, place in run]) for _, run in runs)


def propose(
    eras: Sequence[Era], digests: Mapping[str, str], commit: str, date: str
) -> tuple[Era, ...]:
    """Return the eras with one more commit: in the newest one, or in an era of its own.

    ``digests`` are those of ``digests_at``, ``commit`` its hash and ``date`` a day such as
    ``2025-08-14``. ``dumps`` writes the result as the text of ``eras.json``.
    """
    new = Commit(commit[:7], date)
    if eras and eras[-1].digests == digests:
        return (*eras[:-1], Era((*eras[-1].commits, new), digests))
    return (*eras, Era((new,), dict(digests)))


def digests_at(read: Callable[[str], str | None], project: Project = DINOV2) -> dict[str, str]:
    """Return the digests of a revision whose files ``read(path)`` returns, ``None`` if absent."""
    digests: dict[str, str] = {}
    for section, names in project.functions.items():
        digests |= digests_in(read(project.files[section]) or "", names)
    return digests


def loads(text: str) -> tuple[Era, ...]:
    """Read eras from the text of ``eras.json``."""
    eras: list[Era] = []
    digests: dict[str, str] = {}
    for entry in json.loads(text):
        changed = {**digests, **entry["changed"]}
        digests = {name: digest for name, digest in changed.items() if digest is not None}
        commits = (Commit(*commit.split()) for commit in entry["commits"])
        eras.append(Era(tuple(commits), digests))
    return tuple(eras)


def dumps(eras: Sequence[Era]) -> str:
    """Write eras as the text of ``eras.json``; a function that is gone becomes ``null``."""
    entries = []
    before: Mapping[str, str] = {}
    for era in eras:
        names = sorted({*before, *era.digests})
        changed = {n: era.digests.get(n) for n in names if before.get(n) != era.digests.get(n)}
        entries.append({"commits": [str(commit) for commit in era.commits], "changed": changed})
        before = era.digests
    return json.dumps(entries, indent=1) + "\n"


def _run(eras: Sequence[Era]) -> str:
    first, last = eras[0].commits[0], eras[-1].commits[-1]
    if first == last:
        return f"{first.name} ({first.date})"
    return f"{first.name} … {last.name} ({first.date} … {last.date})"
