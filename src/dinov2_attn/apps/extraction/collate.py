"""``collate``: a batch of images whose maps have several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinov2_attn.maps.facets import FACETS
from dinov2_attn.maps.measuring import STATISTICS


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch of images, for ``DataLoader(dataset, collate_fn=dataset.collate)``.

    Smaller maps are padded with zeros: at the right, at the bottom and after their last query.
    So sums stay the same, and ``mask`` excludes the padding from other results.

    >>> batch["maps"][b][..., batch["mask"][b]]   # the numbers of one image, flat
    >>> q, h, w = batch["shape"][b].tolist()
    >>> batch["maps"][b, ..., :q, :h, :w]         # its maps as they were

    Args:
        rows: Images as ``dataset[i]`` returns them.

    Returns:
        ``maps`` ``(B, layers, heads, queries, h, w)`` and ``prefix`` ``(B, layers, heads,
        queries, tokens)``, both without heads for their mean; each facet that is stored,
        ``(B, layers, C, h, w)``; each statistic that is stored, ``(B, layers, heads, N)``, with
        zeros behind the tokens of smaller images; ``mask``, bool ``(B, queries, h,
        w)``, true where a map has a number; ``shape``, int64 ``(B, 3)``: queries, rows and
        columns of each; ``number``, int64 ``(B,)``; ``path``, a list.

    """
    shapes = torch.tensor([row["maps"].shape[-3:] for row in rows])
    queries, height, width = shapes.amax(0).tolist()
    facets = {name: [row[name] for row in rows] for name in FACETS if name in rows[0]}
    return {
        "maps": torch.stack([_padded(row["maps"], (queries, height, width)) for row in rows]),
        "prefix": torch.stack(
            [_padded(row["prefix"], (queries, row["prefix"].shape[-1])) for row in rows]
        ),
        **{
            name: torch.stack([_padded(one, (height, width)) for one in each])
            for name, each in facets.items()
        },
        **{
            name: torch.stack([_padded(row[name], _largest(rows, name)) for row in rows])
            for name in STATISTICS
            if name in rows[0]
        },
        "mask": torch.stack([_mask(shape, (queries, height, width)) for shape in shapes.tolist()]),
        "shape": shapes,
        "number": torch.tensor([row["number"] for row in rows]),
        "path": [row["path"] for row in rows],
    }


def _largest(rows: Sequence[dict[str, Any]], name: str) -> tuple[int, ...]:
    """Return the largest lengths of a tensor in all of ``rows``."""
    return tuple(torch.tensor([row[name].shape for row in rows]).amax(0).tolist())


def _padded(tensor: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Return ``tensor`` with zeros behind its last dimensions, which become ``sides``."""
    padded = tensor.new_zeros(*tensor.shape[: -len(sides)], *sides)
    inside = padded
    for dim, length in enumerate(tensor.shape):
        inside = inside.narrow(dim, 0, length)
    inside.copy_(tensor)
    return padded


def _mask(shape: Sequence[int], sides: tuple[int, ...]) -> Tensor:
    return _padded(torch.ones(*shape, dtype=torch.bool), sides)
