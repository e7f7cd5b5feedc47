"""What classes should hold after any event, worked out from the contract and not from the registry.

A slot is one name of one class. Everybody who patches it remembers what was there: we as well as
others. Classes are found by upstream's names, not by the structure that the package reads.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dinov2_attn.grafting.targets import UPSTREAM_MODULES
from tests.support.upstreams import FIRST, Upstream

ABSENT = object()
METHODS = ("get_self_attention", "get_last_self_attention", "get_last_selfattention")
TRANSFORMER = ("forward_features", "forward", *METHODS)
BLOCKS = ("Block", "NestedTensorBlock", "CausalAttentionBlock")
ATTENTIONS = ("Attention", "MemEffAttention")
# What is grafted, by the class's name.
GRAFTED = {
    **dict.fromkeys((*ATTENTIONS, *BLOCKS), ("forward",)),
    "DinoVisionTransformer": TRANSFORMER,
}


@dataclass(eq=False)
class Graft:
    """A function of ours, what it replaced, and the targets that need it."""

    new: Any
    old: Any
    targets: set[Hashable]


@dataclass(eq=False)
class Slot:
    """One name of one class: what it should hold now, and our graft on it if there is one."""

    owner: type
    name: str
    now: Any
    written: Any  # by upstream
    graft: Graft | None = None

    def __str__(self) -> str:
        return f"{self.owner.__module__}.{self.owner.__qualname__}.{self.name}"

    def held(self) -> Any:
        """Return what the class really holds."""
        return vars(self.owner).get(self.name, ABSENT)

    def put(self, what: Any) -> None:
        """Patch the class as third-party code does, without this package."""
        if what is ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, what)
        self.now = what

    @property
    def in_force(self) -> bool:
        return self.graft is not None and self.now is self.graft.new

    @property
    def is_covered(self) -> bool:
        """Whether something is there that is neither ours nor what was below."""
        return self.graft is not None and not (self.in_force or self.is_undone)

    @property
    def is_undone(self) -> bool:
        """Whether third-party code restored what was below our graft, or below all patches."""
        return self.graft is not None and self.now in (self.graft.old, self.written)

    @property
    def answers(self) -> bool:
        """Whether a call gets to our graft, through patches that pass everything on."""
        function = self.now
        while function is not ABSENT and self.graft is not None:
            if function is self.graft.new:
                return True
            function = getattr(function, "__wrapped__", ABSENT)
        return False

    def leave(self) -> None:
        assert self.graft is not None
        if self.in_force:
            self.now = self.graft.old
        self.graft = None

    def graft_for(self, target: Hashable) -> None:
        """Expect our graft for ``target``: a new one unless one is still in place."""
        graft = self.graft
        if graft is None or self.is_undone:
            new = self.held()
            assert new is not self.now, f"{self} was not grafted"
            assert self.now is ABSENT or getattr(new, "__wrapped__", ABSENT) is self.now
            self.graft = Graft(new, self.now, graft.targets if graft else set())
            self.now = new
        self.graft.targets.add(target)


@dataclass
class Expected:
    """Every class ever met, and who has asked for what."""

    slots: dict[tuple[type, str], Slot] = field(default_factory=dict)
    bare: dict[type, dict[str, Any]] = field(default_factory=dict)
    installed: set[str] = field(default_factory=set)

    @property
    def grafted(self) -> list[Slot]:
        return [slot for slot in self.slots.values() if slot.graft is not None]

    @property
    def targets(self) -> set[Hashable]:
        return {target for slot in self.grafted for target in slot.graft.targets}

    def meet(self, classes: Iterable[type]) -> None:
        """Note what new classes hold without us; those of a watched import have our grafts."""
        for cls in classes:
            if cls in self.bare:
                continue
            self.bare[cls] = dict(vars(cls))
            for name in GRAFTED[cls.__name__]:
                held = vars(cls).get(name, ABSENT)
                written = ABSENT if name in METHODS else getattr(held, "__wrapped__", held)
                if name in METHODS or held is not ABSENT:  # forward_features may be inherited
                    self.slots[cls, name] = Slot(cls, name, written, written)

    def graft(self, target: Hashable, classes: Iterable[type]) -> None:
        """Expect ``classes`` grafted for ``target``."""
        for cls in classes:
            for slot in self.slots_of(cls):
                slot.graft_for(target)

    def slots_of(self, cls: type) -> list[Slot]:
        return [slot for (owner, _), slot in self.slots.items() if owner is cls]

    def release(self, target: Hashable) -> bool:
        """Expect ``target`` gone; ``False``, and nothing done, where a patch is on top."""
        leaving = [slot for slot in self.grafted if slot.graft.targets == {target}]
        if any(slot.is_covered for slot in leaving):
            return False
        for slot in leaving:
            slot.leave()
        for slot in self.grafted:
            slot.graft.targets.discard(target)
        return True

    def release_all(self) -> bool:
        """Expect everything gone, or nothing."""
        if any(slot.is_covered for slot in self.grafted):
            return False
        for slot in self.grafted:
            slot.leave()
        self.installed.clear()
        return True


def may_be_patched(slot):
    """Below our graft there must be something to patch."""
    return slot.in_force or slot.now is not ABSENT


def pending(upstream, expected):
    """Say what is awaited: upstream's own modules, or a copy of which nothing is grafted."""
    if upstream is FIRST:
        return [name for name in UPSTREAM_MODULES if name not in sys.modules]
    return [] if upstream.package in expected.targets else [upstream.package]


def watched(upstream: Upstream) -> list[str]:
    """Name the modules of ``upstream`` that are imported, of those that ``install`` reads."""
    if upstream is FIRST:
        return [name for name in UPSTREAM_MODULES if name in sys.modules]
    inside = (upstream.package, f"{upstream.package}.")
    return [name for name in sys.modules if name == inside[0] or name.startswith(inside[1])]


def visible(upstream: Upstream) -> list[type]:
    """Return the classes to be grafted that those modules work with, old ones among them."""
    values = [v for name in watched(upstream) for v in vars(sys.modules[name]).values()]
    return _known(v for v in values if isinstance(v, type) and issubclass(v, nn.Module))


def behind(model: nn.Module) -> list[type]:
    """Return the classes to be grafted whose code ``model`` runs."""
    return _known(type(module) for module in model.modules())


def first_forward(module: nn.Module) -> type:
    """Return the class whose ``forward`` runs for ``module``."""
    return next(cls for cls in type(module).__mro__ if "forward" in vars(cls))


def _known(classes: Iterable[type]) -> list[type]:
    bases = [base for cls in classes for base in cls.__mro__ if base.__name__ in GRAFTED]
    return list(dict.fromkeys(bases))
