"""The captions of pictures, in sentences: which attention, which colours, which marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LogNorm, Normalize

from dinov2_attn.apps.viz.bars import share, times
from dinov2_attn.apps.viz.colours import Mask
from dinov2_attn.apps.viz.rows import AttentionRow, Values
from dinov2_attn.apps.viz.style import Style
from dinov2_attn.apps.viz.text import percent
from dinov2_attn.errors import InvalidInputError, shown_name
from dinov2_attn.maps.places import Head
from dinov2_attn.typing import Layer

if TYPE_CHECKING:
    from dinov2_attn.maps.artifacts import ArtifactTokens

# The share of attention on CLS and the registers below which nothing is said of it.
NOTABLE = 0.05

# The rule of limits.py in words.
_ROBUST = (
    "Robust limits: at most the highest 0.5 % of patches lie above the last colour (in small maps "
    "2 %, up to three for each map), if the highest is more than twice that colour and they hold "
    "at most two thirds of the attention to patches."
)
_LITTLE = "In large models such patches hold little local information."


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


def subject(row: AttentionRow, where: str, name: str | None) -> str:
    """Return what a picture shows: the attention of which token, where, and in which model."""
    return f"Attention of {token_sentence(row)}, {where}.{of_model(name)}"


def of_model(name: str | None) -> str:
    """Return the sentence that names the model, with a space before it, or nothing."""
    return f" Model: {shown_name(name)}." if name else ""


def in_layer(layer: Layer, head: Head | None = None) -> str:
    """Return the words for a layer and a head. ``None`` is each head and their mean."""
    what = "mean of heads" if head == "mean" else f"head {head}"
    if head is None:
        what = "each head and their mean"
    return f"in layer {shown_name(layer)} (counted from 0): {what}"


def token_sentence(row: AttentionRow) -> str:
    """Return the words for the token whose attention is drawn."""
    if row.patch is not None:
        return f"{row.name} (row, column; framed in white)"
    if row.query == 0:
        return "CLS, the token that stands for the whole image"
    return f"{row.name}, a token without a place in the image"


def prefix_sentence(row: AttentionRow, layer: Layer, head: Head) -> list[str]:
    """Return what CLS and the registers get, which no map shows, if it is notable."""
    held = row.prefix_mass(layer, head)
    if not held > NOTABLE:
        return []
    mean = ", mean of heads" if head == "mean" else ""
    verb = "gets" if row.prefix == 1 else "get"
    no_patch = "It is not a patch" if row.prefix == 1 else "They are not patches"
    return [
        f"{prefix_names(row)} {verb} {percent(held)} of the attention{mean}. "
        f"{no_patch}, so maps leave this out."
    ]


def prefix_names(row: AttentionRow) -> str:
    """Return the names of the tokens before the patches."""
    registers = row.prefix - 1
    plural = "s" if registers > 1 else ""
    return f"CLS and {registers} register{plural}" if registers else "CLS"


def shown(row: AttentionRow, layer: Layer, head: Head) -> str:
    """Return the share of attention that a map shows, in brackets, if much of it is elsewhere."""
    held = row.prefix_mass(layer, head)
    return f"({100 * (1 - held):.0f} %)" if held > NOTABLE else ""


def shown_note(notes: Sequence[str], row: AttentionRow) -> list[str]:
    """Return what the ``notes`` of ``shown`` are, if there are any."""
    if not any(notes):
        return []
    return [
        f"In brackets: the share of attention that is on patches, if below "
        f"{100 * (1 - NOTABLE):.0f} %. The rest is on {prefix_names(row)}."
    ]


def colour_sentence(
    tokens: Sequence[int],
    norms: Sequence[Normalize],
    maps: Sequence[Values] | Values,
    style: Style,
) -> str:
    """Return where the colours of ``maps`` begin and end, on one scale.

    Args:
        tokens: The numbers of tokens of the images.
        norms: The scale of each map.
        maps: The maps, each ``(h, w)``.
        style: How they are drawn.

    """
    low, high = norms[0].vmin or 0.0, norms[0].vmax or 0.0
    begin = times(low) if low else "0"
    word = "Logarithmic colours" if isinstance(norms[0], LogNorm) else "Colours"
    return (
        f"{word} run from {begin} to {times(high)} uniform attention. {unit(tokens)}"
        f"{_above(norms, maps, style)}"
    )


def own_colours(
    tokens: Sequence[int],
    norms: Sequence[Normalize],
    maps: Sequence[Values] | Values,
    style: Style,
    each: str,
    end: str,
) -> str:
    """Return where the colours of ``each`` end, which do not share a scale."""
    log = isinstance(norms[0], LogNorm)
    colours = "logarithmic colours, up" if log else "colours, from 0"
    return f"Each {each} has its own {colours} to {end}. {unit(tokens)}{_above(norms, maps, style)}"


def unit(tokens: Sequence[int]) -> str:
    """Return what one is in the unit of pictures, for images of so many tokens."""
    least, most = min(tokens), max(tokens)
    if least == most:
        each = share(1 / least)
        return f"1× is what each of the {least} tokens gets if all get the same, {each}."
    each = f"{share(1 / most)} to {share(1 / least)}"
    return f"1× is what each of {least} to {most} tokens gets if all get the same, {each}."


def _above(norms: Sequence[Normalize], maps: Sequence[Values] | Values, style: Style) -> str:
    """Return how many patches of ``maps`` lie above the limits of their colours, and why."""
    numbers = [
        values[(values > norm.vmax) & np.isfinite(values)]
        for norm, values in zip(norms, maps, strict=True)
    ]
    above = np.concatenate(numbers)
    if not above.size:
        return ""
    total = sum(values.size for values in maps)
    lie = "patch lies" if above.size == 1 else "patches lie"
    highest = f"at {times(above.max())}"
    if above.size > 1:
        highest = f"the highest {highest}"
    rule = f" {_ROBUST}" if style.limits == "robust" else ""
    return f" {above.size} of {total} {lie} above the last colour, {highest}.{rule}"


def artifact_sentence(
    row: AttentionRow,
    layer: Layer | None,
    style: Style,
    outlying: Outlying | None,
    head: Head = "mean",
) -> list[str]:
    """Return how many artifact tokens there are, how they are drawn and what they get."""
    if outlying is None:
        return []
    count = int(outlying.mask.sum())
    if not count:
        return ["No artifact tokens found."]
    drawn = {"mask": "grey in red frames", "none": "not marked"}.get(style.outliers, "red frames")
    one = count == 1
    return [
        f"{count} artifact token{'' if one else 's'} ({drawn}): "
        f"{'a patch' if one else 'patches'} whose norm is an outlier, above "
        f"{outlying.threshold:.4g} after layer {outlying.layer}."
        f"{_held(row, layer, head, outlying.mask)} {_LITTLE}{_spared(style, outlying.mask)}"
    ]


def _held(row: AttentionRow, layer: Layer | None, head: Head, mask: Mask) -> str:
    if layer is None:
        return ""
    held = np.nansum(row.map(layer, head)[mask])
    mean = ", mean of heads" if head == "mean" else ""
    return (
        f" {'It gets' if mask.sum() == 1 else 'They get'} {percent(held)} of the attention{mean}."
    )


def _spared(style: Style, mask: Mask) -> str:
    return " The limits of the colours ignore them." if style.spares and not mask.all() else ""


def figure_caption(
    rows: Sequence[AttentionRow],
    artifacts: Sequence[Outlying | None],
    layer: Layer,
    columns: Sequence[str],
    norms: Sequence[Normalize],
    maps: Sequence[Values],
    style: Style,
    name: str | None,
    names: Sequence[str],
) -> str:
    """Return the caption of a figure for papers, in one paragraph.

    Args:
        rows: The attention of each image.
        artifacts: The artifact tokens of each image.
        layer: The number of the block.
        columns: What each column shows.
        norms: The scale of each map.
        maps: All maps.
        style: How they are drawn.
        name: The name of the model.
        names: The names of the images.

    """
    tokens = [row.tokens for row in rows]
    said = [subject(rows[0], f"in layer {shown_name(layer)} (counted from 0)", name)]
    if names:
        said.append(f"Rows: {', '.join(map(shown_name, names))}.")
    said.append(f"Columns: {', '.join(columns)}.".replace("mean", "mean of heads"))
    if style.limits == "each":
        said.append(own_colours(tokens, norms, maps, style, "map", "its highest patch"))
    else:
        said.append(colour_sentence(tokens, norms, maps, style))
    held = [row.prefix_mass(layer, "mean") for row in rows]
    if max(held) > NOTABLE:
        shares = ", ".join(map(percent, held))
        said.append(f"On {prefix_names(rows[0])}, which maps leave out: {shares} of the attention.")
    return " ".join([*said, *_artifacts_of_all(artifacts, style)])


def _artifacts_of_all(artifacts: Sequence[Outlying | None], style: Style) -> list[str]:
    """Return how many artifact tokens the images have, if any."""
    found = [each.mask for each in artifacts if each is not None]
    count = int(sum(mask.sum() for mask in found))
    if not count:
        return []
    drawn = {"mask": "Grey in red frames", "none": "Not marked"}.get(style.outliers, "Red frames")
    tokens = "artifact token, a patch" if count == 1 else "artifact tokens, patches"
    spared = " The limits of the colours ignore them." if style.spares else ""
    return [f"{drawn}: {count} {tokens} whose norm is an outlier. {_LITTLE}{spared}"]
