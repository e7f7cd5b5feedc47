"""Attention maps as matplotlib figures: one map, the heads of a layer, layers by heads, masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from matplotlib.figure import Figure

from dinov2_attn.apps.viz.bars import Bar, bar_of, bar_without_numbers, times
from dinov2_attn.apps.viz.captions import (
    Outlying,
    artifact_sentence,
    colour_sentence,
    in_layer,
    outlying_in,
    own_colours,
    prefix_sentence,
    shown,
    shown_note,
    subject,
)
from dinov2_attn.apps.viz.colours import Mask, top_mass_mask
from dinov2_attn.apps.viz.flows import OneMap, check_whole, map_of
from dinov2_attn.apps.viz.layout import SMALL, grid_sheet, line_width, single_sheet, table_sheet
from dinov2_attn.apps.viz.limits import scale, scales
from dinov2_attn.apps.viz.mosaic import Cells, Mosaic
from dinov2_attn.apps.viz.pixels import as_pixels, dimmed, greyed
from dinov2_attn.apps.viz.rows import AttentionRow, Drawable, Values, select_row
from dinov2_attn.apps.viz.sheet import BAR_POINTS, POINTS
from dinov2_attn.apps.viz.style import GREY, PLAIN, Style
from dinov2_attn.apps.viz.text import FONT, percent, wrap
from dinov2_attn.maps.places import Head
from dinov2_attn.maps.rollout import Rollout
from dinov2_attn.math.token_names import Token
from dinov2_attn.typing import Layer

if TYPE_CHECKING:
    import numpy.typing as npt
    import PIL.Image
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

    from dinov2_attn.apps.viz.images import LoadedImage
    from dinov2_attn.maps.artifacts import ArtifactTokens

THIN = 0.6  # of the usual width: around an object that may be as small as a patch
OUTLINED = "The thin white line is around the object that was marked."
# An image: what load_image returns, an image of Pillow, an array with the channels last, or the
# input tensor of a model.
Picture: TypeAlias = "LoadedImage | npt.ArrayLike | PIL.Image.Image"


def plot(
    maps: Drawable | Rollout[Any],
    ax: Axes | None = None,
    *,
    layer: Layer | None = None,
    head: Head = "mean",
    query: Token = "cls",
    sample: int = 0,
    image: Picture | None = None,
    outline: Mask | None = None,
    artifacts: ArtifactTokens | None = None,
    style: Style = PLAIN,
    name: str | None = None,
    warning: str | None = None,
) -> Axes:
    """Draw the attention map of one token, in one layer and head.

    >>> maps = attention_maps(model, image.tensor[None], queries="cls")
    >>> viz.plot(maps, layer=11, head=3, image=image).figure.savefig("head3.png")
    >>> viz.plot(maps, ax, style=viz.Style(log=True, interpolation="bilinear"))
    >>> viz.plot(relevance(classifier, image.tensor[None], 281), image=image)

    Colours stand for multiples of uniform attention: 1 is the N-th part, of N tokens.

    The patch (row, column) is centred at x = column, y = row. For a colour bar of your own, take
    the map: ``ax.images[0]``, or ``ax.images[1]`` over an image. pyplot is not used. In a notebook
    the value shows its figure.

    Args:
        maps: An ``AttentionMaps``, or a ``Recording`` of one pass. A ``Rollout`` and a
            ``Relevance`` have no layers, heads and artifacts. Colours of relevance have no unit.
        ax: A matplotlib Axes, whose title becomes the caption. ``None`` creates a figure with a
            colour bar (``ax.figure``), which a notebook shows.
        layer: The number of a block in ``maps.layers``, or its path. ``None`` is the last of
            them, and negative numbers count from it.
        head: The number of a head, or ``"mean"``.
        query: ``"cls"``, ``"register:2"``, a patch ``(row, column)``, or a position. A patch is
            framed in white.
        sample: Which image of the batch.
        image: The image below the map: what ``load_image`` returned, an image of Pillow, an
            array ``(H, W, 3)`` or ``(H, W)``, integers of 0…255 or floats of 0…1, or the input
            tensor of the model, ``(C, H, W)``. Normalisation by ImageNet's mean is undone.
        outline: A bool mask ``(H, W)`` of any resolution, such as that of an object. A line in
            white on black is drawn around it.
        artifacts: What ``artifact_tokens`` found in the same batch. ``style`` says how to draw
            them.
        style: Contrast, limits, colours, interpolation, outliers, alpha.
        name: What the caption calls the model.
        warning: A sentence that stays with the picture.

    Returns:
        The Axes.

    Raises:
        InvalidInputError: if the maps, the image or an option cannot be drawn.
        OutOfRangeError: if there is no such layer, head, query or sample.

    """
    if isinstance(maps, Rollout):
        check_whole(layer, head, artifacts)
        flow = map_of(maps, query, sample, style, name)
        return _plot_one(flow, ax, image, outline, style, None, warning)
    row = select_row(maps, query, sample)
    outlying = outlying_in(artifacts, row, sample)
    layer = row.layers[row.layer(layer)]
    values = row.times(layer, head)
    norm = scale(values, style, _mask(outlying))
    caption = [
        subject(row, in_layer(layer, head), name),
        colour_sentence([row.tokens], [norm], [values], style),
        *prefix_sentence(row, layer, head),
        *artifact_sentence(row, layer, style, outlying, head),
    ]
    one = OneMap(values, norm, bar_of(norm, values, style, row.tokens), caption, row.patch)
    return _plot_one(one, ax, image, outline, style, outlying, warning)


def _plot_one(
    one: OneMap,
    ax: Axes | None,
    image: Picture | None,
    outline: Mask | None,
    style: Style,
    outlying: Outlying | None,
    warning: str | None,
) -> Axes:
    grid = one.values.shape[0], one.values.shape[1]
    caption = [*one.caption, *([] if outline is None else [OUTLINED])]
    if ax is None:
        sheet = single_sheet(grid)
        figure, ax, bar = sheet.figure(caption, warning)
        one.bar.draw(figure, bar, BAR_POINTS)
        thick = line_width(sheet.patch)
    else:
        title(ax, [*caption, *([warning] if warning else [])])
        thick = 1.5
    mosaic = Mosaic(ax, Cells(grid), style, thick)
    if image is not None:
        pixels = as_pixels(image)
        mosaic.picture((0, 0), greyed(pixels) if style.background == "grey" else pixels)
    alpha = 1.0 if image is None else style.alpha
    draw_map(mosaic, (0, 0), one.values, one.norm, style, outlying, alpha)
    if outline is not None:
        mosaic.contour((0, 0), outline, THIN)
    mosaic.query((0, 0), one.patch)
    mosaic.finish()
    return ax


def plot_heads(
    maps: Drawable,
    *,
    layer: Layer | None = None,
    query: Token = "cls",
    sample: int = 0,
    image: Picture | None = None,
    outline: Mask | None = None,
    artifacts: ArtifactTokens | None = None,
    style: Style = PLAIN,
    name: str | None = None,
    warning: str | None = None,
    together: bool = False,
) -> Figure:
    """Draw every head of a layer and their mean.

    All have one scale, unless ``style.limits`` is ``"each"``. The title of a map says how much of
    the attention is on patches, if much of it is not.

    Args:
        maps: As in ``plot``.
        layer: As in ``plot``.
        query: As in ``plot``.
        sample: As in ``plot``.
        image: The image, drawn as the first cell.
        outline: As in ``plot``, drawn in every cell.
        artifacts: As in ``plot``.
        style: As in ``plot``.
        name: As in ``plot``.
        warning: As in ``plot``.
        together: Whether the scale covers all layers, so that their figures can be compared.

    Returns:
        The figure.

    """
    row = select_row(maps, query, sample)
    outlying = outlying_in(artifacts, row, sample)
    layer = row.layers[row.layer(layer)]
    heads = _heads(row)
    values = _of(row, heads, layer)
    every = _of_all(row, heads).reshape(-1, *row.grid) if together else values
    one = style.limits != "each"
    norms = scales(every, style, _mask(outlying)) if one else scales(values, style, _mask(outlying))
    notes = [shown(row, layer, head) for head in heads]
    images = 0 if image is None else 1
    sheet, places = grid_sheet(row.grid, images + len(heads))
    caption = [
        subject(row, in_layer(layer), name),
        _colours(row, norms[: len(heads)], values, style),
        *prefix_sentence(row, layer, "mean"),
        *artifact_sentence(row, layer, style, outlying),
        *(shown_note(notes, row) if one else []),
        *([] if outline is None else [OUTLINED]),
    ]
    figure, ax, bar = sheet.figure(caption, warning)
    _bar(norms, every, style, row).draw(figure, bar, BAR_POINTS)
    mosaic = Mosaic(ax, sheet.cells, style, line_width(sheet.patch))
    if image is not None:
        _image(mosaic, places[0], image, row, style, outlying)
    if outline is not None:
        for place in places:
            mosaic.contour(place, outline, THIN)
    for i, (place, head) in enumerate(zip(places[images:], heads, strict=True)):
        draw_map(mosaic, place, values[i], norms[i], style, outlying)
        mosaic.query(place, row.patch)
        note = notes[i] if one else f"· {times(norms[i].vmax or 0)}"
        mosaic.title(place, f"{head_name(head)} {note}".strip(), SMALL)
    mosaic.finish()
    return figure


def plot_layers(
    maps: Drawable,
    *,
    query: Token = "cls",
    sample: int = 0,
    artifacts: ArtifactTokens | None = None,
    style: Style = PLAIN,
    name: str | None = None,
    warning: str | None = None,
) -> Figure:
    """Draw all layers of ``maps`` (rows) by heads (columns).

    The first column is the mean of heads. Each layer has a scale of its own, which its label
    names, if ``style.limits`` is ``"robust"``. The label also says how much of the attention is
    on patches, mean of heads, if much of it is not. Arguments are those of ``plot``.

    Returns:
        The figure.

    """
    row = select_row(maps, query, sample)
    outlying = outlying_in(artifacts, row, sample)
    heads = _heads(row)
    values = _of_all(row, heads)
    norms = _norms_of_layers(values, style, _mask(outlying))
    notes = [shown(row, layer, "mean") for layer in row.layers]
    sheet = table_sheet(row.grid, len(row.layers), len(heads))
    flat = values.reshape(-1, *row.grid)
    caption = [
        subject(row, "in each layer (rows, counted from 0) and head (columns)", name),
        _colours(row, [norm for layer in norms for norm in layer], flat, style, layers=True),
        *artifact_sentence(row, None, style, outlying),
        *shown_note(notes, row),
    ]
    figure, ax, bar = sheet.figure(caption, warning)
    _bar(norms[0], flat, style, row, layers=True).draw(figure, bar, BAR_POINTS)
    mosaic = Mosaic(ax, sheet.cells, style, line_width(sheet.patch))
    for i, layer in enumerate(row.layers):
        limit = f"to {times(norms[i][0].vmax or 0)}" if style.limits == "robust" else ""
        lines = (f"layer {layer}", limit, notes[i])
        mosaic.label(i, "\n".join(filter(None, lines)), SMALL)
        for column, head in enumerate(heads):
            place = i, column
            draw_map(mosaic, place, values[i, column], norms[i][column], style, outlying)
            mosaic.query(place, row.patch)
            if i == 0:
                mosaic.title(place, head_name(head), SMALL)
    mosaic.finish()
    return figure


def plot_masks(
    maps: Drawable,
    share: float,
    *,
    image: Picture,
    layer: Layer | None = None,
    query: Token = "cls",
    sample: int = 0,
    name: str | None = None,
    warning: str | None = None,
) -> Figure:
    """Dim the ``image`` but for the patches that hold a ``share`` of each head's mass.

    As in DINO v1, only mass on patches counts: CLS and the registers are left out.

    Args:
        maps: As in ``plot``.
        share: The share of the mass, in (0, 1].
        image: The image to dim, also drawn as the first cell.
        layer: As in ``plot``.
        query: As in ``plot``.
        sample: As in ``plot``.
        name: As in ``plot``.
        warning: As in ``plot``.

    Returns:
        The figure.

    """
    row = select_row(maps, query, sample)
    layer = row.layers[row.layer(layer)]
    heads = _heads(row)
    sheet, places = grid_sheet(row.grid, 1 + len(heads))
    caption = [
        subject(row, in_layer(layer), name),
        f"Bright and outlined: the fewest patches that hold {percent(share)} of the attention to "
        "patches. Above each map: their share of all patches.",
        *prefix_sentence(row, layer, "mean"),
    ]
    figure, ax, _ = replace(sheet, bar=False).figure(caption, warning)
    mosaic = Mosaic(ax, sheet.cells, PLAIN, line_width(sheet.patch))
    _image(mosaic, places[0], image, row, PLAIN, None)
    for place, head in zip(places[1:], heads, strict=True):
        kept = top_mass_mask(row.map(layer, head), share)
        mosaic.picture(place, dimmed(as_pixels(image), kept))
        mosaic.contour(place, kept)
        mosaic.query(place, row.patch)
        mosaic.title(place, f"{head_name(head)} · {percent(kept.mean())}", SMALL)
    mosaic.finish()
    return figure


def _heads(row: AttentionRow) -> tuple[Head, ...]:
    return row.heads if len(row.heads) == 1 else ("mean", *row.heads)


def _of(row: AttentionRow, heads: Sequence[Head], layer: Layer) -> Values:
    return np.stack([row.times(layer, head) for head in heads])


def _of_all(row: AttentionRow, heads: Sequence[Head]) -> Values:
    return np.stack([_of(row, heads, layer) for layer in row.layers])


def _norms_of_layers(values: Values, style: Style, mask: Mask | None) -> list[list[Normalize]]:
    """Return the scale of each map of ``(layers, heads, h, w)``."""
    if style.limits in ("robust", "each"):
        return [scales(layer, style, mask) for layer in values]
    return [[scale(values, style, mask)] * len(layer) for layer in values]


def _colours(
    row: AttentionRow,
    norms: Sequence[Normalize],
    values: Values,
    style: Style,
    *,
    layers: bool = False,
) -> str:
    """Return the sentence on the colours of the maps ``(count, h, w)``."""
    if style.limits == "each":
        named = "" if layers else ", named above it"
        return own_colours([row.tokens], norms, values, style, "map", f"its highest patch{named}")
    if style.limits == "robust" and layers:
        return own_colours([row.tokens], norms, values, style, "layer", "the number beside it")
    return colour_sentence([row.tokens], norms, values, style)


def _bar(
    norms: Sequence[Normalize],
    values: Values,
    style: Style,
    row: AttentionRow,
    *,
    layers: bool = False,
) -> Bar:
    if style.limits == "each":
        return bar_without_numbers(norms[0], style, "highest\nof each\nmap")
    if style.limits == "robust" and layers:
        return bar_without_numbers(norms[0], style, "number\nbeside\nthe layer")
    return bar_of(norms[0], values, style, row.tokens)


def head_name(head: Head) -> str:
    """Return the title of a map."""
    return "mean" if head == "mean" else f"head {head}"


def _mask(outlying: Outlying | None) -> Mask | None:
    return None if outlying is None else outlying.mask


def draw_map(
    mosaic: Mosaic,
    place: tuple[int, int],
    values: Values,
    norm: Normalize,
    style: Style,
    outlying: Outlying | None,
    alpha: float = 1.0,
) -> None:
    """Draw one map with its outliers."""
    mosaic.map(place, style.without_outliers(values, _mask(outlying)), norm, alpha)
    if outlying is not None and style.outliers == "mask":
        mosaic.cover(place, outlying.mask, GREY)
    if outlying is not None and style.outliers != "none":
        mosaic.outlines(place, outlying.mask)


def _image(
    mosaic: Mosaic,
    place: tuple[int, int],
    image: Picture,
    row: AttentionRow,
    style: Style,
    outlying: Outlying | None,
) -> None:
    mosaic.picture(place, as_pixels(image))
    if outlying is not None and style.outliers != "none":
        mosaic.outlines(place, outlying.mask)
    mosaic.query(place, row.patch)
    mosaic.title(place, "image", SMALL)


def title(ax: Axes, caption: list[str]) -> None:
    """Write ``caption`` above ``ax``, in lines that fit."""
    figure: Any = ax.figure
    width = ax.get_position().width * figure.get_size_inches()[0]
    lines = wrap(caption, width, POINTS)
    ax.set_title("\n".join(lines), fontsize=POINTS, family=FONT, parse_math=False)
