"""What is stored of a batch beside its maps: queries, keys and values, and statistics."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dinov2_attn.apps.extraction.options import DTYPES, Options
from dinov2_attn.errors import InvalidInputError
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.maps.one_batch import run_model
from dinov2_attn.maps.record import record
from dinov2_attn.maps.resample import resample
from dinov2_attn.typing import Grid, Statistic


def maps_with_others(
    model: Any, images: Tensor, options: Options, **choice: Any
) -> AttentionMaps[Tensor]:
    """Return attention, facets and statistics of ``images`` from one whole pass.

    Raises:
        InvalidInputError: If the pass has attention of several kinds.

    """
    beside: dict[str, Any] = {"facets": options.facets, "statistics": options.statistics}
    with record(model, options.layers, **beside, **choice) as recording:
        run_model(model, images)
    maps: list[AttentionMaps[Tensor]] = recording.passes
    if len(maps) == 1:
        return maps[0]
    raise InvalidInputError(
        "layers whose tokens are the same, each run once in a pass",
        f"{len(maps)} kinds of attention",
        "Name layers of one kind, or leave facets and statistics out.",
    )


def stored_facets(maps: AttentionMaps[Tensor], options: Options) -> dict[str, Tensor]:
    """Return each facet as it is stored, ``(B, layers, C, h, w)``.

    On another grid a cell has the mean of what lies in it, weighted by area.
    """
    found: dict[str, Tensor] = {}
    for name in options.facets:
        facet = torch.stack(maps.facet_maps(name), dim=1)
        if options.grid is not None:
            cells = math.prod(options.grid) / math.prod(facet.shape[-2:])
            facet = resample(facet, options.grid) * cells
        found[name] = facet.to(DTYPES[options.dtype]).contiguous()
    return found


def stored_statistics(maps: AttentionMaps[Tensor], options: Options) -> dict[str, Tensor]:
    """Return each statistic as it is stored, ``(B, layers, heads, N)``, float32.

    On another grid a patch has the mean of what lies in it, weighted by area, and of what is
    received the sum. Tokens that are no patches stay as they are.
    """
    found: dict[str, Tensor] = {}
    for name in options.statistics:
        values = torch.stack(maps.statistics[name], dim=1)
        if options.grid is not None:
            moved = values.movedim(-1, 0) if name == "centroid" else values[None]
            moved = torch.stack([_on_grid(one, name, maps, options.grid) for one in moved])
            values = moved.movedim(0, -1) if name == "centroid" else moved[0]
        found[name] = values.float().contiguous()
    return found


def _on_grid(values: Tensor, name: Statistic, maps: AttentionMaps[Tensor], grid: Grid) -> Tensor:
    """Return ``values (…, N)`` with the patches on another ``grid``."""
    height, width = maps.grid or grid
    start, stop = maps.prefix, maps.prefix + height * width
    patches = values[..., start:stop]
    patches = resample(patches.reshape(*patches.shape[:-1], height, width), grid)
    if name != "received":
        patches = patches * (math.prod(grid) / (height * width))
    return torch.cat([values[..., :start], patches.flatten(-2), values[..., stop:]], -1)
