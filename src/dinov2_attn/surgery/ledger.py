"""The list of grafts in force, with what they replaced.

pytest's ``MonkeyPatch`` with two additions: an entry is kept by every target that needs
it, and only what is still ours is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

from dinov2_attn.errors import PatchedOnTop

_ABSENT = object()


@dataclass(eq=False)
class Graft:
    """A function of ours on an upstream class, what stood there before, and who needs it."""

    owner: type
    name: str
    new: Callable[..., object]
    old: object
    targets: set[Hashable]

    def __str__(self) -> str:
        return f"{self.owner.__module__}.{self.owner.__qualname__}.{self.name}"

    @property
    def in_force(self) -> bool:
        """Whether the class still holds our function, and nobody's on top of it."""
        return vars(self.owner).get(self.name) is self.new

    @property
    def is_undone(self) -> bool:
        """Whether somebody put back what was there: their own undo reached past ours."""
        return vars(self.owner).get(self.name, _ABSENT) is self.old

    def undo(self) -> None:
        """Put back the very object that was there, or nothing where nothing was."""
        if self.old is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.old)


class Ledger:
    """Grafts in the order in which they were set.

    Classes are keys, not their names: after a reload two classes go by one name, and
    live models still hold the older one.
    """

    def __init__(self) -> None:
        self._grafts: list[Graft] = []

    def __iter__(self) -> Iterator[Graft]:
        return iter(list(self._grafts))

    def set(self, owner: type, name: str, new: Callable[..., object], target: Hashable) -> None:
        """Put ``new`` on the class for ``target``, remembering what it replaces."""
        graft = Graft(owner, name, new, vars(owner).get(name, _ABSENT), {target})
        setattr(owner, name, new)
        self._grafts.append(graft)

    def keep(self, owner: type, name: str, target: Hashable) -> bool:
        """Note that ``target`` needs the graft on ``owner.name``; say whether there is one."""
        for graft in self:
            if graft.owner is owner and graft.name == name:
                if graft.is_undone:
                    self._grafts.remove(graft)
                    return False
                graft.targets.add(target)
                return True
        return False

    def roll_back(self, before: list[Graft]) -> None:
        """Undo every graft that is not in ``before``: those that an operation has just set."""
        for graft in self:
            if graft not in before:
                graft.undo()
                self._grafts.remove(graft)

    def release(self, target: Hashable) -> None:
        """Undo what only ``target`` needs; what others need too stays for them."""
        self._undo([graft for graft in self._grafts if graft.targets == {target}])
        for graft in self._grafts:
            graft.targets.discard(target)

    def release_all(self) -> None:
        """Undo everything."""
        self._undo(self._grafts)

    def _undo(self, leaving: list[Graft]) -> None:
        """Undo all of it or, where somebody patched on top, nothing."""
        _refuse_if_covered([g for g in leaving if not (g.in_force or g.is_undone)])
        for graft in list(leaving):
            if graft.in_force:
                graft.undo()
            self._grafts.remove(graft)


def _refuse_if_covered(covered: list[Graft]) -> None:
    if not covered:
        return
    found = vars(covered[0].owner).get(covered[0].name, "nothing")
    raise PatchedOnTop(
        f"the graft of dinov2_attn at {', '.join(map(str, covered))}",
        f"{found!r}, set by somebody else on top of it",
        "Nothing was undone. Take that patch off first, then call uninstall() again.",
    )
