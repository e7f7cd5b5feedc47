"""How maps are drawn: contrast, limits, colours, artifact tokens, the image below."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import matplotlib
import numpy as np
from matplotlib.colors import Colormap

from dinov2_attn.apps.viz.colours import Mask
from dinov2_attn.apps.viz.rows import Values
from dinov2_attn.errors import InvalidInputError

Outliers = Literal["mark", "clip", "mask", "none"]
Interpolation = Literal["nearest", "bilinear"]
Background = Literal["grey", "colour"]
Cmap = Literal["viridis", "inferno", "magma", "plasma", "cividis", "gray"]
LimitsWord = Literal["robust", "shared", "each"]
Limits: TypeAlias = "LimitsWord | tuple[float, float]"

GREY = (0.6, 0.6, 0.6, 1.0)


@dataclass(frozen=True)
class Style:
    """How maps are drawn.

    Attributes:
        log: Whether the scale is logarithmic, with four decades at most.
        interpolation: Between patches: ``"nearest"`` (none) or ``"bilinear"``.
        outliers: How artifact tokens are drawn: ``"mark"`` (framed), ``"clip"`` (framed, and
            excluded from the limits of the colours whatever ``limits`` is), ``"mask"`` (framed,
            grey and excluded) or ``"none"`` (like all others).
        alpha: The opacity of a map over an image, in (0, 1].
        limits: Where the colours begin and end. ``"robust"``: from 0 to the highest patch, or
            below the few highest patches (0.5 % of them, in small maps 2 % but at most three for
            each map) if the highest is more than twice that end and they hold at most two thirds
            of the attention to patches. ``"each"``: from 0 to the highest patch of each map. In
            both, artifact tokens that are marked do not count.
            ``"shared"``: from 0 to the highest patch of all maps. Or two numbers, in multiples of
            uniform attention.
        cmap: The colour map, by its name in matplotlib. All of them grow steadily brighter.
        background: Whether an image below a map is ``"grey"`` or in ``"colour"``.

    Raises:
        InvalidInputError: for any other value.

    """

    log: bool = False
    interpolation: Interpolation = "nearest"
    outliers: Outliers = "mark"
    alpha: float = 0.5
    limits: Limits = "robust"
    cmap: Cmap = "viridis"
    background: Background = "grey"

    def __post_init__(self) -> None:
        for name, kind in _WORDS.items():
            if getattr(self, name) not in get_args(kind):
                raise InvalidInputError(
                    f"{name} as one of {', '.join(map(repr, get_args(kind)))}",
                    repr(getattr(self, name)),
                    "Check the spelling.",
                )
        if not (isinstance(self.alpha, int | float) and 0 < self.alpha <= 1):
            raise InvalidInputError("alpha as a number in (0, 1]", repr(self.alpha), "Try 0.5.")
        if not _is_range(self.limits) and self.limits not in get_args(LimitsWord):
            raise InvalidInputError(
                f"limits as one of {', '.join(map(repr, get_args(LimitsWord)))}, or (low, high) "
                "with 0 ≤ low < high",
                repr(self.limits),
                "Try 'robust' or (0, 8): 1 is uniform attention.",
            )

    @property
    def spares(self) -> bool:
        """Whether artifact tokens are excluded from the limits of the colours."""
        ours = self.limits in ("robust", "each")
        return self.outliers in ("clip", "mask") or (self.outliers == "mark" and ours)

    def without_outliers(self, values: Values, outlying: Mask | None) -> Values:
        """Return a map ``(h, w)`` with masked outliers at the minimum of the others.

        Grey covers them. Interpolation must not spread their values to their neighbours.
        """
        if self.outliers != "mask" or outlying is None or outlying.all():
            return values
        return np.where(outlying, np.nanmin(values[~outlying]), values)

    def colour_map(self) -> Colormap:
        """Return the colour map, with black for NaN."""
        return colour_map(self.cmap)


_WORDS: dict[str, Any] = {
    "interpolation": Interpolation,
    "outliers": Outliers,
    "cmap": Cmap,
    "background": Background,
}


def colour_map(name: str = "viridis") -> Colormap:
    """Return a colour map of matplotlib, with black for NaN."""
    return matplotlib.colormaps[name].with_extremes(bad="black")


def _is_range(limits: Any) -> bool:
    numbers = isinstance(limits, tuple | list) and all(isinstance(n, int | float) for n in limits)
    return numbers and len(limits) == 2 and 0 <= limits[0] < limits[1] < math.inf


PLAIN = Style()
