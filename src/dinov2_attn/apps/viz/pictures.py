"""Attention maps as matplotlib figures: one map, the heads of a layer, layers by heads, masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from matplotlib.figure import Figure

from dinov2_attn.apps.viz.captions import (
    Outlying,
    mass_note,
    outlier_note,
    outlying_in,
    prefix_sentence,
    sentences,
    subject,
)
from dinov2_attn.apps.viz.colours import Mask, top_mass_mask
from dinov2_attn.apps.viz.layout import SMALL, grid_sheet, line_width, single_sheet, table_sheet
from dinov2_attn.apps.viz.mosaic import Cells, Mosaic
from dinov2_attn.apps.viz.pixels import as_pixels
from dinov2_attn.apps.viz.rows import AttentionRow, Drawable, Head, Values, select_row
from dinov2_attn.apps.viz.sheet import POINTS, draw_bar
from dinov2_attn.apps.viz.style import GREY, Style, extend
from dinov2_attn.apps.viz.text import FONT, percent, wrap
from dinov2_attn.apps.viz.tokens import Token
from dinov2_attn.typing import Layer

if TYPE_CHECKING:
    import numpy.typing as npt
    import PIL.Image
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

    from dinov2_attn.apps.viz.images import LoadedImage
    from dinov2_attn.maps.artifacts import ArtifactTokens

PLAIN = Style()
RED_TINT = (1.0, 0.0, 0.0, 0.5)
# An image: what load_image returns, an image of Pillow, or an array with the channels last.
Picture: TypeAlias = "LoadedImage | npt.ArrayLike | PIL.Image.Image"


def plot(
    maps: Drawable,
    ax: Axes | None = None,
    *,
    layer: Layer | None = None,
    head: Head = "mean",
    query: Token = "cls",
    sample: int = 0,
    image: Picture | None = None,
    artifacts: ArtifactTokens | None = None,
    style: Style = PLAIN,
    name: str | None = None,
    warning: str | None = None,
) -> Axes:
    """Draw the attention map of one token, in one layer and head.

    >>> maps = attention_maps(model, image.tensor[None], queries="cls")
    >>> viz.plot(maps, layer=11, head=3, image=image).figure.savefig("head3.png")
    >>> viz.plot(maps, ax, style=viz.Style(log=True, interpolation="bilinear"))

    The patch (row, column) is centred at x = column, y = row. For a colour bar of your own, take
    the map: ``ax.images[0]``, or ``ax.images[1]`` over an image. pyplot is not used.

    Args:
        maps: An ``AttentionMaps``, or a ``Recording`` of one pass.
        ax: A matplotlib Axes, whose title becomes the caption. ``None`` creates a figure with a
            colour bar (``ax.figure``).
        layer: The number of a block in ``maps.layers``. ``None`` is the last of them.
        head: The number of a head, or ``"mean"``.
        query: ``"cls"``, ``"register:2"``, a patch ``(row, column)``, or a position. A patch is
            framed in white.
        sample: Which image of the batch.
        image: The image below the map: what ``load_image`` returned, an image of Pillow, or an
            array ``(H, W, 3)`` or ``(H, W)``, integers of 0…255 or floats of 0…1.
        artifacts: What ``artifact_tokens`` found in the same batch. ``style`` says how to draw
            them.
        style: Contrast, interpolation, outliers, alpha.
        name: What the caption calls the model.
        warning: A sentence that stays with the picture.

    Returns:
        The Axes.

    Raises:
        InvalidInputError: if the maps, the image or an option cannot be drawn.
        OutOfRangeError: if there is no such layer, head, query or sample.

    """
    row = select_row(maps, query, sample)
    outlying = outlying_in(artifacts, row, sample)
    layer = row.layers[row.layer(layer)]
    values = row.map(layer, head)
    norm = style.norm(values, _mask(outlying))
    caption = sentences(row, layer, head, style, outlying, name)
    if ax is None:
        sheet = single_sheet(row.grid)
        figure, ax, bar = sheet.figure(caption, warning)
        draw_bar(figure, bar, norm, extend(norm, values))
        thick = line_width(sheet.patch)
    else:
        _title(ax, [*caption, *([warning] if warning else [])])
        thick = 1.5
    mosaic = Mosaic(ax, Cells(row.grid), style, thick)
    if image is not None:
        mosaic.picture((0, 0), as_pixels(image))
    alpha = 1.0 if image is None else style.alpha
    _map(mosaic, (0, 0), values, norm, style, outlying, alpha)
    mosaic.query((0, 0), row.patch)
    mosaic.finish()
    return ax


def plot_heads(
    maps: Drawable,
    *,
    layer: Layer | None = None,
    query: Token = "cls",
    sample: int = 0,
    image: Picture | None = None,
    artifacts: ArtifactTokens | None = None,
    style: Style = PLAIN,
    name: str | None = None,
    warning: str | None = None,
    together: bool = False,
) -> Figure:
    """Draw every head of a layer and their mean, all on one scale.

    The title of each map holds the share of attention on CLS and the registers.

    Args:
        maps: As in ``plot``.
        layer: As in ``plot``.
        query: As in ``plot``.
        sample: As in ``plot``.
        image: The image, drawn as the first cell.
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
    scaled = [_of(row, heads, number) for number in (row.layers if together else [layer])]
    norm = style.norm(np.concatenate(scaled), _mask(outlying))
    images = 0 if image is None else 1
    sheet, places = grid_sheet(row.grid, images + len(heads))
    caption = [
        *sentences(row, layer, None, style, outlying, name),
        mass_note(row, "Above each map"),
    ]
    figure, ax, bar = sheet.figure(caption, warning)
    draw_bar(figure, bar, norm, extend(norm, np.concatenate(scaled)))
    mosaic = Mosaic(ax, sheet.cells, style, line_width(sheet.patch))
    if image is not None:
        _image(mosaic, places[0], image, row, style, outlying)
    for place, head in zip(places[images:], heads, strict=True):
        _map(mosaic, place, row.map(layer, head), norm, style, outlying)
        mosaic.query(place, row.patch)
        mass = percent(row.prefix_mass(layer, head))
        mosaic.title(place, f"{_head_name(head)} · {mass}", SMALL)
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
    """Draw all layers of ``maps`` (rows) by heads (columns), all on one scale.

    The first column is the mean of heads. The label of each layer holds the share of attention on
    CLS and the registers, mean of heads. Arguments are those of ``plot``.

    Returns:
        The figure.

    """
    row = select_row(maps, query, sample)
    outlying = outlying_in(artifacts, row, sample)
    heads = _heads(row)
    values = np.stack([_of(row, heads, layer) for layer in row.layers])
    norm = style.norm(values, _mask(outlying))
    sheet = table_sheet(row.grid, len(row.layers), len(heads))
    caption = [
        subject(name, "each layer by each head", f"query {row.name}"),
        mass_note(row, "Left of each layer", ", mean of heads"),
        *outlier_note(row, None, style, outlying),
    ]
    figure, ax, bar = sheet.figure(caption, warning)
    draw_bar(figure, bar, norm, extend(norm, values))
    mosaic = Mosaic(ax, sheet.cells, style, line_width(sheet.patch))
    for i, layer in enumerate(row.layers):
        mosaic.label(i, f"layer {layer}\n{percent(row.prefix_mass(layer, 'mean'))}", SMALL)
        for column, head in enumerate(heads):
            place = i, column
            _map(mosaic, place, values[i, column], norm, style, outlying)
            mosaic.query(place, row.patch)
            if i == 0:
                mosaic.title(place, _head_name(head), SMALL)
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
    """Tint the patches of the ``image`` that hold a ``share`` of each head's mass.

    As in DINO v1, only mass on patches counts: CLS and the registers are left out.

    Args:
        maps: As in ``plot``.
        share: The share of the mass, in (0, 1].
        image: The image to tint, also drawn as the first cell.
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
        subject(name, f"layer {layer}", "each head", f"query {row.name}"),
        prefix_sentence(row, layer, "mean"),
        f"Red: the fewest patches with {percent(share)} of the attention to patches. "
        "Above each map: their share of all patches.",
    ]
    figure, ax, _ = replace(sheet, bar=False).figure(caption, warning)
    mosaic = Mosaic(ax, sheet.cells, PLAIN, line_width(sheet.patch))
    _image(mosaic, places[0], image, row, PLAIN, None)
    for place, head in zip(places[1:], heads, strict=True):
        kept = top_mass_mask(row.map(layer, head), share)
        mosaic.picture(place, as_pixels(image))
        mosaic.cover(place, kept, RED_TINT)
        mosaic.query(place, row.patch)
        mosaic.title(place, f"{_head_name(head)} · {percent(kept.mean())}", SMALL)
    mosaic.finish()
    return figure


def _heads(row: AttentionRow) -> tuple[Head, ...]:
    return row.heads if len(row.heads) == 1 else ("mean", *row.heads)


def _of(row: AttentionRow, heads: Sequence[Head], layer: Layer) -> Values:
    return np.stack([row.map(layer, head) for head in heads])


def _head_name(head: Head) -> str:
    return "mean" if head == "mean" else f"head {head}"


def _mask(outlying: Outlying | None) -> Mask | None:
    return None if outlying is None else outlying.mask


def _map(
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
    if outlying is not None and style.outliers == "mark":
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
    if outlying is not None and style.outliers == "mark":
        mosaic.outlines(place, outlying.mask)
    mosaic.query(place, row.patch)
    mosaic.title(place, "image", SMALL)


def _title(ax: Axes, caption: list[str]) -> None:
    figure: Any = ax.figure
    width = ax.get_position().width * figure.get_size_inches()[0]
    lines = wrap(caption, width, POINTS)
    ax.set_title("\n".join(lines), fontsize=POINTS, family=FONT, parse_math=False)
