"""Models with known tokens or attention, to test positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinov2_attn.proof.conformance.building import Place, registers_of

HEAD = 1


@torch.no_grad()
def mark_prefix(model: Any) -> Any:
    """Set all positions to 0, CLS to 100, and the registers to 101, 102 and so on."""
    if hasattr(model, "pos_embed"):
        model.pos_embed.zero_()
    model.cls_token.fill_(100)
    registers = registers_of(model)
    if registers is not None:
        numbers = torch.arange(registers.shape[1], device=registers.device)
        registers.copy_(101 + numbers[None, :, None])
    return model


@torch.no_grad()
def slope(model: Any, side: int) -> Any:
    """Set the positional embedding of each patch to the number of its row in the grid."""
    model.pos_embed.zero_()
    rows = torch.arange(side, device=model.pos_embed.device).repeat_interleave(side)
    model.pos_embed[0, -side * side :] = rows[:, None]
    return model


@torch.no_grad()
def look_at_what_is_bright(model: Any) -> Any:
    """Make every token attend to bright patches in ``HEAD`` of the last block.

    The patch embedding turns the brightness b of a patch into the token (b, -b, 1, -1, 0, …). The
    first feature of its norm grows with b. All blocks but the last are the identity. In the last
    one all queries are equal, and the keys of ``HEAD`` are that first feature. A rotation between
    projection and kernel is one by almost 0.
    """
    if hasattr(model, "rope_embed"):
        model.rope_embed.periods.fill_(1e9)
    for parameter in model.parameters():
        parameter.zero_()
    project = model.patch_embed.proj
    brightness = 1 / project.weight[0].numel()
    project.weight[0], project.weight[1] = brightness, -brightness
    project.bias[2], project.bias[3] = 1, -1
    last = _blocks(model)[-1]
    last.norm1.weight.fill_(1)
    width, heads = model.embed_dim, model.num_heads
    last.attn.qkv.bias[:width].view(heads, -1)[HEAD, 0] = 1
    last.attn.qkv.weight[width : 2 * width].view(heads, -1, width)[HEAD, 0, 0] = 1
    return model


def photograph(grid: tuple[int, int], bright: tuple[int, int], patch: int) -> Tensor:
    """Return a dark image of a grid (h, w) of patches, with a bright one at (row, column)."""
    cells = torch.full(grid, 0.1, dtype=torch.float64, device=Place.device)
    cells[bright] = 1
    pixels = cells.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    return pixels.expand(1, 3, -1, -1).contiguous()


def _blocks(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "norm1")]
