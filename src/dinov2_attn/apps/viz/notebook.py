"""The picture of a result in a notebook."""

from __future__ import annotations

import importlib.util
import warnings


def picture_of(result: object) -> bytes | None:
    """Return a PNG of ``result``, or ``None`` if it cannot be drawn or matplotlib is missing.

    It shows the first image: of maps every head of the last layer and the first query, of a
    rollout and a relevance the first query, of artifact tokens the norms.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from dinov2_attn.apps.viz.results import figure_of
            from dinov2_attn.apps.viz.shown import png

            figure = figure_of(result)
            return None if figure is None else png(figure)
    except Exception:  # a notebook shows the table of a result that cannot be drawn
        return None
