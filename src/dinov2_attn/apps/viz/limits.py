"""The limits of colours: which number gets the last one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize

from dinov2_attn.apps.viz.colours import Mask
from dinov2_attn.apps.viz.rows import Values
from dinov2_attn.apps.viz.style import Style

# The range of a logarithmic scale. Attention can be zero.
DECADES = 4
# The share of patches that may lie above robust limits. In a small grid this is less than a
# patch, so up to three may, and a blob of four is always within the limits.
ABOVE = 0.005
ABOVE_SMALL, FEW = 0.02, 3
# How many times the limit the highest patch must be to lie above it.
STANDS_OUT = 2.0
# Patches that hold more of the attention than this are what the maps show, however few.
MOST = 2 / 3


def scale(values: Values, style: Style, outlying: Mask | None = None) -> Normalize:
    """Return matplotlib's scale for maps ``(…, h, w)`` that share it.

    Args:
        values: The maps, in multiples of uniform attention. Numbers that are not finite are
            ignored.
        style: The limits, and whether the scale is logarithmic.
        outlying: The artifact tokens ``(h, w)``. ``style`` says whether they count.

    """
    return scale_together([(values, outlying)], style)


def scale_together(images: Sequence[tuple[Values, Mask | None]], style: Style) -> Normalize:
    """Return one scale for the maps of several images, each with its artifact tokens."""
    counted = [_counted(values, style, outlying) for values, outlying in images]
    if isinstance(style.limits, tuple | list):
        low, high = style.limits
        low = low or (high / 10**DECADES if style.log else 0.0)
    else:
        low, high = 0.0, _highest(counted, robust=style.limits == "robust")
    if style.log:
        return _log(low, high, np.concatenate([maps.ravel() for maps in counted]))
    return Normalize(low, high or 1.0)


def scales(values: Values, style: Style, outlying: Mask | None = None) -> list[Normalize]:
    """Return the scale of each of the maps ``(count, h, w)``, one for all if they share it."""
    if style.limits == "each":
        return [scale(one, style, outlying) for one in values]
    return [scale(values, style, outlying)] * len(values)


def extend(norm: Any, values: Values) -> str:
    """Return at which ends ``values`` exceed the scale: neither, min, max or both."""
    finite = values[np.isfinite(values)]
    below, above = (finite < norm.vmin).any(), (finite > norm.vmax).any()
    return ("both" if above else "min") if below else ("max" if above else "neither")


def _counted(values: Values, style: Style, outlying: Mask | None) -> Values:
    """Return the patches of maps ``(…, h, w)`` that may set limits, ``(count, patches)``."""
    maps = values.reshape(-1, *values.shape[-2:])
    if style.spares and outlying is not None and not outlying.all():
        return maps[:, ~outlying]
    return maps.reshape(len(maps), -1)


def _highest(images: Sequence[Values], robust: bool) -> float:
    """Return the number of the last colour for maps, each ``(count, patches)``."""
    every = np.concatenate([maps.ravel() for maps in images])
    finite = np.sort(every[np.isfinite(every)])
    if not finite.size:
        return 0.0
    highest = float(finite[-1])
    above = int(sum(map(_may_be_above, images)))
    if not robust or above >= finite.size:
        return highest
    usual = float(finite[-1 - above])
    stand_out = 0 < usual * STANDS_OUT < highest
    few = finite[finite > usual].sum() <= MOST * finite.sum()
    return usual if stand_out and few else highest


def _may_be_above(maps: Values) -> float:
    """Return how many patches of maps ``(count, patches)`` may lie above robust limits."""
    count, patches = maps.shape
    return float(count * max(ABOVE * patches, min(FEW, ABOVE_SMALL * patches)))


def _log(low: float, high: float, values: Values) -> Normalize:
    positive = values[values > 0]
    high = high or 1.0
    least = float(positive.min()) if positive.size else high
    low = max(low or least, high / 10**DECADES)
    # A constant map gets the lowest colour.
    return LogNorm(low, high if high > low else 10 * low, clip=True)
