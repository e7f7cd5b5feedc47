"""Facts about results in few words, for ``repr`` and notebooks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from dinov2_attn.math.selection import name_token
from dinov2_attn.typing import Grid, Layer

# Entries of a list that are shown.
SHOWN = 4


def listed(parts: Sequence[str]) -> str:
    """Return the first of ``parts`` in one line, and how many follow."""
    more = [f"and {len(parts) - SHOWN} more"] if len(parts) > SHOWN else []
    return ", ".join([*parts[:SHOWN], *more])


def shapes(entries: Iterable[object]) -> str:
    """Return the shapes of ``entries``, each once, or the type of what has no shape."""
    return listed(list(dict.fromkeys(map(_shape, entries)))) or "none"


def layers(names: Sequence[Layer]) -> str:
    """Return the numbers of blocks as ranges, ``0–3, 7``, or the first and the last path."""
    numbers = [name for name in names if isinstance(name, int)]
    if len(numbers) == len(names):
        return ranges(numbers)
    return " … ".join(map(str, dict.fromkeys((names[0], names[-1]))))


def ranges(numbers: Sequence[int]) -> str:
    """Return ``numbers`` with consecutive ones as a range: ``0–3, 7``."""
    starts = [i for i, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1]
    runs = [numbers[a:b] for a, b in pairwise([0, *starts, len(numbers)])]
    parts = [f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs if run]
    return listed(parts) or "none"


def size(grid: Grid | None) -> str:
    """Return a patch grid as ``37×37``."""
    return "unknown" if grid is None else "×".join(map(str, grid))


def tokens(queries: Sequence[int] | None, prefix: int, grid: Grid | None) -> str:
    """Return the names of the tokens at the positions ``queries``."""
    if queries is None or (grid is not None and _are_all(queries, prefix, grid)):
        return "all"
    named = [
        f"#{query}"
        if grid is None and query >= prefix
        else name_token(query, prefix, grid or (1, 1))
        for query in queries[: SHOWN + 1]
    ]
    return f"[{listed([*named, *[''] * (len(queries) - len(named))])}]"


def values(tensor: Any) -> str:
    """Return the elements of a tensor of one dimension."""
    if getattr(tensor, "is_meta", False):
        return "unknown"
    return f"[{listed([str(value) for value in tensor.tolist()])}]"


def _are_all(queries: Sequence[int], prefix: int, grid: Grid) -> bool:
    return tuple(queries) == tuple(range(prefix + math.prod(grid)))


def _shape(entry: object) -> str:
    shape = getattr(entry, "shape", None)
    return type(entry).__name__ if shape is None else str(tuple(shape))
