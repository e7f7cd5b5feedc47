"""How numbers become colours in a picture: contrast, limits, what is done with outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import matplotlib
import numpy as np
from matplotlib.colors import Colormap, LogNorm, Normalize

from dinov2_attn.apps.viz.colours import Mask
from dinov2_attn.apps.viz.rows import Values
from dinov2_attn.errors import InvalidInputError

Outliers = Literal["mark", "clip", "mask", "none"]
Interpolation = Literal["nearest", "bilinear"]

GREY = (0.6, 0.6, 0.6, 1.0)
# What a logarithmic scale shows: attention can be nought.
DECADES = 4


@dataclass(frozen=True)
class Style:
    """How maps are drawn.

    =============  ==================================================================
    log            a logarithmic scale, of four decades at most, for what is small
    interpolation  between patches: ``"nearest"`` (none) or ``"bilinear"``
    outliers       artifact tokens, where they are known: ``"mark"`` (a red square),
                   ``"clip"`` (left out of the colours' limits), ``"mask"`` (grey, and
                   left out of the limits) or ``"none"``
    alpha          how much of the map lies over the photograph, in (0, 1]
    =============  ==================================================================
    """

    log: bool = False
    interpolation: Interpolation = "nearest"
    outliers: Outliers = "mark"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        for name, kind in (("interpolation", Interpolation), ("outliers", Outliers)):
            if getattr(self, name) not in get_args(kind):
                raise InvalidInputError(
                    f"{name} as one of {', '.join(map(repr, get_args(kind)))}",
                    repr(getattr(self, name)),
                    "Check the spelling.",
                )
        if not (isinstance(self.alpha, int | float) and 0 < self.alpha <= 1):
            raise InvalidInputError("alpha as a number in (0, 1]", repr(self.alpha), "Try 0.5.")

    @property
    def spares(self) -> bool:
        """Whether outliers are left out of the limits."""
        return self.outliers in ("clip", "mask")

    def norm(self, values: Values, outlying: Mask | None = None) -> Normalize:
        """Return matplotlib's scale of maps ``(…, h, w)``: from their least to their greatest.

        ``outlying`` ``(h, w)`` are the artifacts. Numbers that are not finite do not count.
        """
        if self.spares and outlying is not None and not outlying.all():
            values = values[..., ~outlying]
        values = values[np.isfinite(values)]
        if self.log:
            values = values[values > 0]
        low, high = (values.min(), values.max()) if values.size else (0.1, 1.0)
        if self.log:
            low = max(low, high / 10**DECADES)
            # A constant has the lowest colour.
            return LogNorm(low, high if high > low else 10 * low, clip=True)
        return Normalize(low, high if high > low else 2 * low or 1.0)

    def without_outliers(self, values: Values, outlying: Mask | None) -> Values:
        """Return a map ``(h, w)`` in which masked outliers are as the least of the others.

        They are covered in grey; what they held is not to shine into their neighbours.
        """
        if self.outliers != "mask" or outlying is None or outlying.all():
            return values
        return np.where(outlying, np.nanmin(values[~outlying]), values)


def colour_map() -> Colormap:
    """Return viridis, with black for what is no number."""
    return matplotlib.colormaps["viridis"].with_extremes(bad="black")


def extend(norm: Any, values: Values) -> str:
    """Say at which ends there are ``values`` beyond the scale: neither, min, max or both."""
    finite = values[np.isfinite(values)]
    below, above = (finite < norm.vmin).any(), (finite > norm.vmax).any()
    return ("both" if above else "min") if below else ("max" if above else "neither")
