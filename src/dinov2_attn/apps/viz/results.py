"""The figures by which results show themselves."""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from dinov2_attn.apps.viz.bars import Bar
from dinov2_attn.apps.viz.captions import Outlying
from dinov2_attn.apps.viz.layout import line_width, single_sheet
from dinov2_attn.apps.viz.limits import extend, scale
from dinov2_attn.apps.viz.mosaic import Mosaic
from dinov2_attn.apps.viz.pictures import draw_map, plot, plot_heads
from dinov2_attn.apps.viz.rows import Values
from dinov2_attn.apps.viz.sheet import BAR_POINTS
from dinov2_attn.apps.viz.statistics import plot_received, plot_statistics
from dinov2_attn.apps.viz.style import PLAIN
from dinov2_attn.maps.artifacts import ArtifactTokens
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.recording import Recording
from dinov2_attn.maps.result import as_array
from dinov2_attn.maps.rollout import Rollout
from dinov2_attn.maps.statistics import Statistics


@singledispatch
def figure_of(result: object) -> Figure | None:
    """Return the figure of ``result``, or ``None`` if it holds nothing to draw."""
    del result
    return None


@figure_of.register(AttentionMaps)
def _of_maps(maps: AttentionMaps) -> Figure:
    # One row of one layer: the others may be large, and would be copied.
    weights: Any = maps.weights[-1]
    query = 0 if maps.queries is None else maps.queries[0]
    one = (weights[:1, ..., :1, :],)
    first = replace(maps, weights=one, layers=maps.layers[-1:], queries=(query,), sources=())
    return plot_heads(first, query=query)


@figure_of.register(Recording)
def _of_recording(recording: Recording) -> Figure | None:
    return _of_maps(recording[0]) if len(recording) == 1 else None


@figure_of.register(Statistics)
def _of_statistics(found: Statistics) -> Figure:
    if set(found) <= {"received", "centroid"}:
        alone: Figure = plot_received(found).figure  # type: ignore[assignment]  # not a part of one
        return alone
    return plot_statistics(found, queries=None if found.grid is None else "patches")


@figure_of.register(Rollout)
def _of_flow(result: Rollout) -> Figure:
    first: Any = replace(result, weights=result.weights[:1, :1], queries=(result.queries or ())[:1])
    figure: Any = plot(first, query=first.queries[0] if first.queries else "cls").figure
    return figure  # type: ignore[no-any-return]


@figure_of.register(ArtifactTokens)
def _of_artifacts(artifacts: ArtifactTokens) -> Figure:
    values = _numbers(artifacts.norms[0])
    layer, threshold = int(artifacts.layer[0]), float(artifacts.threshold[0])
    outlying = Outlying(_numbers(artifacts.mask[0]) > 0, layer, threshold)
    norm = scale(values, PLAIN, outlying.mask)
    count = int(outlying.mask.sum())
    found = f"{count} (red frames)" if count else "none"
    caption = [
        f"Norms of patches after layer {layer}.",
        f"Artifact tokens: {found}, with a norm above {threshold:.4g}.",
    ]
    bar = Bar(norm, PLAIN.colour_map(), None, extend(norm, values), label="norm", unit="")
    return _alone(values, caption, norm, bar, outlying)


def _alone(
    values: Values,
    caption: list[str],
    norm: Normalize,
    bar: Bar,
    outlying: Outlying | None = None,
) -> Figure:
    """Return a figure of one map ``(h, w)``, with the limits and the marks of all pictures."""
    height, width = values.shape
    sheet = single_sheet((height, width))
    figure, ax, beside = sheet.figure(caption, None)
    bar.draw(figure, beside, BAR_POINTS)
    mosaic = Mosaic(ax, sheet.cells, PLAIN, line_width(sheet.patch))
    draw_map(mosaic, (0, 0), values, norm, PLAIN, outlying)
    mosaic.finish()
    return figure


def _numbers(values: Any) -> Values:
    array = as_array(values) if hasattr(values, "detach") else values
    return np.asarray(array, dtype=np.float64)
