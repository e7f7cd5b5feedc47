"""Which rows a page keeps of each layer, so that it does not grow beyond a size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from dinov2_attn.errors import InvalidInputError
from dinov2_attn.math.selection import name_token

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Shape:
    """What there is of every layer: so many heads, rows of these tokens, ``tokens`` columns.

    ``heads`` is 0 where there is only the mean of heads.
    """

    heads: int
    queries: tuple[int, ...]
    prefix: int
    grid: tuple[int, int]

    @property
    def tokens(self) -> int:
        """The number of columns N."""
        return self.prefix + self.grid[0] * self.grid[1]

    @property
    def all_tokens(self) -> tuple[int, ...]:
        """The positions of all tokens."""
        return tuple(range(self.tokens))


@dataclass(frozen=True)
class Keep:
    """The tokens whose rows are kept of one layer: for each head, and for the mean of heads."""

    each: tuple[int, ...] = ()
    mean: tuple[int, ...] = ()

    @property
    def queries(self) -> set[int]:
        """The tokens of which anything is kept."""
        return {*self.each, *self.mean}


NOTHING = Keep()


def everything(shape: Shape) -> Keep:
    """Return all there is: the mean need not be kept where all heads are."""
    return Keep(each=shape.queries) if shape.heads else Keep(mean=shape.queries)


def cost(keep: Keep, shape: Shape) -> int:
    """Return the number of bytes, as base64 and with its description, that ``keep`` takes."""
    return _table(keep.each, shape.heads, shape) + _table(keep.mean, 1, shape)


def plan(layers: Sequence[int], shape: Shape, room: int) -> dict[int, Keep]:
    """Return what is kept of each layer, at most ``room`` bytes together.

    In this order, while it fits: the CLS row of each head of every layer, from the last
    layer to the first; the rows of the registers; then, again from the last layer on, all
    rows of each head, or else all rows of the mean of heads. Where there are no rows of CLS
    and registers, the first row takes their place. Raises ``InvalidInputError`` if not one row of
    the last layer fits.
    """
    few, full = _choices(shape)
    kept = dict.fromkeys(layers, NOTHING)
    used = 0
    for choices in (*([one] for one in few), full):
        for layer in reversed(layers):
            for choice in choices:
                more = cost(choice, shape) - cost(kept[layer], shape)
                if used + more <= room:
                    kept[layer] = choice
                    used += more
                    break
    if not layers or kept[layers[-1]] == NOTHING:
        raise _too_small(room, cost(few[0], shape))
    return kept


def describe(kept: dict[int, Keep], shape: Shape) -> str:
    """Say what is kept of which layers, from the last to the first."""
    return _listed(kept, lambda keep: tell(keep, shape))


def left_out(kept: dict[int, Keep], shape: Shape) -> str:
    """Say what is kept of no layer or of some; nothing if all of it is kept."""
    lacking = {layer: keep for layer, keep in kept.items() if keep != everything(shape)}
    return _listed(lacking, lambda keep: _lacks(keep, shape))


def tell(keep: Keep, shape: Shape) -> str:
    """Say what is kept of one layer: all rows of each head."""
    parts = []
    if keep.mean:
        parts.append(f"{_rows(keep.mean, shape)} of the head mean")
    if keep.each:
        parts.append(f"{_rows(keep.each, shape)} of each head")
    return ", ".join(parts) or "nothing"


def _lacks(keep: Keep, shape: Shape) -> str:
    if keep == NOTHING:
        return "everything"
    if keep.queries != set(shape.queries):
        return "all other rows"
    return "all other rows of single heads"


def _rows(queries: tuple[int, ...], shape: Shape) -> str:
    if queries == shape.all_tokens:
        return "all rows"
    if queries == tuple(range(shape.prefix)) and len(queries) > 1:
        return "the rows of CLS and registers"
    if len(queries) <= 3:
        names = [name_token(query, shape.prefix, shape.grid) for query in queries]
        return f"the row{'s' * (len(names) > 1)} of {' and '.join(names)}"
    return f"{len(queries)} rows"


def _choices(shape: Shape) -> tuple[list[Keep], list[Keep]]:
    """Return what is kept of a layer at the least, in growing order, and at the most, falling."""
    few = tuple(query for query in shape.queries if query < shape.prefix) or shape.queries[:1]
    if not shape.heads:
        return [Keep(mean=few[:1]), Keep(mean=few)], [everything(shape)]
    full = [everything(shape)]
    if few != shape.queries and shape.heads > 1:
        full.append(Keep(each=few, mean=shape.queries))
    return [Keep(each=few[:1]), Keep(each=few)], full


def _table(queries: tuple[int, ...], heads: int, shape: Shape) -> int:
    if not queries:
        return 0
    content = heads * len(queries) * (shape.tokens + 8)
    # Of a table, its script element and its description; of some rows, their numbers.
    names = 0 if queries == shape.all_tokens else 8 * len(queries)
    return 4 * -(-content // 3) + names + 200


def _listed(kept: dict[int, Keep], say: Callable[[Keep], str]) -> str:
    groups = groupby(sorted(kept, reverse=True), lambda layer: say(kept[layer]))
    return "; ".join(f"{_layers(layers)}: {what}" for what, layers in groups)


def _layers(layers: Iterable[int]) -> str:
    numbers = sorted(layers)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    named = [f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(named)}"


def _too_small(room: int, needed: int) -> InvalidInputError:
    short = max(needed - room, 1)
    return InvalidInputError(
        "room for one row of the last layer beside the photograph and the page itself",
        f"{max(room, 0) / MEGABYTE:.3f} MB, of {needed / MEGABYTE:.3f} MB that it takes",
        f"Raise --max-mb (max_mb) by {-(-short // 1000) / 1000:.3f} or more.",  # rounded up
    )
