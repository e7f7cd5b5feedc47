"""The grafts in force, with what they replaced.

This is pytest's ``MonkeyPatch`` with two additions. Each target that needs a graft keeps it, and
only what is still ours is undone.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from weakref import ref

from dinov2_attn._locks import Life, fork_safe_lock
from dinov2_attn.errors import PatchedOnTopError

_ABSENT = object()

# A class, or the globals of a module. Not the module: functions outlive its place in sys.modules.
Owner = type | dict[str, Any]


class RecordingTarget:
    """A target that is a recording: its grafts end with it, whatever is uninstalled before."""

    def __init__(self, life: Life) -> None:
        self._life = ref(life)

    @property
    def is_left(self) -> bool:
        """Whether its block was left, or belongs to a thread that ended in a fork."""
        life = self._life()
        return life is None or (life.is_forked and not life.is_here)


@dataclass(eq=False)
class Graft:
    """What we set in an upstream class or module, what was there, and who needs it.

    It is a function, or a property of a class.

    A graft that only recordings need takes no keyword. ``install`` replaces it by its own.
    """

    owner: Owner
    name: str
    new: object
    old: object
    targets: set[Hashable]

    def __str__(self) -> str:
        if isinstance(self.owner, dict):
            return f"{self.owner.get('__name__', 'a module')}.{self.name}"
        return f"{self.owner.__module__}.{self.owner.__qualname__}.{self.name}"

    @property
    def is_kernel(self) -> bool:
        """Whether this is a module's kernel rather than a class's method."""
        return isinstance(self.owner, dict) and self.name != "forward"

    @property
    def only_records(self) -> bool:
        """Whether only recordings need it."""
        return all(isinstance(target, RecordingTarget) for target in self.targets)

    @property
    def in_force(self) -> bool:
        """Whether our function is still there, with no other patch on top."""
        return namespace_of(self.owner).get(self.name) is self.new

    @property
    def is_undone(self) -> bool:
        """Whether other code restored what was there before.

        That may be older than what we replaced: the class's own function, if a patch below ours
        was removed.
        """
        found = namespace_of(self.owner).get(self.name, _ABSENT)
        return found is self.old or _is_as_written(self.owner, self.name, found)

    def undo(self) -> None:
        """Restore the object that was there, or remove the name if there was none."""
        if self.old is not _ABSENT:
            _set(self.owner, self.name, self.old)
        elif isinstance(self.owner, dict):
            del self.owner[self.name]
        else:
            delattr(self.owner, self.name)


class GraftRegistry:
    """Grafts in the order in which they were set.

    Classes are keys, not their names: after a reload two classes go by one name, and
    live models still hold the older one.
    """

    def __init__(self) -> None:
        self._grafts: list[Graft] = []
        self._recordings: list[RecordingTarget] = []
        # For each transaction that has begun, the grafts before it.
        self.begun: list[list[Graft]] = []

    def __iter__(self) -> Iterator[Graft]:
        return iter(list(self._grafts))

    def set(self, owner: Owner, name: str, new: object, target: Hashable) -> None:
        """Set ``new`` for ``target``, and remember what it replaces.

        It replaces a graft that other code has undone, or that only recordings need, and inherits
        its targets.
        """
        graft = Graft(owner, name, new, namespace_of(owner).get(name, _ABSENT), {target})
        formers = self.find(owner, name)
        for former in formers:
            if former.in_force:
                graft.old = former.old
            graft.targets |= former.targets
        # In this order, so that an interruption or a fork in between loses no graft.
        self._grafts.append(graft)
        _set(owner, name, new)
        for former in formers:
            self._grafts.remove(former)

    def begin(self, recording: RecordingTarget) -> None:
        """Note that grafts for ``recording`` come."""
        self._recordings.append(recording)

    def heal(self) -> None:
        """Undo what an interruption kept from being undone, or a fork in another thread."""
        while self.begun:
            self.roll_back(self.begun[-1])
            self.begun.pop()
        for recording in [one for one in self._recordings if one.is_left]:
            with suppress(PatchedOnTopError):
                self.release(recording)

    def claim(self, owner: Owner, name: str, target: Hashable) -> bool:
        """Return whether there is a graft on ``owner.name``, and keep it for ``target`` too.

        What only recordings need serves no other target.
        """
        for graft in self.find(owner, name):
            fits = isinstance(target, RecordingTarget) or not graft.only_records
            if not graft.is_undone and fits:
                graft.targets.add(target)
                return True
        return False

    def roll_back(self, before: list[Graft]) -> None:
        """Undo every graft that is not in ``before``, and have those again."""
        for graft in reversed(list(self)):
            if graft not in before:
                if not graft.is_undone:  # nor set, where an interruption came first
                    graft.undo()
                for former in before:  # what only recordings need, and this one replaced
                    same = former.owner is graft.owner and former.name == graft.name
                    if same and former.only_records:
                        _set(former.owner, former.name, former.new)
        self._grafts = list(before)

    def release(self, target: Hashable, *, only_kernels: bool = False) -> None:
        """Undo what only ``target`` needs. What others need stays."""
        concerned = [graft for graft in self if graft.is_kernel or not only_kernels]
        self._undo([graft for graft in concerned if graft.targets == {target}])
        for graft in concerned:
            graft.targets.discard(target)
        self._recordings = [one for one in self._recordings if one is not target]

    def release_all(self) -> None:
        """Undo everything. What recordings in progress need stays until they end."""
        for graft in self:
            recordings: set[Hashable] = {t for t in graft.targets if isinstance(t, RecordingTarget)}
            if recordings:
                graft.targets = recordings
        self._undo([graft for graft in self if not graft.only_records])

    def original(self, owner: Owner, name: str) -> object:
        """Return what ``owner`` holds by ``name``, below our graft on it."""
        ours = self.find(owner, name)
        return next((g.old for g in ours if not g.is_undone), namespace_of(owner)[name])

    def find(self, owner: Owner, name: str) -> list[Graft]:
        """Return the grafts on ``owner.name``: one, and those that other code undid."""
        return [graft for graft in self if graft.owner is owner and graft.name == name]

    def _undo(self, leaving: list[Graft]) -> None:
        """Undo all of it, or nothing if another patch is on top."""
        _refuse_if_covered(
            [g for g in leaving if not (g.in_force or g.is_undone or self._is_replaced(g))]
        )
        for graft in reversed(list(leaving)):
            if graft.in_force:
                graft.undo()
            self._grafts.remove(graft)

    def _is_replaced(self, graft: Graft) -> bool:
        """Return whether another graft of ours took its place, and was interrupted then."""
        return any(other.in_force for other in self.find(graft.owner, graft.name))


def _set(owner: Owner, name: str, value: object) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


def namespace_of(owner: Owner) -> Mapping[str, Any]:
    """Return the attributes of ``owner`` itself, by name."""
    return owner if isinstance(owner, dict) else vars(owner)


def _is_as_written(owner: Owner, name: str, found: object) -> bool:
    """Return whether ``found`` is the function in the body of the class.

    A patch has other globals, another name, or the attribute ``__wrapped__``.
    """
    return (
        isinstance(owner, type)
        and isinstance(found, FunctionType)
        and found.__globals__.get("__name__") == owner.__module__
        and found.__qualname__ == f"{owner.__qualname__}.{name}"
        and not hasattr(found, "__wrapped__")
    )


def _refuse_if_covered(covered: list[Graft]) -> None:
    if not covered:
        return
    found = namespace_of(covered[0].owner).get(covered[0].name, "nothing")
    raise PatchedOnTopError(
        f"the graft of dinov2_attn at {', '.join(map(str, covered))}",
        f"{found!r}, set by other code on top of it",
        "Nothing was undone. Take that patch off first, then call uninstall() again.",
    )


LOCK = fork_safe_lock()
REGISTRY = GraftRegistry()


@contextmanager
def locked() -> Iterator[None]:
    """Hold ``LOCK`` inside, after what an interruption left over was undone."""
    is_inner = LOCK._is_owned()
    with LOCK:
        if not is_inner:
            REGISTRY.heal()
        yield
