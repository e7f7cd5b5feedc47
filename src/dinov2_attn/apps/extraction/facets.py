"""Queries, keys and values of a batch, in the form in which they are stored."""

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


def maps_with_facets(
    model: Any, images: Tensor, options: Options, **choice: Any
) -> AttentionMaps[Tensor]:
    """Return the attention and the facets of ``images`` from one whole pass.

    Raises:
        InvalidInputError: If the pass has attention of several kinds.

    """
    with record(model, options.layers, facets=options.facets, **choice) as recording:
        run_model(model, images)
    maps: list[AttentionMaps[Tensor]] = recording.passes
    if len(maps) == 1:
        return maps[0]
    raise InvalidInputError(
        "layers whose tokens are the same, each run once in a pass",
        f"{len(maps)} kinds of attention",
        "Name layers of one kind, or leave facets out.",
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
