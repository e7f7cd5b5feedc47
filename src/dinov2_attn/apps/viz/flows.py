"""Maps of a whole pass as matplotlib figures: attention rollout, and the relevance for a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize

from dinov2_attn.apps.viz.bars import Bar, bar_of, short
from dinov2_attn.apps.viz.captions import colour_sentence, of_model
from dinov2_attn.apps.viz.limits import extend, scale
from dinov2_attn.apps.viz.rows import Values
from dinov2_attn.apps.viz.style import PLAIN, Style
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.maps.places import place_of_query, place_of_sample
from dinov2_attn.maps.relevance import Relevance
from dinov2_attn.maps.result import as_array
from dinov2_attn.maps.rollout import Rollout
from dinov2_attn.math.selection import name_token
from dinov2_attn.math.token_names import Token, position_of


@dataclass(frozen=True, eq=False)
class OneMap:
    """A map and how it is drawn.

    Attributes:
        values: The map ``(h, w)``.
        norm: The scale of its colours.
        bar: The colour bar.
        caption: Its sentences.
        patch: Row and column of the token whose map this is, if it is a patch.

    """

    values: Values
    norm: Normalize
    bar: Bar
    caption: list[str]
    patch: tuple[int, int] | None


def map_of(
    result: Rollout[Any],
    query: Token = "cls",
    sample: int = 0,
    style: Style = PLAIN,
    name: str | None = None,
) -> OneMap:
    """Return the map of one token in a ``Rollout`` or ``Relevance``.

    Args:
        result: What ``rollout`` or ``relevance`` returned.
        query: The token, as in ``plot``. Where a row belongs to all tokens, that row is taken.
        sample: Which image of the batch.
        style: Limits and colours.
        name: What the caption calls the model.

    Raises:
        InvalidInputError: if ``sample`` is no number.
        OutOfRangeError: if there is no such query or sample.

    """
    row, patch, token = _row_of(result, query)
    maps: Any = result.patch_maps()
    one = maps[place_of_sample(sample, len(maps)), row]
    values = np.asarray(as_array(one) if hasattr(one, "detach") else one, dtype=np.float64)
    model = of_model(name)
    if isinstance(result, Relevance):
        norm = scale(values, style)
        ends = extend(norm, values)
        bar = Bar(norm, style.colour_map(), None, ends, label="relevance", unit="")
        caption = [f"{_subject(result, sample, token)}.{model}", _colours(norm, values)]
        return OneMap(values, norm, bar, caption, patch)
    tokens = int(result.weights.shape[-1])
    values = values * tokens
    norm = scale(values, style)
    colours = colour_sentence([tokens], [norm], [values], style)
    caption = [f"Attention rollout of {token}.{model}", colours]
    return OneMap(values, norm, bar_of(norm, [values], style, tokens), caption, patch)


def check_whole(layer: object, head: object, artifacts: object) -> None:
    """Raise ``InvalidInputError`` for arguments of ``plot`` that a map of all layers has not."""
    given = {"layer": layer is not None, "head": head != "mean", "artifacts": artifacts is not None}
    if wrong := [name for name, is_given in given.items() if is_given]:
        raise InvalidInputError(
            "the query, sample, image, outline, style, name and warning of a map of all layers",
            f"{', '.join(wrong)} as well",
            "Leave it out. Maps of one layer and head are those of attention_maps.",
        )


def _row_of(result: Rollout[Any], query: Token) -> tuple[int, tuple[int, int] | None, str]:
    """Return which row is that of ``query``, its patch if it is one, and its name."""
    if not result.queries:
        return 0, None, "all tokens" if isinstance(result, Relevance) else "the first query"
    position = position_of(query, result.prefix, result.grid)
    row = place_of_query(result.queries, position, result.prefix, result.grid)
    height, width = result.grid
    number = position - result.prefix
    patch = divmod(number, width) if 0 <= number < height * width else None
    return row, patch, name_token(position, result.prefix, result.grid)


def _subject(relevance: Relevance[Any], sample: int, token: str) -> str:
    """Return what a picture of relevance shows: for which target, by which method, of which row."""
    words = relevance.target
    target = words[sample if len(words) > 1 else 0] if words else "a target"
    rows = "mean of the rows of all tokens" if not relevance.queries else f"row of {token}"
    return f"Relevance for {target}, by the method {relevance.method} ({rows})"


def _colours(norm: Normalize, values: Values) -> str:
    """Return where the colours of relevance begin and end."""
    finite = values[np.isfinite(values)]
    if not (finite > 0).any():
        return "It is zero everywhere: the target does not depend on this row."
    low, high = norm.vmin or 0.0, norm.vmax or 0.0
    word = "Logarithmic colours" if isinstance(norm, LogNorm) else "Colours"
    above = finite[finite > high]
    lie = "patch lies" if above.size == 1 else "patches lie"
    beyond = (
        f" {above.size} of {values.size} {lie} above the last colour, up to {short(above.max())}."
        if above.size
        else ""
    )
    begin = short(low) if low else "0"
    return f"{word} run from {begin} to {short(high)}. Relevance has no unit.{beyond}"
