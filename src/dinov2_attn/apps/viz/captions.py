"""The captions of pictures: model, layer, head, query, prefix mass, outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dinov2_attn.apps.viz.colours import Mask
from dinov2_attn.apps.viz.rows import AttentionRow, Head
from dinov2_attn.apps.viz.style import DECADES, Style
from dinov2_attn.apps.viz.text import percent
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.typing import Layer

if TYPE_CHECKING:
    from dinov2_attn.maps.artifacts import ArtifactTokens


@dataclass(frozen=True, eq=False)
class Outlying:
    """The artifact tokens of one image.

    Attributes:
        mask: The patches ``(h, w)``.
        layer: The block after which their norms were measured.
        threshold: The norm above which a patch is an outlier.

    """

    mask: Mask
    layer: Layer
    threshold: float


def outlying_in(
    artifacts: ArtifactTokens | None, row: AttentionRow, sample: int = 0
) -> Outlying | None:
    """Return the artifacts of one image. Raise ``InvalidInputError`` if the grid is another."""
    if artifacts is None:
        return None
    shape = tuple(artifacts.mask.shape)
    if sample >= shape[0] or shape[1:] != row.grid:
        raise InvalidInputError(
            f"artifact tokens of image {sample} on a grid of {row.grid[0]} × {row.grid[1]}",
            f"a mask of shape {shape}",
            "Pass what artifact_tokens returned for the same batch.",
        )
    mask = artifacts.mask[sample].cpu().numpy()
    return Outlying(mask, int(artifacts.layer[sample]), float(artifacts.threshold[sample]))


def sentences(
    row: AttentionRow,
    layer: Layer,
    head: Head | None,
    style: Style,
    outlying: Outlying | None = None,
    name: str | None = None,
) -> list[str]:
    """Return the caption of one layer's picture. ``head`` is ``None`` if it shows each head."""
    return [
        subject(name, f"layer {layer}", _heads(head), f"query {row.name}"),
        prefix_sentence(row, layer, "mean" if head is None else head),
        *outlier_note(row, layer, style, outlying, "mean" if head is None else head),
    ]


def subject(*parts: str | None) -> str:
    """Return what a picture shows, in one line."""
    return " · ".join(filter(None, parts))


def prefix_sentence(row: AttentionRow, layer: Layer, head: Head) -> str:
    """Return the share of attention on CLS and the registers, which a map does not show."""
    mean = ", mean of heads" if head == "mean" else ""
    share = percent(row.prefix_mass(layer, head))
    return f"{_prefix_hold(row)} {share} of the attention{mean}."


def mass_note(row: AttentionRow, place: str, mean: str = "") -> str:
    """Return what the numbers at the maps are."""
    return f"{place}: the share of attention on {prefix_names(row)}{mean}."


def prefix_names(row: AttentionRow) -> str:
    """Return the names of the tokens before the patches."""
    registers = row.prefix - 1
    plural = "s" if registers > 1 else ""
    return f"CLS and {registers} register{plural}" if registers else "CLS"


def outlier_note(
    row: AttentionRow,
    layer: Layer | None,
    style: Style,
    outlying: Outlying | None,
    head: Head = "mean",
) -> list[str]:
    """Return how outliers are drawn, and whether the scale is logarithmic."""
    notes = [_outliers(row, layer, style, outlying, head)]
    if style.log:
        notes.append(f"Logarithmic colours, {DECADES} decades at most.")
    return notes


def _outliers(
    row: AttentionRow, layer: Layer | None, style: Style, outlying: Outlying | None, head: Head
) -> str:
    if outlying is None:
        return "Outliers: not searched for."
    count = int(outlying.mask.sum())
    rule = f"norm after layer {outlying.layer} above {outlying.threshold:.4g}"
    if not count:
        return f"Outliers: none (no {rule})."
    done = {
        "mark": "marked by red squares",
        "clip": "excluded from the limits of the colours",
        "mask": "masked in grey",
        "none": "shown like all others",
    }[style.outliers]
    plural = "es" if count > 1 else ""
    held = ""
    if layer is not None:
        share = np.nansum(row.map(layer, head)[outlying.mask])
        mean = ", mean of heads" if head == "mean" else ""
        held = f", holding {percent(share)} of the attention{mean}"
    return f"Outliers: {count} patch{plural} {done} ({rule}){held}."


def _prefix_hold(row: AttentionRow) -> str:
    return f"{prefix_names(row)} hold{'s' * (row.prefix == 1)}"


def _heads(head: Head | None) -> str:
    if head is None:
        return "each head"
    return "mean of heads" if head == "mean" else f"head {head}"
