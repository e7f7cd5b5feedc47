"""What others offer for the same question, built to the same size with random weights.

A peer that is not installed is left out, and the table says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ImageCall = Callable[[Tensor], object]


@dataclass(frozen=True)
class Size:
    """A model's size by DINOv2's names, four registers, patches of 14 pixels."""

    arch: str
    dim: int
    heads: int
    depth: int = 12
    registers: int = 4
    patch: int = 14


SMALL, BASE = Size("vit_small", 384, 6), Size("vit_base", 768, 12)


def peers(size: Size, images: Tensor) -> dict[str, ImageCall]:
    """Return a call for each peer that is installed, for images of the size of ``images``."""
    found: dict[str, ImageCall] = {}
    for build in (_transformers, _timm):
        try:
            found |= build(size, images)
        except ImportError:
            continue
    return found


def _transformers(size: Size, images: Tensor) -> dict[str, ImageCall]:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=size.dim,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        image_size=images.shape[-1],
        patch_size=size.patch,
        num_register_tokens=size.registers,
        attn_implementation="eager",
    )
    model = Dinov2WithRegistersModel(config).to(images).eval()
    ask = {"output_attentions": True}
    return {"transformers eager, every block, full": lambda images: model(images, **ask).attentions}


def _timm(size: Size, images: Tensor) -> dict[str, ImageCall]:
    import timm
    from timm.layers import set_fused_attn
    from timm.utils import AttentionExtract

    name = f"{size.arch}_patch14_reg4_dinov2"
    set_fused_attn(False)  # read when a model is built: without it there is nothing to extract
    try:
        models = [timm.create_model(name, img_size=images.shape[-1]).to(images) for _ in "ab"]
    finally:
        set_fused_attn(True)
    last = [f"blocks.{size.depth - 1}.attn.attn_drop"]
    every = AttentionExtract(models[0], method="hook")
    only_last = AttentionExtract(models[1], names=last, method="hook")
    return {
        "timm AttentionExtract, every block, full": every,
        "timm AttentionExtract, last block, full": only_last,
    }


def two_steps(query: Tensor, key: Tensor) -> Tensor:
    """Return one full matrix as it is written by hand."""
    return (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)


def textbook_rollout(attentions: Sequence[Tensor]) -> Tensor:
    """Return vit-explain's rollout: the product of (mean of heads + 1) / 2 over all layers."""
    result = torch.eye(attentions[0].shape[-1]).to(attentions[0])
    for attention in attentions:
        fused = attention.mean(1) + torch.eye(attention.shape[-1]).to(attention)
        result = (fused / fused.sum(-1, keepdim=True)) @ result
    return result[:, 0]


def upstream(size: Size, image: int) -> Any:
    """Return upstream's own model of this size, with registers where the revision knows them."""
    from dinov2.models import vision_transformer

    options: dict[str, Any] = {"img_size": 518, "patch_size": size.patch, "init_values": 1.0}
    build: Callable[..., nn.Module] = getattr(vision_transformer, size.arch)
    try:
        return build(**options, block_chunks=0, num_register_tokens=size.registers).eval()
    except TypeError:
        return build(**options, block_chunks=0).eval()
