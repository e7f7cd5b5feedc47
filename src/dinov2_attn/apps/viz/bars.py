"""The colour bar: round multiples of uniform attention, with the share of attention beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from dinov2_attn.apps.viz.limits import extend
from dinov2_attn.apps.viz.rows import Values
from dinov2_attn.apps.viz.style import Style
from dinov2_attn.apps.viz.text import FONT, POINTS_PER_INCH

Orientation = Literal["vertical", "horizontal"]

LABEL = "attention (× uniform)"
# A label of a tick takes so many of its own heights along the bar, across it and its neighbours.
MOST = 6  # ticks
ROOM: dict[Orientation, float] = {"vertical": 3.0, "horizontal": 6.0}


@dataclass(frozen=True, eq=False)
class Bar:
    """What a colour bar says.

    Attributes:
        norm: The scale, in multiples of uniform attention.
        colours: The colour map.
        tokens: The number N of tokens: uniform attention is 1/N. ``None`` if images differ.
        beyond: At which ends colours stand for more: neither, min, max or both.
        ends: What stands at both ends in place of numbers, if scales differ.
        label: What the numbers are.
        unit: What stands behind each number.

    """

    norm: Normalize
    colours: Colormap
    tokens: int | None
    beyond: str = "neither"
    ends: tuple[str, str] | None = None
    label: str = LABEL
    unit: str = "×"

    def draw(self, figure: Figure, ax: Axes, points: float) -> None:
        """Draw the bar upright into ``ax``, with shares, in letters of ``points``."""
        self._draw(figure, ax, points, "vertical", self.label)

    def draw_flat(self, figure: Figure, ax: Axes, points: float) -> None:
        """Draw the bar from left to right into ``ax``, in letters of ``points``."""
        share_of_one = "× uniform" if self.tokens is None else f"1× = {share(1 / self.tokens)}"
        self._draw(figure, ax, points, "horizontal", f"attention ({share_of_one})")
        if self.ends is not None:
            ax.set_xlabel("")
            low, high = ax.get_xticklabels()
            low.set_horizontalalignment("left")
            high.set_horizontalalignment("right")

    def _draw(
        self, figure: Figure, ax: Axes, points: float, orientation: Orientation, label: str
    ) -> None:
        vertical = orientation == "vertical"
        box, (width, height) = ax.get_position(), figure.get_size_inches()
        width, height = box.width * width, box.height * height
        long, short = (height, width) if vertical else (width, height)
        bar = figure.colorbar(
            ScalarMappable(self.norm, self.colours),
            cax=ax,
            orientation=orientation,
            extend=self.beyond,
            extendfrac=short / long,  # the pointed ends are as long as the bar is wide
        )
        ax.minorticks_off()
        room = int(long * POINTS_PER_INCH / points / ROOM[orientation])
        places, labels = self._labels(min(max(2, room), MOST), shares=vertical)
        bar.set_ticks(places, labels=labels)
        ax.tick_params(labelsize=points, labelfontfamily=FONT, length=2.5, pad=2)
        bar.set_label(label, fontsize=points, family=FONT, labelpad=4 if vertical else 1)
        bar.outline.set_linewidth(0.5)

    def _labels(self, most: int, shares: bool) -> tuple[list[float], list[str]]:
        if self.ends is not None:
            return list(self.norm.inverse(np.array([0.0, 1.0]))), list(self.ends)
        places = ticks(self.norm, most)
        beside = [f"  {share(v / self.tokens)}" if self.tokens and shares else "" for v in places]
        labels = [
            f"{short(v)}{self.unit}{part}" if v else "0"
            for v, part in zip(places, beside, strict=True)
        ]
        return places, labels


def bar_of(
    scale: Normalize, maps: Sequence[Values] | Values, style: Style, tokens: int | None
) -> Bar:
    """Return the bar of ``maps``, in multiples of uniform attention, on one ``scale``."""
    values = np.concatenate([one.ravel() for one in maps])
    return Bar(scale, style.colour_map(), tokens, extend(scale, values))


def bar_without_numbers(scale: Normalize, style: Style, highest: str) -> Bar:
    """Return the bar of maps whose scales end at different numbers: at ``highest``."""
    lowest = "0" if not isinstance(scale, LogNorm) else "lowest"
    return Bar(scale, style.colour_map(), 1, ends=(lowest, highest))


def ticks(scale: Normalize, most: int) -> list[float]:
    """Return at most ``most`` + 1 round numbers on ``scale``."""
    low, high = float(scale.vmin or 0), float(scale.vmax or 1)
    if isinstance(scale, LogNorm):
        found: Any = LogLocator(numticks=most).tick_values(low, high)
        if ((found >= low) & (found <= high)).sum() < 2:
            found = MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(low, high)
    else:
        found = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    slack = (high - low) * 1e-9
    return [float(v) for v in found if low - slack <= v <= high + slack]


def times(multiple: float) -> str:
    """Return a multiple of uniform attention as 8.2×."""
    return f"{short(multiple)}×"


def share(part: float) -> str:
    """Return a share as 0.073 %."""
    return f"{short(100 * part)} %"


def short(number: float) -> str:
    """Return a number with two digits."""
    return f"{number:.2g}" if abs(number) < 99.5 else f"{number:.0f}"
