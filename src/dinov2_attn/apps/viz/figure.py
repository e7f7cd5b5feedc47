"""A figure for a paper: images by columns, at its final size, with its caption beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from dinov2_attn.apps.viz.bars import Bar, bar_of, bar_without_numbers
from dinov2_attn.apps.viz.captions import Outlying, figure_caption, outlying_in
from dinov2_attn.apps.viz.colours import Mask
from dinov2_attn.apps.viz.figure_sheet import POINTS, FigureSheet
from dinov2_attn.apps.viz.limits import scale, scale_together
from dinov2_attn.apps.viz.mosaic import Cells, Mosaic
from dinov2_attn.apps.viz.pictures import Picture, draw_map, head_name
from dinov2_attn.apps.viz.pixels import as_pixels
from dinov2_attn.apps.viz.provenance import Facts
from dinov2_attn.apps.viz.rows import AttentionRow, Drawable, Values, select_row
from dinov2_attn.apps.viz.saving import write_figure, written
from dinov2_attn.apps.viz.style import PLAIN, Style
from dinov2_attn.apps.viz.text import POINTS_PER_INCH
from dinov2_attn.errors import InvalidInputError, shown
from dinov2_attn.maps.places import Head
from dinov2_attn.typing import Layer

if TYPE_CHECKING:
    from dinov2_attn.maps.artifacts import ArtifactTokens
    from dinov2_attn.math.token_names import Token

PHOTO = "photo"
SCREEN = 150  # pixels per inch in a notebook
PRINT = 600  # and in a file


@dataclass(frozen=True, eq=False)
class PaperFigure:
    r"""A figure at its final size, and its caption.

    Attributes:
        figure: matplotlib's figure.
        caption: The caption, for ``\caption{}`` or an alternative text.

    """

    figure: Figure
    caption: str

    def save(self, path: str | Path, *, facts: Facts | None = None) -> None:
        """Write the figure as PDF, SVG or PNG, and its caption as text next to it.

        Args:
            path: The file. Its suffix, ``.pdf``, ``.svg`` or ``.png``, chooses the format. The
                caption has the same name with ``.txt``.
            facts: What else the metadata of the figure say, as in ``viz.save``.

        Raises:
            InvalidInputError: for another suffix.
            UnwritableOutputError: if a file cannot be written.

        """
        path = Path(path)
        with written(path) as drawn, written(path.with_suffix(".txt")) as text:
            write_figure(self.figure, drawn, PRINT, facts)
            text.write_text(self.caption + "\n", encoding="utf-8")

    def _repr_png_(self) -> bytes:
        file = BytesIO()
        self.figure.savefig(file, format="png", dpi=SCREEN)
        return file.getvalue()


@dataclass(frozen=True, eq=False)
class _Image:
    """One image of the figure, which is a row of cells."""

    row: AttentionRow
    pixels: npt.NDArray[Any]
    outlying: Outlying | None
    maps: dict[int, Values]  # by column

    @property
    def mask(self) -> Mask | None:
        return None if self.outlying is None else self.outlying.mask


def figure(
    maps: Drawable | Sequence[Drawable],
    images: Picture | Sequence[Picture],
    *,
    columns: Sequence[Head] = (PHOTO, "mean"),
    width: float = 3.25,
    layer: Layer | None = None,
    query: Token = "cls",
    artifacts: ArtifactTokens | Sequence[ArtifactTokens | None] | None = None,
    style: Style = PLAIN,
    name: str | None = None,
    names: Sequence[str] = (),
    warning: str | None = None,
) -> PaperFigure:
    """Draw images (rows) by columns for a paper, at the size that it has there.

    >>> maps = [attention_maps(model, image.tensor[None], queries="cls") for image in images]
    >>> style = viz.Style(limits="each", cmap="inferno")
    >>> figure = viz.figure(maps, images, columns=["photo", "mean", 0, 3], style=style)
    >>> figure.save("fig.pdf")  # and fig.txt with the caption

    All letters have 7 points. The caption is not part of the picture.

    Args:
        maps: A list with the maps of each image, or the maps of one batch.
        images: A list of images, as ``plot`` takes them: one for each of the maps.
        columns: What stands in each column: ``"photo"``, ``"mean"`` or the number of a head.
        width: The width in inches. A column has 3.25 in many journals.
        layer: As in ``plot``.
        query: As in ``plot``.
        artifacts: What ``artifact_tokens`` found: a list with one for each image, or that of the
            batch.
        style: As in ``plot``. With ``limits="each"`` each map has a scale of its own. Otherwise
            all maps of the figure share one.
        name: What the caption calls the model.
        names: What the caption calls the images.
        warning: A sentence that stays with the picture.

    Returns:
        The figure and its caption. Its ``save`` writes both.

    Raises:
        InvalidInputError: if there is not one image for each of the maps, no map among the
            columns, or no room for them.
        OutOfRangeError: if there is no such layer, head or query.

    """
    if all(column == PHOTO for column in columns):
        raise InvalidInputError(
            "a map among the columns", repr(list(columns)), "Add 'mean' or the number of a head."
        )
    titles = [PHOTO if column == PHOTO else head_name(column) for column in columns]
    parts = _each(maps, images, artifacts, query)
    if names and len(names) != len(parts):
        raise InvalidInputError(
            f"{len(parts)} names", f"{len(names)}", "Name each image, or none of them."
        )
    bar_lines = 1 if style.limits == "each" else 2
    sheet = FigureSheet(width, titles, [row.grid for row, *_ in parts], bar_lines, warning)
    rows = [_image(*part, layer, columns) for part in parts]
    norms = _norms(rows, style)
    drawn, places, bar = sheet.draw()
    for ax, image, own in zip(places, rows, norms, strict=True):
        cells, patch = sheet.cells(image.row.grid), sheet.patch(image.row.grid)
        _draw_row(ax, cells, patch, image, own, style, len(columns))
    _bar(rows, norms, style).draw_flat(drawn, bar, POINTS)
    caption = figure_caption(
        [image.row for image in rows],
        [image.outlying for image in rows],
        rows[0].row.layers[rows[0].row.layer(layer)],
        ["the image" if title == PHOTO else title for title in titles],
        [norm for own in norms for norm in own.values()],
        [values for image in rows for values in image.maps.values()],
        style,
        name,
        names,
    )
    return PaperFigure(drawn, caption if warning is None else f"{caption} {shown(warning)}.")


def _each(
    maps: Any, images: Any, artifacts: Any, query: Token
) -> list[tuple[AttentionRow, Any, Outlying | None]]:
    """Return row, image and artifact tokens of each image."""
    pictures = list(images) if isinstance(images, list | tuple) else [images]
    listed = isinstance(maps, list | tuple)
    count = len(maps) if listed else len(maps.weights[0])
    found = artifacts if isinstance(artifacts, list | tuple) else [artifacts] * count
    if not count == len(pictures) == len(found):
        raise InvalidInputError(
            "one image for each of the maps, and artifact tokens for each or none",
            f"{count} maps, {len(pictures)} images, {len(found)} artifact tokens",
            "Pass a list of images, one for each of a list of maps or of the batch.",
        )
    each = []
    for i, picture in enumerate(pictures):
        row = select_row(maps[i], query) if listed else select_row(maps, query, i)
        sample = 0 if isinstance(artifacts, list | tuple) else i
        each.append((row, picture, outlying_in(found[i], row, sample)))
    return each


def _image(
    row: AttentionRow,
    picture: Any,
    outlying: Outlying | None,
    layer: Layer | None,
    columns: Sequence[Head],
) -> _Image:
    maps = {i: row.times(layer, head) for i, head in enumerate(columns) if head != PHOTO}
    return _Image(row, as_pixels(picture), outlying, maps)


def _norms(rows: Sequence[_Image], style: Style) -> list[dict[int, Normalize]]:
    """Return the scale of each map of each row, by column."""
    if style.limits == "each":
        return [
            {i: scale(values, style, image.mask) for i, values in image.maps.items()}
            for image in rows
        ]
    every = [(values, image.mask) for image in rows for values in image.maps.values()]
    one = scale_together(every, style)
    return [dict.fromkeys(image.maps, one) for image in rows]


def _bar(rows: Sequence[_Image], norms: Sequence[dict[int, Normalize]], style: Style) -> Bar:
    first = next(iter(norms[0].values()))
    if style.limits == "each":
        return bar_without_numbers(first, style, "highest of each map")
    tokens = {image.row.tokens for image in rows}
    maps = [values for image in rows for values in image.maps.values()]
    return bar_of(first, maps, style, tokens.pop() if len(tokens) == 1 else None)


def _draw_row(
    ax: Axes,
    cells: Cells,
    patch: float,
    image: _Image,
    norms: dict[int, Normalize],
    style: Style,
    columns: int,
) -> None:
    # Thinner than on a screen: a patch has about a point here.
    thick = min(1.0, max(0.2, 0.12 * patch * POINTS_PER_INCH))
    mosaic = Mosaic(ax, cells, style, thick)
    for column in range(columns):
        place = 0, column
        if column in norms:
            draw_map(mosaic, place, image.maps[column], norms[column], style, image.outlying)
        else:
            mosaic.picture(place, image.pixels)
            if image.outlying is not None and style.outliers != "none":
                mosaic.outlines(place, image.outlying.mask)
        mosaic.query(place, image.row.patch)
    mosaic.finish()
