"""Where a layer, a query, a head and an image are among the weights of a batch."""

from __future__ import annotations

from collections.abc import Sequence

from dinov2_attn.errors import InvalidInputError, OutOfRangeError
from dinov2_attn.math.selection import name_token, whole_number
from dinov2_attn.typing import Grid, Layer

# A head by its number, or "mean".
Head = int | str


def place_of_layer(layers: Sequence[Layer], layer: Layer | None) -> int:
    """Return the place of ``layer`` among ``layers``. ``None`` is the last.

    A negative number counts from the end. Where layers are paths, a number is a place.
    """
    if layer is None:
        return len(layers) - 1
    if not isinstance(layer, str):
        layer = whole_number(layer, "layers")
        paths = any(isinstance(one, str) for one in layers)
        if -len(layers) <= layer < (len(layers) if paths else 0):
            return layer % len(layers)
    if layer not in layers:
        raise OutOfRangeError(
            f"one of the layers {', '.join(map(str, layers))}",
            str(layer),
            "Ask attention_maps or record for it: layers=None takes all.",
        )
    return layers.index(layer)


def place_of_query(queries: Sequence[int], position: int, prefix: int, grid: Grid) -> int:
    """Return the place of the row of the token at ``position`` among ``queries``."""
    if position not in queries:
        raise OutOfRangeError(
            "a query among the recorded rows: "
            + ", ".join(name_token(query, prefix, grid) for query in queries[:8]),
            name_token(position, prefix, grid),
            "Ask attention_maps or record for it by queries=.",
        )
    return queries.index(position)


def place_of_head(heads: Sequence[Head], head: Head) -> int | None:
    """Return the place of ``head`` among ``heads``, or ``None`` for the mean of several."""
    if isinstance(head, str) and head == "mean":
        return None
    if not isinstance(head, str) and whole_number(head, "heads") in heads:
        return heads.index(head)
    raise OutOfRangeError(
        f"a head among {', '.join(map(str, heads))}, or 'mean'",
        repr(head),
        "Name one of these, or leave heads='mean' out where the maps are made.",
    )


def place_of_sample(sample: object, count: int, what: str = "an image") -> int:
    """Return ``sample`` if there are so many images."""
    if isinstance(sample, list | tuple):
        raise InvalidInputError(
            "sample as a number, maps being of one batch",
            repr(sample),
            "Give the image's number; of a list of maps, draw one.",
        )
    place = whole_number(sample, "sample")
    if not 0 <= place < count:
        raise OutOfRangeError(f"{what} from 0 to {count - 1}", str(place), "Images count from 0.")
    return place
