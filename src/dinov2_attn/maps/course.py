"""Which blocks ran while a model was recorded, and how to record those of a partial pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dinov2_attn.typing import Layer

# Calls that a message names.
NAMED = 3


class Course:
    """The blocks of each pass, in the order in which they ran. Equal passes are kept once."""

    def __init__(self) -> None:
        self._whole: dict[tuple[Layer, ...], None] = {}
        self._partial: dict[tuple[Layer, ...], None] = {}
        self._now: list[Layer] = []

    def ran(self, layer: Layer) -> None:
        """Note that block ``layer`` ran."""
        self._now.append(layer)

    def end(self, *, whole: bool) -> None:
        """Note the end of a pass; a ``whole`` one ran all of its layers."""
        if self._now:
            (self._whole if whole else self._partial)[tuple(self._now)] = None
        self._now = []

    def describe(self, wanted: Sequence[Layer]) -> str:
        """Return which of the blocks ``wanted`` ran, and which did not."""
        ran = [layer for layer in wanted if layer in self._layers()]
        missing = [layer for layer in wanted if layer not in ran]
        changing = [i for i in ran if len({p.count(i) for p in self._passes} | {1}) > 1]
        parts = [f"{_blocks(ran)} ran" if ran else "none of them ran"]
        parts += [f"{_blocks(missing)} did not"] if missing else []
        parts += [f"{_blocks(changing)} not exactly once in each pass"] if changing else []
        others = [] if ran else [layer for layer in self._layers() if layer not in wanted]
        parts += [f"{_blocks(others)} ran instead"] if others else []
        return ", ".join(parts)

    def calls(self, wanted: Sequence[Layer]) -> list[str]:
        """Return the calls that together record every block that ran, the largest first.

        They name the blocks ``wanted``, or all blocks if none of those ran.
        """
        ran = self._layers()
        groups = self._together([i for i in wanted if i in ran] or ran)
        return [f"record(model, {group})" for group in groups]

    @property
    def _passes(self) -> tuple[tuple[Layer, ...], ...]:
        """All passes if one was partial: a call has to record the whole ones too."""
        return (*self._partial, *self._whole) if self._partial else ()

    def _layers(self) -> list[Layer]:
        found = dict.fromkeys(layer for one in self._passes for layer in one)
        return sorted(found, key=lambda layer: layer if isinstance(layer, int) else 0)

    def _together(self, layers: Iterable[Layer]) -> list[list[Layer]]:
        """Return ``layers`` in groups that ran equally often in each pass."""
        alike: dict[tuple[int, ...], list[Layer]] = {}
        for layer in layers:
            alike.setdefault(tuple(one.count(layer) for one in self._passes), []).append(layer)
        groups: list[list[Layer]] = []
        for group in alike.values():
            groups += [group] if self._are_whole(group) else [[layer] for layer in group]
        return sorted(groups, key=len, reverse=True)

    def _are_whole(self, group: list[Layer]) -> bool:
        """Return whether the blocks of ``group`` ran in turns, each once in a turn."""
        for one in self._passes:
            kept: set[Layer] = set()
            for layer in filter(group.__contains__, one):
                if layer in kept:
                    return False
                kept = kept | {layer} if len(kept) + 1 < len(group) else set()
            if kept:
                return False
        return True


def advice(calls: Sequence[str]) -> str:
    """Return the next step that names ``calls``."""
    first, *others = calls[:NAMED]
    together = "".join(f", {call} as maps_{i}" for i, call in enumerate(others, 2))
    together += ", and so on for each other block" if len(calls) > NAMED else ""
    return (
        f"Record the blocks that ran: with {first} as maps{together}. "
        "If an exception cut a pass short, let it leave the block."
    )


def _blocks(layers: Sequence[Layer]) -> str:
    return f"block{'' if len(layers) == 1 else 's'} {', '.join(map(str, layers))}"
