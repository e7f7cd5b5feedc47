"""What stands with a picture: model, layer, head, query, prefix mass, and what outliers became."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dinov2_attn.apps.viz.colours import Mask
from dinov2_attn.apps.viz.rows import Head, Look
from dinov2_attn.apps.viz.style import DECADES, Style
from dinov2_attn.apps.viz.text import percent
from dinov2_attn.errors import InvalidInputError

if TYPE_CHECKING:
    from dinov2_attn.maps.artifacts import ArtifactTokens


@dataclass(frozen=True, eq=False)
class Outlying:
    """The artifact tokens of one image: a mask ``(h, w)``, and how they were told."""

    mask: Mask
    layer: int
    threshold: float


def outlying_in(artifacts: ArtifactTokens | None, look: Look, sample: int = 0) -> Outlying | None:
    """Return the artifacts of the image looked at; raise ``InvalidInputError`` for others'."""
    if artifacts is None:
        return None
    shape = tuple(artifacts.mask.shape)
    if sample >= shape[0] or shape[1:] != look.grid:
        raise InvalidInputError(
            f"artifact tokens of image {sample} on a grid of {look.grid[0]} × {look.grid[1]}",
            f"a mask of shape {shape}",
            "Pass what artifact_tokens returned for the same batch.",
        )
    mask = artifacts.mask[sample].cpu().numpy()
    return Outlying(mask, int(artifacts.layer[sample]), float(artifacts.threshold[sample]))


def sentences(
    look: Look,
    layer: int,
    head: Head | None,
    style: Style,
    outlying: Outlying | None = None,
    name: str | None = None,
) -> list[str]:
    """Return the caption of one layer's picture; ``head`` is ``None`` where it shows each."""
    return [
        subject(name, f"layer {layer}", _heads(head), f"query {look.name}"),
        prefix_sentence(look, layer, "mean" if head is None else head),
        *treatment(look, layer, style, outlying, "mean" if head is None else head),
    ]


def subject(*parts: str | None) -> str:
    """Return what a picture is of, in one line."""
    return " · ".join(filter(None, parts))


def prefix_sentence(look: Look, layer: int, head: Head) -> str:
    """Say what CLS and the registers hold of what a picture does not show."""
    mean = ", mean of heads" if head == "mean" else ""
    verb = "holds" if look.prefix == 1 else "hold"
    return (
        f"{holders(look)} {verb} {percent(look.prefix_mass(layer, head))} of the attention{mean}."
    )


def holders(look: Look) -> str:
    """Name the tokens of the prefix."""
    registers = look.prefix - 1
    plural = "s" if registers > 1 else ""
    return f"CLS and {registers} register{plural}" if registers else "CLS"


def treatment(
    look: Look,
    layer: int | None,
    style: Style,
    outlying: Outlying | None,
    head: Head = "mean",
) -> list[str]:
    """Say what became of outliers, and that a scale is logarithmic."""
    said = [_outliers(look, layer, style, outlying, head)]
    if style.log:
        said.append(f"Logarithmic colours, {DECADES} decades at most.")
    return said


def _outliers(
    look: Look, layer: int | None, style: Style, outlying: Outlying | None, head: Head
) -> str:
    if outlying is None:
        return "Outliers: not looked for."
    count = int(outlying.mask.sum())
    rule = f"norm after layer {outlying.layer} above {outlying.threshold:.4g}"
    if not count:
        return f"Outliers: none (no {rule})."
    done = {
        "mark": "marked by red squares",
        "clip": "left out of the colours' limits",
        "mask": "masked in grey",
        "none": "shown like all others",
    }[style.outliers]
    plural = "es" if count > 1 else ""
    held = ""
    if layer is not None:
        share = np.nansum(look.map(layer, head)[outlying.mask])
        mean = ", mean of heads" if head == "mean" else ""
        held = f", holding {percent(share)} of the attention{mean}"
    return f"Outliers: {count} patch{plural} {done} ({rule}){held}."


def _heads(head: Head | None) -> str:
    if head is None:
        return "each head"
    return "mean of heads" if head == "mean" else f"head {head}"
