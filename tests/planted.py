"""A real model whose attention is known beforehand: one head sees what is bright."""

from __future__ import annotations

import numpy as np
import torch

HEAD = 1


@torch.no_grad()
def plant(model):
    """Make CLS, in ``HEAD`` of the last block, look at bright patches; nowhere else.

    The patch embedding turns the brightness b of a patch into the token (b, -b, 1, -1, 0,
    …), whose norm has a first feature that grows with b; all blocks but the last hand on
    what they get. There every query is the same, and the keys of ``HEAD`` are that feature.
    """
    for parameter in model.parameters():
        parameter.zero_()
    project = model.patch_embed.proj
    brightness = 1 / project.weight[0].numel()
    project.weight[0], project.weight[1] = brightness, -brightness
    project.bias[2], project.bias[3] = 1, -1
    last = model.blocks[-1]
    last.norm1.weight.fill_(1)
    width, heads = model.embed_dim, model.num_heads
    last.attn.qkv.bias[:width].view(heads, -1)[HEAD, 0] = 1
    last.attn.qkv.weight[width : 2 * width].view(heads, -1, width)[HEAD, 0, 0] = 1
    return model


def photograph_of(grid, bright, patch_size=14):
    """Return dark pixels for a grid (h, w) of patches with a white one at (row, column)."""
    cells = np.full((*grid, 3), 20, dtype=np.uint8)
    cells[bright] = 255
    return cells.repeat(patch_size, axis=0).repeat(patch_size, axis=1)
