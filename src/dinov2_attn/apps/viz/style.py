"""How numbers become colours: contrast, limits, outliers."""

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
# The range of a logarithmic scale. Attention can be zero.
DECADES = 4


@dataclass(frozen=True)
class Style:
    """How maps are drawn.

    Attributes:
        log: Whether the scale is logarithmic, with four decades at most.
        interpolation: Between patches: ``"nearest"`` (none) or ``"bilinear"``.
        outliers: How artifact tokens are drawn: ``"mark"`` (a red square), ``"clip"`` (excluded
            from the limits of the colours), ``"mask"`` (grey, and excluded) or ``"none"``.
        alpha: The opacity of a map over an image, in (0, 1].

    Raises:
        InvalidInputError: for any other value.

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
        """Whether outliers are excluded from the limits of the colours."""
        return self.outliers in ("clip", "mask")

    def norm(self, values: Values, outlying: Mask | None = None) -> Normalize:
        """Return matplotlib's scale for maps ``(…, h, w)``, from their minimum to their maximum.

        ``outlying`` ``(h, w)`` marks the artifacts. Numbers that are not finite are ignored.
        """
        if self.spares and outlying is not None and not outlying.all():
            values = values[..., ~outlying]
        values = values[np.isfinite(values)]
        if self.log:
            values = values[values > 0]
        low, high = (values.min(), values.max()) if values.size else (0.1, 1.0)
        if self.log:
            low = max(low, high / 10**DECADES)
            # A constant map gets the lowest colour.
            return LogNorm(low, high if high > low else 10 * low, clip=True)
        return Normalize(low, high if high > low else 2 * low or 1.0)

    def without_outliers(self, values: Values, outlying: Mask | None) -> Values:
        """Return a map ``(h, w)`` with masked outliers at the minimum of the others.

        Grey covers them. Interpolation must not spread their values to their neighbours.
        """
        if self.outliers != "mask" or outlying is None or outlying.all():
            return values
        return np.where(outlying, np.nanmin(values[~outlying]), values)


def colour_map() -> Colormap:
    """Return viridis, with black for NaN."""
    return matplotlib.colormaps["viridis"].with_extremes(bad="black")


def extend(norm: Any, values: Values) -> str:
    """Return at which ends ``values`` exceed the scale: neither, min, max or both."""
    finite = values[np.isfinite(values)]
    below, above = (finite < norm.vmin).any(), (finite > norm.vmax).any()
    return ("both" if above else "min") if below else ("max" if above else "neither")
