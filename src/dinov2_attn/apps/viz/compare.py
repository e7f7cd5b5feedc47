"""Two models side by side: the attention of both on one scale, and the difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure

from dinov2_attn.apps.viz.bars import Bar, bar_of, times
from dinov2_attn.apps.viz.captions import (
    Outlying,
    artifact_sentence,
    colour_sentence,
    outlying_in,
    prefix_sentence,
    token_sentence,
)
from dinov2_attn.apps.viz.colours import Mask
from dinov2_attn.apps.viz.difference import Pair, pair_of
from dinov2_attn.apps.viz.layout import SMALL, grid_sheet, line_width, table_sheet
from dinov2_attn.apps.viz.limits import extend, scale, scale_together
from dinov2_attn.apps.viz.mosaic import Mosaic
from dinov2_attn.apps.viz.pictures import Picture, draw_map, head_name
from dinov2_attn.apps.viz.pixels import as_pixels
from dinov2_attn.apps.viz.rows import Drawable, Values
from dinov2_attn.apps.viz.sheet import BAR_POINTS, Sheet
from dinov2_attn.apps.viz.style import PLAIN, Limits, Style
from dinov2_attn.apps.viz.text import percent
from dinov2_attn.errors import InvalidInputError, shown_name
from dinov2_attn.maps.places import Head
from dinov2_attn.math.token_names import Token
from dinov2_attn.typing import Layer

if TYPE_CHECKING:
    from dinov2_attn.maps.artifacts import ArtifactTokens

LETTERS = ("A", "B")
MINUS = "B − A"
DIVERGING = "RdBu_r"  # blue below zero, white, red above
Place = tuple[int, int]


def compare(
    a: Drawable,
    b: Drawable,
    *,
    layer: Layer | None = None,
    head: Head | None = "mean",
    query: Token = "cls",
    sample: int = 0,
    image: Picture | None = None,
    artifacts: tuple[ArtifactTokens | None, ArtifactTokens | None] = (None, None),
    style: Style = PLAIN,
    names: tuple[str, str] | None = None,
    warning: str | None = None,
) -> Figure:
    """Draw the attention of two models or checkpoints to one image, and the difference.

    >>> before = attention_maps(model, images, queries="cls")
    >>> after = attention_maps(trained, images, queries="cls")
    >>> viz.compare(before, after, image=images[0], names=("before", "after"))

    A and B have one scale. The difference B − A has colours of its own: red where B gives more,
    blue where A gives more, white at zero.

    If the models have other patch sizes, the difference is on the grid with fewer patches. There a
    patch has the mean, by area, of the patches of the other grid. Both grids must cover the same
    crop of the image.

    Args:
        a: The ``AttentionMaps`` of the first model, or a ``Recording`` of one pass.
        b: Those of the second model, of the same image.
        layer: The layer in both, as in ``plot``. ``None`` is the last of each.
        head: The number of a head, or ``"mean"``. ``None`` draws the mean and every head, if both
            models have equally many.
        query: As in ``plot``. A patch is one of A. In another grid it stands for the patch of B at
            its centre.
        sample: Which image of both batches.
        image: The image, as in ``plot``. It is the first cell, if there is one head.
        artifacts: What ``artifact_tokens`` found in each model.
        style: As in ``plot``. A and B cannot have limits of their own.
        names: What the caption calls the models.
        warning: A sentence that stays with the picture.

    Returns:
        The figure.

    Raises:
        InvalidInputError: If maps or image cannot be drawn, the grids have other shapes, or
            ``style.limits`` is ``"each"``.
        OutOfRangeError: If one of them has no such layer, head, query or sample.

    """
    if style.limits == "each":
        raise InvalidInputError(
            "limits that two models share",
            "limits='each'",
            "Leave limits at 'robust', or give 'shared' or (low, high).",
        )
    pair = pair_of(a, b, layer, query, sample)
    found = [outlying_in(one, row, sample) for one, row in zip(artifacts, pair.rows, strict=True)]
    heads = pair.heads if head is None else (head,)
    drawn = _Comparison.of(pair, heads, found, style)
    return drawn.figure(None if image is None else image, names, warning)


@dataclass(frozen=True, eq=False)
class _Comparison:
    """Two models in some heads, with their scales."""

    pair: Pair
    heads: Sequence[Head]
    outlying: Sequence[Outlying | None]
    style: Style
    maps: Sequence[tuple[Values, Values]]  # of each head
    differences: Sequence[Values]
    norm: Normalize
    signed: Normalize

    @classmethod
    def of(
        cls,
        pair: Pair,
        heads: Sequence[Head],
        outlying: Sequence[Outlying | None],
        style: Style,
    ) -> _Comparison:
        maps = [pair.times(head) for head in heads]
        differences = [pair.difference(head) for head in heads]
        masks = [None if one is None else one.mask for one in outlying]
        every = [(values, mask) for two in maps for values, mask in zip(two, masks, strict=True)]
        norm = scale_together(every, style)
        signed = _signed(np.stack(differences), style, _together(masks))
        return cls(pair, heads, outlying, style, maps, differences, norm, signed)

    def figure(
        self,
        image: Picture | None,
        names: tuple[str, str] | None,
        warning: str | None,
    ) -> Figure:
        sheet, places = self._sheet(image is not None)
        caption = list(self._caption(names))
        figure, ax, bars = sheet.figure_with_bars(caption, warning)
        self._bars(figure, bars)
        mosaic = Mosaic(ax, sheet.cells, self.style, line_width(sheet.patch))
        if image is not None and len(self.heads) == 1:
            mosaic.picture(places[0], as_pixels(image))
            mosaic.query(places[0], self.pair.rows[0].patch)
            mosaic.title(places[0], "image", SMALL)
        for i, head in enumerate(self.heads):
            three = places[-3:] if len(self.heads) == 1 else places[3 * i : 3 * i + 3]
            self._draw(mosaic, three, i, titled=i == 0)
            if len(self.heads) > 1:
                mosaic.label(i, head_name(head), SMALL)
        mosaic.finish()
        return figure

    def _sheet(self, with_image: bool) -> tuple[Sheet, list[Place]]:
        grid = self.pair.rows[0].grid
        if len(self.heads) == 1:
            sheet, places = grid_sheet(grid, 3 + with_image, full=True)
        else:
            sheet = table_sheet(grid, len(self.heads), 3)
            places = [(row, column) for row in range(len(self.heads)) for column in range(3)]
        return replace(sheet, second=True), places

    def _draw(self, mosaic: Mosaic, places: Sequence[Place], i: int, titled: bool) -> None:
        for place, values, row, outlying in zip(
            places[:2], self.maps[i], self.pair.rows, self.outlying, strict=True
        ):
            draw_map(mosaic, place, values, self.norm, self.style, outlying)
            mosaic.query(place, row.patch, row.grid)
        mosaic.map(places[2], self.differences[i], self.signed, colours=_diverging())
        mosaic.query(places[2], self.pair.rows[0].patch)
        for place, title in zip(places, (*LETTERS, MINUS), strict=True):
            if titled:
                mosaic.title(place, title, SMALL)

    def _bars(self, figure: Figure, bars: Sequence[matplotlib.axes.Axes]) -> None:
        tokens = {row.tokens for row in self.pair.rows}
        one = tokens.pop() if len(tokens) == 1 else None
        flat = [values for two in self.maps for values in two]
        bar_of(self.norm, flat, self.style, one).draw(figure, bars[0], BAR_POINTS)
        beyond = extend(self.signed, np.stack(self.differences))
        label = f"{MINUS} (× uniform)"
        Bar(self.signed, _diverging(), None, beyond, label=label).draw(figure, bars[1], BAR_POINTS)

    def _caption(self, names: tuple[str, str] | None) -> Iterator[str]:
        yield self._subject()
        for letter, name in zip(LETTERS, names or ("", ""), strict=True):
            if name:
                yield f"{letter}: {shown_name(name)}."
        flat = [values for two in self.maps for values in two]
        tokens = [row.tokens for row in self.pair.rows]
        norms = [self.norm] * len(flat)
        yield f"A and B have one scale. {colour_sentence(tokens, norms, flat, self.style)}"
        yield self._difference()
        if self.pair.is_resampled:
            sides = ["{} × {}".format(*row.grid) for row in self.pair.rows]
            yield (
                f"A has {sides[0]} patches and B {sides[1]}. {MINUS} is on the grid with fewer, in "
                "which a patch has the mean of the patches there."
            )
        yield from self._of_each()

    def _subject(self) -> str:
        first, second = self.pair.layers
        where = f"layer {first}" if first == second else f"layer {first} of A and {second} of B"
        one = self.heads[0] if len(self.heads) == 1 else None
        named = "mean of heads" if one == "mean" else f"head {one}"
        if one is None:
            named = "the mean of heads and each head"
        token = token_sentence(self.pair.rows[0])
        return f"Attention of {token}, in {where} (counted from 0): {named}."

    def _difference(self) -> str:
        most = float(self.signed.vmax or 1)
        values = np.stack(self.differences)
        if not values.any():
            return f"{MINUS} is zero in every patch."
        beyond = int((np.abs(values) > most).sum())
        lie = f" {beyond} of {values.size} patches lie beyond." if beyond else ""
        moved = percent(self.pair.moved(self.heads[0]))
        mean = ", mean of heads" if self.heads[0] == "mean" else ""
        return (
            f"{MINUS}: red where B gives more and blue where A gives more, up to "
            f"{times(most)} uniform attention.{lie} In B, {moved} of the attention is elsewhere"
            f"{mean}."
        )

    def _of_each(self) -> Iterator[str]:
        head = self.heads[0]
        parts = zip(LETTERS, self.pair.rows, self.pair.layers, self.outlying, strict=True)
        for letter, row, layer, outlying in parts:
            said = [
                *prefix_sentence(row, layer, head),
                *artifact_sentence(row, layer, self.style, outlying, head),
            ]
            yield from (f"{letter}: {sentence}" for sentence in said)


def _signed(values: Values, style: Style, mask: Mask | None) -> Normalize:
    """Return the scale of differences ``(…, h, w)``, with zero in its middle."""
    limits: Limits = "shared" if style.limits == "shared" else "robust"
    mask = mask if mask is not None and mask.shape == values.shape[-2:] else None
    most = scale(np.abs(values), replace(style, log=False, limits=limits), mask).vmax or 1.0
    return Normalize(-most, most)


def _together(masks: Sequence[Mask | None]) -> Mask | None:
    """Return the patches that are artifact tokens in one of two models of one grid."""
    found = [mask for mask in masks if mask is not None]
    if not found or len({mask.shape for mask in found}) > 1:
        return None
    union: Mask = np.logical_or.reduce(found)
    return union


def _diverging() -> Colormap:
    return matplotlib.colormaps[DIVERGING].with_extremes(bad="black")
