"""Attention maps as matplotlib figures: one map, the heads of a layer, layers by heads, masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from matplotlib.figure import Figure

from dinov2_attn.apps.viz.captions import (
    Outlying,
    holders,
    outlying_in,
    prefix_sentence,
    sentences,
    subject,
    treatment,
)
from dinov2_attn.apps.viz.colours import Mask, heaviest
from dinov2_attn.apps.viz.mosaic import Cells, Mosaic
from dinov2_attn.apps.viz.pixels import as_pixels
from dinov2_attn.apps.viz.rows import Drawable, Head, Look, Values, look
from dinov2_attn.apps.viz.sheet import POINTS, Sheet, draw_bar
from dinov2_attn.apps.viz.style import GREY, Style, extend
from dinov2_attn.apps.viz.text import FONT, POINTS_PER_INCH, percent, wrap
from dinov2_attn.apps.viz.tokens import Token

if TYPE_CHECKING:
    import numpy.typing as npt
    import PIL.Image
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

    from dinov2_attn.maps.artifacts import ArtifactTokens

PLAIN = Style()
STAIN = (1.0, 0.0, 0.0, 0.5)
# A photograph: an array or a tensor with the channels last, or an image of Pillow.
Picture: TypeAlias = "npt.ArrayLike | PIL.Image.Image"

SMALL = 7.0  # points, of the titles of cells
TITLE = 0.2  # inches above a cell for its title
GAP = 0.1  # inches between cells
LARGEST = 14.0  # inches of a mosaic's longer side


def plot(
    maps: Drawable,
    ax: Axes | None = None,
    *,
    layer: int | None = None,
    head: Head = "mean",
    query: Token = "cls",
    sample: int = 0,
    image: Picture | None = None,
    artifacts: ArtifactTokens | None = None,
    style: Style = PLAIN,
    name: str | None = None,
    warning: str | None = None,
) -> Axes:
    """Draw where one token looks, in one layer and head, and return the Axes.

    >>> maps = attention_maps(model, images, queries="cls")
    >>> show.plot(maps, layer=11, head=3, image=photograph).figure.savefig("head3.png")
    >>> show.plot(maps, ax, style=show.Style(log=True, interpolation="bilinear"))

    =========  ====================================================================
    maps       an ``AttentionMaps``, or a ``Recording`` of one pass
    ax         a matplotlib Axes, whose title becomes the caption; ``None`` makes a figure
               of its own, with a colour bar (``ax.figure``); pyplot is never touched
    layer      a block, as ``maps.layers`` counts; ``None`` is the last of them
    head       its number, or ``"mean"``
    query      ``"cls"``, ``"register:2"``, a patch ``(row, column)``, or a position; a
               patch is framed in white
    sample     which image of the batch
    image      a photograph ``(H, W, 3)`` or ``(H, W)`` to lay the map over: integers of 0…255
               or floats of 0…1
    artifacts  what ``artifact_tokens`` found in the same batch, treated as ``style`` says
    style      contrast, interpolation, outliers, alpha
    name       what the caption calls the model
    warning    a sentence that has to travel with the picture
    =========  ====================================================================

    In data coordinates the patch (row, column) is centred at x = column, y = row. A colour
    bar takes the map, ``ax.images[0]``, or ``ax.images[1]`` where it lies over a photograph.
    Raises ``InvalidInputError`` and ``OutOfRangeError``.
    """
    seen = look(maps, query, sample)
    outlying = outlying_in(artifacts, seen, sample)
    layer = seen.layers[seen.layer(layer)]
    values = seen.map(layer, head)
    norm = style.norm(values, _mask(outlying))
    caption = sentences(seen, layer, head, style, outlying, name)
    cells = Cells(seen.grid)
    if ax is None:
        sheet = Sheet(cells, _side(seen.grid, 6.0, 1, 1))
        figure, ax, bar = sheet.figure(caption, warning)
        draw_bar(figure, bar, norm, extend(norm, values))
        thick = _thickness(sheet.patch)
    else:
        _title(ax, [*caption, *([warning] if warning else [])])
        thick = 1.5
    mosaic = Mosaic(ax, cells, style, thick)
    if image is not None:
        mosaic.picture((0, 0), as_pixels(image))
    alpha = 1.0 if image is None else style.alpha
    _map(mosaic, (0, 0), values, norm, style, outlying, alpha)
    mosaic.query((0, 0), seen.patch)
    mosaic.finish()
    return ax


def plot_heads(
    maps: Drawable,
    *,
    layer: int | None = None,
    query: Token = "cls",
    sample: int = 0,
    image: Picture | None = None,
    artifacts: ArtifactTokens | None = None,
    style: Style = PLAIN,
    name: str | None = None,
    warning: str | None = None,
    together: bool = False,
) -> Figure:
    """Draw every head of a layer and their mean, with one scale for all, and return the figure.

    Arguments are those of ``plot``; an ``image`` comes first, beside the maps. Above each
    map stands what CLS and the registers hold. ``together`` scales by all layers, so that
    figures of several can be compared.
    """
    seen = look(maps, query, sample)
    outlying = outlying_in(artifacts, seen, sample)
    layer = seen.layers[seen.layer(layer)]
    heads = _heads(seen)
    scaled = [_of(seen, heads, number) for number in (seen.layers if together else [layer])]
    norm = style.norm(np.concatenate(scaled), _mask(outlying))
    photographs = 0 if image is None else 1
    sheet, places = _grid_sheet(seen.grid, photographs + len(heads))
    caption = [
        *sentences(seen, layer, None, style, outlying, name),
        f"Above each map: what {holders(seen)} hold{'s' if seen.prefix == 1 else ''}.",
    ]
    figure, ax, bar = sheet.figure(caption, warning)
    draw_bar(figure, bar, norm, extend(norm, np.concatenate(scaled)))
    mosaic = Mosaic(ax, sheet.cells, style, _thickness(sheet.patch))
    if image is not None:
        _photograph(mosaic, places[0], image, seen, style, outlying)
    for place, head in zip(places[photographs:], heads, strict=True):
        _map(mosaic, place, seen.map(layer, head), norm, style, outlying)
        mosaic.query(place, seen.patch)
        mass = percent(seen.prefix_mass(layer, head))
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
    """Draw all layers of ``maps``, one to a row, by heads, with one scale, and return the figure.

    Arguments are those of ``plot``. The first column is the mean of heads; beside each layer
    stands what CLS and the registers hold, mean of heads.
    """
    seen = look(maps, query, sample)
    outlying = outlying_in(artifacts, seen, sample)
    heads = _heads(seen)
    values = np.stack([_of(seen, heads, layer) for layer in seen.layers])
    norm = style.norm(values, _mask(outlying))
    sheet = _table_sheet(seen.grid, len(seen.layers), len(heads))
    caption = [
        subject(name, "each layer by each head", f"query {seen.name}"),
        f"Beside each layer: what {holders(seen)} hold{'s' if seen.prefix == 1 else ''}, "
        "mean of heads.",
        *treatment(seen, None, style, outlying),
    ]
    figure, ax, bar = sheet.figure(caption, warning)
    draw_bar(figure, bar, norm, extend(norm, values))
    mosaic = Mosaic(ax, sheet.cells, style, _thickness(sheet.patch))
    for row, layer in enumerate(seen.layers):
        mosaic.label(row, f"layer {layer}\n{percent(seen.prefix_mass(layer, 'mean'))}", SMALL)
        for column, head in enumerate(heads):
            place = row, column
            _map(mosaic, place, values[row, column], norm, style, outlying)
            mosaic.query(place, seen.patch)
            if row == 0:
                mosaic.title(place, _head_name(head), SMALL)
    mosaic.finish()
    return figure


def plot_masks(
    maps: Drawable,
    share: float,
    *,
    image: Picture,
    layer: int | None = None,
    query: Token = "cls",
    sample: int = 0,
    name: str | None = None,
    warning: str | None = None,
) -> Figure:
    """Draw over the ``image`` which patches keep a ``share`` of each head's mass; the figure.

    As in DINO v1, of the mass that lies on patches; what CLS and registers hold does not
    count. Kept patches are stained red. Other arguments are those of ``plot``.
    """
    seen = look(maps, query, sample)
    layer = seen.layers[seen.layer(layer)]
    heads = _heads(seen)
    sheet, places = _grid_sheet(seen.grid, 1 + len(heads))
    caption = [
        subject(name, f"layer {layer}", "each head", f"query {seen.name}"),
        prefix_sentence(seen, layer, "mean"),
        f"In red: the fewest patches that hold {percent(share)} of what a head gives to patches. "
        "Above each map: how many of all.",
    ]
    figure, ax, _ = replace(sheet, bar=False).figure(caption, warning)
    mosaic = Mosaic(ax, sheet.cells, PLAIN, _thickness(sheet.patch))
    _photograph(mosaic, places[0], image, seen, PLAIN, None)
    for place, head in zip(places[1:], heads, strict=True):
        kept = heaviest(seen.map(layer, head), share)
        mosaic.picture(place, as_pixels(image))
        mosaic.cover(place, kept, STAIN)
        mosaic.query(place, seen.patch)
        mosaic.title(place, f"{_head_name(head)} · {percent(kept.mean())}", SMALL)
    mosaic.finish()
    return figure


def _heads(seen: Look) -> tuple[Head, ...]:
    return seen.heads if len(seen.heads) == 1 else ("mean", *seen.heads)


def _of(seen: Look, heads: Sequence[Head], layer: int) -> Values:
    return np.stack([seen.map(layer, head) for head in heads])


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
    """Draw one map, and its outliers as ``style`` says."""
    mosaic.map(place, style.without_outliers(values, _mask(outlying)), norm, alpha)
    if outlying is not None and style.outliers == "mask":
        mosaic.cover(place, outlying.mask, GREY)
    if outlying is not None and style.outliers == "mark":
        mosaic.outlines(place, outlying.mask)


def _photograph(
    mosaic: Mosaic,
    place: tuple[int, int],
    image: Picture,
    seen: Look,
    style: Style,
    outlying: Outlying | None,
) -> None:
    mosaic.picture(place, as_pixels(image))
    if outlying is not None and style.outliers == "mark":
        mosaic.outlines(place, outlying.mask)
    mosaic.query(place, seen.patch)
    mosaic.title(place, "photograph", SMALL)


# Sizes


def _side(grid: tuple[int, int], target: float, rows: int, columns: int) -> float:
    """Return the side of a patch, in inches, for cells of about ``target`` inches."""
    height, width = grid
    longest = LARGEST / max(rows * height, columns * width)
    return min(target / math.sqrt(height * width), longest, 1.0)


def _grid_sheet(grid: tuple[int, int], count: int) -> tuple[Sheet, list[tuple[int, int]]]:
    """Return a sheet of about 4 by 3 for ``count`` titled cells, and where they go."""
    height, width = grid

    def off(columns: int) -> float:
        rows = math.ceil(count / columns)
        empty = rows * columns - count
        return abs(math.log(columns * width / (rows * height) * 3 / 4)) + empty / count

    columns = min(range(1, count + 1), key=off)
    rows = math.ceil(count / columns)
    patch = _side(grid, 2.4, rows, columns)
    title = 14 * 0.6 * SMALL / POINTS_PER_INCH  # head 12 · 43.1 %
    aside = max(width * patch, title) - width * patch + GAP
    cells = Cells(grid, rows, columns, (TITLE / patch, aside / patch))
    places = [divmod(i, columns) for i in range(count)]
    return Sheet(cells, patch, top=TITLE), places


def _table_sheet(grid: tuple[int, int], rows: int, columns: int) -> Sheet:
    height, width = grid
    patch = max(_side(grid, 1.6, rows, columns), 0.35 / max(grid))
    least = 0.45  # head 12 above, two lines beside
    gaps = tuple(
        (max(side * patch, least) - side * patch + 0.05) / patch for side in (height, width)
    )
    cells = Cells(grid, rows, columns, (gaps[0], gaps[1]))
    return Sheet(cells, patch, left=0.7, top=TITLE)


def _thickness(patch: float) -> float:
    """Return the width of a frame around a patch of so many inches, in points."""
    return min(1.5, max(0.4, 0.12 * patch * POINTS_PER_INCH))


def _title(ax: Axes, caption: list[str]) -> None:
    figure: Any = ax.figure
    width = ax.get_position().width * figure.get_size_inches()[0]
    lines = wrap(caption, width, POINTS)
    ax.set_title("\n".join(lines), fontsize=POINTS, family=FONT, parse_math=False)
