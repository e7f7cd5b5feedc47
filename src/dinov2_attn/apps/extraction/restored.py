"""The maps of one stored image as ``AttentionMaps``, with the layout of rows and columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinov2_attn.apps.viz.tokens import resolve
from dinov2_attn.maps.attention_maps import AttentionMaps
from dinov2_attn.math.selection import positions, resolve_names
from dinov2_attn.typing import Grid


def restored(
    row: dict[str, Any], entry: dict[str, Any], about: dict[str, Any]
) -> AttentionMaps[Tensor]:
    """Return the maps of one image, as a batch of one.

    Args:
        row: Its tensors, as ``dataset[i]`` returns them.
        entry: Its line of the index.
        about: ``extraction.json``.

    """
    maps, others, before = row["maps"], row["prefix"], about["model"]["prefix"]
    columns = [others[..., :before], maps.flatten(-2), others[..., before:]]
    weights = torch.cat(columns, -1)
    seen: Grid = (entry["grid"][0], entry["grid"][1])
    grid: Grid = (maps.shape[-2], maps.shape[-1])
    suffix = others.shape[-1] - before
    return AttentionMaps(
        weights=tuple(layer[None] for layer in weights),
        layers=tuple(about["tensors"]["layers"]),
        grid=grid,
        prefix=before,
        queries=tuple(
            _moved(query, before, seen, grid)
            for query in _positions(about["tensors"]["queries"], before, seen, suffix)
        ),
        suffix=suffix,
        _measured={
            name: tuple(layer[None] for layer in row[name]) for name in entry.get("statistics", ())
        },
        _seen=None if seen == grid else seen,
    )


def _positions(texts: list[str], prefix: int, grid: Grid, suffix: int) -> tuple[int, ...]:
    """Return the positions of the queries among the tokens that the model saw."""
    chosen = resolve_names(resolve(texts, prefix, grid), max(0, prefix - 1))
    return positions(chosen, prefix + grid[0] * grid[1] + suffix)


def _moved(position: int, prefix: int, seen: Grid, grid: Grid) -> int:
    """Return the position in a resampled ``grid`` of a token at ``position`` in that one ``seen``.

    A patch moves to the cell that contains its centre.
    """
    patch, patches = position - prefix, seen[0] * seen[1]
    if patch < 0 or seen == grid:
        return position
    if patch >= patches:
        return position - patches + grid[0] * grid[1]
    row, column = (
        (2 * place + 1) * new // (2 * old)
        for place, new, old in zip(divmod(patch, seen[1]), grid, seen, strict=True)
    )
    return prefix + row * grid[1] + column
