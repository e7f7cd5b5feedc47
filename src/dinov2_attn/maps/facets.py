"""Queries, keys and values as the kernel of each layer was given them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from dinov2_attn.errors import InvalidInputError
from dinov2_attn.typing import Facet

FACETS: tuple[Facet, ...] = get_args(Facet)


def check_facets(facets: object) -> tuple[Facet, ...]:
    """Return ``facets`` as a tuple.

    Raises:
        InvalidInputError: If it is no sequence of names of facets.

    """
    given: Any = [facets] if isinstance(facets, str) else facets
    if isinstance(given, Sequence) and all(
        one in FACETS and given.count(one) == 1 for one in given
    ):
        return tuple(given)
    raise InvalidInputError(
        f"facets as some of {', '.join(map(repr, FACETS))}, each once",
        repr(facets),
        'Say facets=("key",), for instance.',
    )


def of_layers(layers: Sequence[Any], names: Sequence[Facet]) -> dict[Facet, tuple[Any, ...]]:
    """Return the tensors of each facet, from a dict of facets for each layer."""
    return {name: tuple(one[name] for one in layers) for name in names}


def one_facet(facets: Any, name: object) -> tuple[Any, ...]:
    """Return the tensors of one facet.

    Raises:
        InvalidInputError: If it was not recorded.

    """
    if isinstance(name, str) and name in facets:
        found: tuple[Any, ...] = facets[name]
        return found
    raise InvalidInputError(
        f"a recording with the facet {name!r}",
        f"one with {', '.join(map(repr, facets)) or 'none'}",
        'Ask for it: record(model, facets=("query", "key", "value")).',
    )


def joined_heads(tensor: Any) -> Any:
    """Return ``(B, heads, N, d)`` as ``(B, N, heads · d)``, the heads one after the other."""
    batch, heads, length, channels = tensor.shape
    return tensor.swapaxes(1, 2).reshape(batch, length, heads * channels)


def channels_first(tensor: Any, *, joined: bool) -> Any:
    """Return ``(B, heads, N, d)`` with tokens at the end: ``(B, heads · d, N)`` if joined."""
    tensor = joined_heads(tensor) if joined else tensor
    return tensor.swapaxes(-1, -2)
