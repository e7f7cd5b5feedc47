"""Pictures of statistics: dots for each head over the depth, and a map of what patches receive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dinov2_attn.apps.viz.bars import bar_of
from dinov2_attn.apps.viz.captions import colour_sentence, in_layer, of_model
from dinov2_attn.apps.viz.layout import line_width, single_sheet
from dinov2_attn.apps.viz.limits import scale
from dinov2_attn.apps.viz.mosaic import Cells, Mosaic
from dinov2_attn.apps.viz.pictures import Picture, draw_map, title
from dinov2_attn.apps.viz.pixels import as_pixels, greyed
from dinov2_attn.apps.viz.rows import Values
from dinov2_attn.apps.viz.sheet import BAR_POINTS, POINTS
from dinov2_attn.apps.viz.shown import ShownFigure
from dinov2_attn.apps.viz.style import PLAIN, Style
from dinov2_attn.apps.viz.text import FONT, wrap
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.maps.measuring import check_statistics
from dinov2_attn.maps.places import (
    Head,
    place_of_head,
    place_of_layer,
    place_of_sample,
)
from dinov2_attn.maps.statistics import Statistics
from dinov2_attn.typing import Layer, Queries, Statistic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dinov2_attn.maps.attention_maps import AttentionMaps
    from dinov2_attn.maps.recording import Recording

# What has statistics: they themselves, or maps that were recorded with them.
Measured: TypeAlias = "Statistics[Any] | AttentionMaps[Any] | Recording[Any]"

_LABELS: dict[Statistic, str] = {
    "entropy": "entropy (nats)",
    "distance": "mean distance (patches)",
    "prefix_mass": "attention to CLS and registers",
    "spread": "spread (patches)",
    "received": "attention received",
}
# The names that are drawn by default: one number for each head says something of them.
_DRAWN: tuple[Statistic, ...] = ("entropy", "distance", "prefix_mass", "spread")
_IN_PATCHES = ("distance", "spread")


def plot_statistics(
    measured: Measured,
    of: Sequence[Statistic] | Statistic | None = None,
    *,
    queries: Queries = "patches",
    sample: int | None = None,
    patch_size: int | None = None,
    name: str | None = None,
    warning: str | None = None,
) -> Figure:
    """Draw statistics of each head over the depth, as papers do: a dot for each head.

    >>> viz.plot_statistics(statistics(model, images), ("entropy", "distance")).savefig("heads.png")

    The heads of a layer are sorted by their number. The dashed line is what attention would have
    that is the same for all tokens.

    Args:
        measured: What ``statistics`` returned, or maps recorded with ``statistics=...``.
        of: The names, by default those that are there of ``"entropy"``, ``"distance"``,
            ``"prefix_mass"`` and ``"spread"``.
        queries: The tokens whose mean is drawn, as in ``Statistics.by_head``.
        sample: Which image of the batch. ``None`` is the mean of all.
        patch_size: The side of a patch in pixels. Distance and spread are in pixels then.
        name: What the caption calls the model.
        warning: A sentence that stays with the picture.

    Returns:
        The figure, which a notebook shows.

    Raises:
        InvalidInputError: if a statistic is not there or cannot be drawn.
        OutOfRangeError: if there is no such sample or token.

    Sources: Dosovitskiy et al., 2021, figure 7; Raghu et al., 2021, figure 3.

    """
    found = statistics_of(measured)
    names = check_statistics(of if of is not None else [n for n in _DRAWN if n in found])
    if not names:
        raise InvalidInputError(
            f"a statistic to draw: one of {', '.join(map(repr, _DRAWN))}",
            f"statistics of {', '.join(map(repr, found)) or 'none'}",
            "Measure one of them, or draw viz.plot_received.",
        )
    numbers = [_by_layer(found, one, queries, sample) for one in names]
    wide = 3.4 * max(1.0, len(found.layers) / 16)  # dots of neighbours must not touch
    figure: Any = ShownFigure(figsize=(0.6 + wide * len(names), 3.6), facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, one, values in zip(axes, names, numbers, strict=True):
        times = patch_size if patch_size and one in _IN_PATCHES else 1
        _dots(ax, found, values * times)
        label = _LABELS[one].replace("patches)", "pixels)") if times != 1 else _LABELS[one]
        ax.set_ylabel(label, fontsize=POINTS, family=FONT)
        level = _uniform(found, one)
        if level is not None:
            ax.axhline(level * times, color="0.4", linewidth=0.8, linestyle="--", zorder=1)
        ax.set_ylim(0, 1.05 * ax.get_ylim()[1])  # dots at the top are whole
    lines = wrap(_caption(queries, sample, name), figure.get_figwidth() - 0.3, POINTS)
    red = wrap([warning], figure.get_figwidth() - 0.3, POINTS, bold=True) if warning else []
    figure.suptitle(
        "\n".join(lines), x=0.01, ha="left", fontsize=POINTS, family=FONT, parse_math=False
    )
    if red:
        figure.supxlabel(
            "\n".join(red), color="firebrick", weight="bold", fontsize=POINTS, family=FONT
        )
    return figure  # type: ignore[no-any-return]  # of matplotlib, whose types are partial


def plot_received(
    measured: Measured,
    ax: Axes | None = None,
    *,
    layer: Layer | None = None,
    head: Head = "mean",
    sample: int = 0,
    image: Picture | None = None,
    style: Style = PLAIN,
    name: str | None = None,
    warning: str | None = None,
) -> Axes:
    """Draw the attention that patches receive, the mean over all queries.

    >>> found = statistics(model, image.tensor[None], "received")
    >>> viz.plot_received(found, layer=11, image=image).figure.savefig("received.png")

    Colours stand for multiples of uniform attention: 1 is the N-th part, of N tokens.

    Args:
        measured: What ``statistics`` returned, or maps recorded with ``statistics=...``.
        ax: As in ``plot``.
        layer: As in ``plot``.
        head: As in ``plot``.
        sample: As in ``plot``.
        image: As in ``plot``.
        style: As in ``plot``.
        name: As in ``plot``.
        warning: As in ``plot``.

    Returns:
        The Axes.

    Raises:
        InvalidInputError: if ``"received"`` is not there, or the grid is unknown.
        OutOfRangeError: if there is no such layer, head or sample.

    """
    one = _received(statistics_of(measured), layer, head, sample)
    values = one.values
    norm = scale(values, style)
    caption = [
        f"Attention that patches receive from all tokens, {in_layer(one.layer, head)}."
        + of_model(name),
        colour_sentence([one.tokens], [norm], [values], style),
    ]
    if ax is None:
        sheet = single_sheet(one.grid)
        figure, ax, bar = sheet.figure(caption, warning)
        bar_of(norm, values, style, one.tokens).draw(figure, bar, BAR_POINTS)
        thick = line_width(sheet.patch)
    else:
        title(ax, [*caption, *([warning] if warning else [])])
        thick = 1.5
    mosaic = Mosaic(ax, Cells(one.grid), style, thick)
    if image is not None:
        pixels = as_pixels(image)
        mosaic.picture((0, 0), greyed(pixels) if style.background == "grey" else pixels)
    draw_map(mosaic, (0, 0), values, norm, style, None, 1.0 if image is None else style.alpha)
    mosaic.finish()
    return ax


def statistics_of(measured: Any) -> Statistics[Any]:
    """Return the statistics in ``measured``.

    Raises:
        InvalidInputError: If it has none.

    """
    if isinstance(measured, Statistics):
        return measured
    if hasattr(measured, "statistics") and hasattr(measured, "weights"):
        found: Statistics[Any] = measured.statistics
        return found
    raise InvalidInputError(
        "what statistics(model, images) returned, or maps recorded with them",
        f"a {type(measured).__name__}",
        "A list of batches gives a list of statistics: draw one of them, such as found[0].",
    )


@dataclass(frozen=True, eq=False)
class _Received:
    """What the patches of one image receive, in multiples of uniform attention."""

    values: Values
    layer: Layer
    grid: tuple[int, int]
    tokens: int


def _received(found: Statistics[Any], layer: Layer | None, head: Head, sample: int) -> _Received:
    maps, place = found.patch_maps("received"), place_of_layer(found.layers, layer)
    entry = found["received"][place]
    tokens = int(entry.shape[-1])
    one = _numbers(maps[place][place_of_sample(sample, len(entry))])
    if found.per_cell > 1:  # the tokens of a cell together
        one = one.sum(-3)
    if entry.ndim == 3:
        at = place_of_head(range(len(one)), head)
        one = one.mean(0) if at is None else one[at]
    else:
        place_of_head(("mean",), head)
    grid = (int(one.shape[-2]), int(one.shape[-1]))
    return _Received(one * tokens, found.layers[place], grid, tokens)


def _by_layer(
    found: Statistics[Any], name: Statistic, queries: Queries, sample: int | None
) -> Values:
    """Return one number for each head, ``(layers, heads)``."""
    numbers = _numbers(found.by_head(name, queries))
    if sample is None:
        numbers = numbers.mean(1)
    else:
        numbers = numbers[:, place_of_sample(sample, numbers.shape[1])]
    return numbers.reshape(len(numbers), -1)


def _dots(ax: Any, found: Statistics[Any], numbers: Values) -> None:
    layers, heads = numbers.shape
    names = list(found.layers)
    if np.isnan(numbers).all():
        undefined = "these tokens have none: NaN"
        at = {"transform": ax.transAxes, "ha": "center", "va": "center"}
        ax.text(0.5, 0.5, undefined, fontsize=POINTS, family=FONT, color="0.4", **at)
    aside = (np.arange(heads) - (heads - 1) / 2) * 0.7 / max(1, heads)
    for i in range(layers):
        ax.plot(i + aside, np.sort(numbers[i]), ".-", color="#3b6fb6", linewidth=0.5, markersize=5)
    shown = list(range(0, layers, -(-layers // 12)))
    ax.set_xticks(
        shown,
        labels=[
            str(n) if isinstance(n, int) else str(i) for i, n in ((i, names[i]) for i in shown)
        ],
    )
    ax.set_xlim(-0.6, layers - 0.4)
    ax.margins(y=0.08)
    ax.tick_params(labelsize=7, labelfontfamily=FONT)
    ax.set_xlabel("layer", fontsize=POINTS, family=FONT)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _caption(queries: Queries, sample: int | None, name: str | None) -> list[str]:
    of = {"patches": "patches", "cls": "CLS", "registers": "registers"}
    who = of.get(queries, "some tokens") if isinstance(queries, str) else "some tokens"
    who = "all tokens" if queries is None else who
    where = "mean of all images" if sample is None else f"image {sample}"
    return [
        f"Attention of {who}, {where}: a dot for each head, sorted in each layer.{of_model(name)} "
        "Dashed: attention that is the same for all tokens."
    ]


def _uniform(found: Statistics[Any], name: Statistic) -> float | None:
    """Return what uniform attention has, a mean over patches."""
    tokens, seen = found[name][0].shape[-1], found.seen or found.grid
    if found.seen and found.grid:  # the model saw other tokens than are here
        tokens += math.prod(found.seen) - math.prod(found.grid)
    if name == "entropy":
        return math.log(tokens) if tokens else None
    if seen is None or found.per_cell > 1:
        return None
    height, width = seen
    if name == "prefix_mass":
        return float((tokens - height * width) / tokens)
    if name == "spread":
        return math.sqrt((height**2 + width**2 - 2) / 12)
    if name == "distance":
        down, right = np.arange(height), np.arange(width)
        gaps = np.hypot(down[:, None], right)
        count = (height - down)[:, None] * (width - right) * 1.0
        count[1:] *= 2
        count[:, 1:] *= 2
        return float((gaps * count).sum() / (height * width) ** 2)
    return None


def _numbers(values: Any) -> Values:
    if hasattr(values, "detach"):
        values = values.detach().cpu().double()
    return np.asarray(values, dtype=np.float64)
