"""The picture of a result in a notebook."""

from __future__ import annotations

import importlib.util
import warnings
from functools import singledispatch
from io import BytesIO
from typing import TYPE_CHECKING, Any

from dinov2_attn.maps.artifacts import ArtifactTokens
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.recording import Recording
from dinov2_attn.maps.rollout import Rollout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 80
# Inches of the longer side of a map that stands alone.
SIDE = 4.0
POINTS = 72  # in an inch


def picture_of(result: object) -> bytes | None:
    """Return a PNG of ``result``, or ``None`` if it cannot be drawn or matplotlib is missing.

    It shows the first image: of maps every head of the last layer and the first query, of a
    rollout the first query, of artifact tokens the norms.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figure = _figure(result)
            return None if figure is None else _png(figure)
    except Exception:  # a notebook shows the table of a result that cannot be drawn
        return None


def _png(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


@singledispatch
def _figure(result: object) -> Figure | None:
    return None


@_figure.register(AttentionMaps)
def _of_maps(maps: AttentionMaps) -> Figure:
    from dinov2_attn.apps.viz.pictures import plot_heads

    # One row of one layer: the others may be large, and would be copied.
    weights: Any = maps.weights[-1]
    query = 0 if maps.queries is None else maps.queries[0]
    first = AttentionMaps(
        (weights[:1, ..., :1, :],), maps.layers[-1:], maps.grid, maps.prefix, (query,)
    )
    return plot_heads(first, query=query)


@_figure.register(Recording)
def _of_recording(recording: Recording) -> Figure | None:
    return _of_maps(recording[0]) if len(recording) == 1 else None


@_figure.register(Rollout)
def _of_rollout(rollout: Rollout) -> Figure:
    return _alone(rollout.patch_maps()[0, 0], "Rollout of the first query")


@_figure.register(ArtifactTokens)
def _of_artifacts(artifacts: ArtifactTokens) -> Figure:
    figure = _alone(artifacts.norms[0], f"Norms after layer {int(artifacts.layer[0])}")
    rows, columns = _numbers(artifacts.mask[0]).nonzero()
    side = POINTS * SIDE * 0.7 / max(artifacts.norms.shape[1:])
    figure.axes[0].scatter(columns, rows, side**2, marker="s", facecolors="none", edgecolors="red")
    return figure


def _alone(values: object, title: str) -> Figure:
    """Return a figure of one map ``(h, w)`` with its colour bar."""
    from matplotlib.figure import Figure

    from dinov2_attn.apps.viz.style import colour_map

    figure = Figure(figsize=(SIDE, SIDE), layout="constrained")
    axes = figure.add_subplot(title=title)
    image = axes.imshow(_numbers(values), cmap=colour_map())
    axes.set_axis_off()
    figure.colorbar(image, shrink=0.7)
    return figure


def _numbers(values: object) -> Any:
    return values.detach().cpu().float().numpy() if hasattr(values, "detach") else values
