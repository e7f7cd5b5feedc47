"""Which rows of each layer a page keeps, so that it stays below a size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from dinov2_attn.errors import InvalidInputError
from dinov2_attn.math.selection import name_token

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Shape:
    """The shape of the weights of every layer.

    Attributes:
        heads: The number of heads; 0 if there is only their mean.
        queries: The tokens of the rows.
        prefix: The number of tokens before the patches: CLS and the registers.
        grid: The patch grid ``(h, w)``.

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
class KeptRows:
    """The tokens whose rows one layer keeps: for each head, and for the mean of heads."""

    each: tuple[int, ...] = ()
    mean: tuple[int, ...] = ()

    @property
    def queries(self) -> set[int]:
        """All tokens with a kept row."""
        return {*self.each, *self.mean}


NOTHING = KeptRows()


def everything(shape: Shape) -> KeptRows:
    """Return all rows. The mean is left out if all heads are kept."""
    return KeptRows(each=shape.queries) if shape.heads else KeptRows(mean=shape.queries)


def cost(rows: KeptRows, shape: Shape) -> int:
    """Return the number of bytes of ``rows``, in base64 and with their description."""
    return _table(rows.each, shape.heads, shape) + _table(rows.mean, 1, shape)


def plan(layers: Sequence[int], shape: Shape, room: int) -> dict[int, KeptRows]:
    """Choose the rows of each layer, ``room`` bytes in total at most.

    Rows are added in this order while they fit, each time from the last layer to the first:

    1. The CLS row of each head.
    2. The rows of the registers.
    3. All rows of each head, or else all rows of the mean of heads.

    Without rows of CLS and registers, the first row takes their place.

    Raises:
        InvalidInputError: if not one row of the last layer fits.

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


def describe(kept: dict[int, KeptRows], shape: Shape) -> str:
    """Return in words which layers keep what, from the last to the first."""
    return _listed(kept, lambda rows: describe_layer(rows, shape))


def left_out(kept: dict[int, KeptRows], shape: Shape) -> str:
    """Return in words what is left out of which layers; empty if nothing is."""
    lacking = {layer: rows for layer, rows in kept.items() if rows != everything(shape)}
    return _listed(lacking, lambda rows: _lacks(rows, shape))


def describe_layer(rows: KeptRows, shape: Shape) -> str:
    """Return in words what one layer keeps: all rows of each head."""
    parts = []
    if rows.mean:
        parts.append(f"{_rows(rows.mean, shape)} of the head mean")
    if rows.each:
        parts.append(f"{_rows(rows.each, shape)} of each head")
    return ", ".join(parts) or "nothing"


def _lacks(rows: KeptRows, shape: Shape) -> str:
    if rows == NOTHING:
        return "everything"
    if rows.queries != set(shape.queries):
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


def _choices(shape: Shape) -> tuple[list[KeptRows], list[KeptRows]]:
    """Return the smallest choices for a layer, growing, and the largest ones, shrinking."""
    few = tuple(query for query in shape.queries if query < shape.prefix) or shape.queries[:1]
    if not shape.heads:
        return [KeptRows(mean=few[:1]), KeptRows(mean=few)], [everything(shape)]
    full = [everything(shape)]
    if few != shape.queries and shape.heads > 1:
        full.append(KeptRows(each=few, mean=shape.queries))
    return [KeptRows(each=few[:1]), KeptRows(each=few)], full


def _table(queries: tuple[int, ...], heads: int, shape: Shape) -> int:
    if not queries:
        return 0
    content = heads * len(queries) * (shape.tokens + 8)
    # Each table needs a script element and a description. Single rows need their numbers.
    names = 0 if queries == shape.all_tokens else 8 * len(queries)
    return 4 * -(-content // 3) + names + 200


def _listed(kept: dict[int, KeptRows], say: Callable[[KeptRows], str]) -> str:
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
        "room for one row of the last layer, with the image and the page itself",
        f"{max(room, 0) / MEGABYTE:.3f} MB, of {needed / MEGABYTE:.3f} MB that it takes",
        f"Raise --max-mb (max_mb) by {-(-short // 1000) / 1000:.3f} or more.",  # rounded up
    )
