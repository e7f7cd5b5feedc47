"""Building upstream's models: those of its hub by name, and any that a checkpoint describes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dinov2_attn.apps.weights.stated import Interpolation
from dinov2_attn.errors import InvalidInputError, UnavailableError

# Importing torch takes seconds, and the names below are all that ``--help`` needs.
if TYPE_CHECKING:
    from torch import nn

# The name in papers, the number of features and the number of blocks.
PUBLISHED = {
    "vit_small": ("ViT-S", 384, 12),
    "vit_base": ("ViT-B", 768, 12),
    "vit_large": ("ViT-L", 1024, 24),
    "vit_giant2": ("ViT-g", 1536, 40),
}
ARCHS = tuple(PUBLISHED)

# Models with registers are published with this interpolation of the positional embedding.
INTERPOLATION_WITH_REGISTERS = {"interpolate_antialias": True, "interpolate_offset": 0.0}


@dataclass(frozen=True)
class Architecture:
    """What a vision transformer of upstream's is built from; as text, what captions call it.

    ``img_size`` is the side in pixels of the square that the positional embedding is for.
    ``hidden`` is the number of features inside of the FFN, whose kind is upstream's word.
    ``interpolation`` is of the positional embedding, that of the published models if ``None``.
    ``heads_assumed`` is whether nothing but custom says ``num_heads``.
    """

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    img_size: int
    in_chans: int
    registers: int
    ffn: str
    hidden: int
    layer_scale: bool
    qkv_bias: bool
    proj_bias: bool
    ffn_bias: bool
    eps: float = 1e-6
    interpolation: Interpolation | None = None
    heads_assumed: bool = False

    def __str__(self) -> str:
        return caption(self.family, self.patch_size, self.registers)

    @property
    def family(self) -> str:
        """``ViT-S`` and the like, or the dimensions of what is not published."""
        for name, *dimensions in PUBLISHED.values():
            if dimensions == [self.embed_dim, self.depth]:
                return name
        return f"ViT-{self.embed_dim}x{self.depth}"


def caption(family: str, patch_size: int, registers: int) -> str:
    """Return what captions call a model: ``ViT-S/14, 4 registers``."""
    plural = "" if registers == 1 else "s"
    return f"{family}/{patch_size}" + (f", {registers} register{plural}" if registers else "")


def build(
    arch: str, *, patch_size: int = 14, registers: bool = False, img_size: int = 518
) -> nn.Module:
    """Build one of ``ARCHS`` from the importable ``dinov2``, in eval mode.

    Its weights are random, drawn from torch's global generator. ``img_size`` is the size
    of the square that the positional embedding is made for. Raises ``InvalidInputError`` for an
    unknown architecture or an impossible patch size, and ``UnavailableError`` if this revision
    of upstream has no registers.
    """
    if arch not in ARCHS:
        raise InvalidInputError(f"an architecture of {', '.join(ARCHS)}", repr(arch), "Name one.")
    if not 0 < patch_size <= img_size:
        raise InvalidInputError(
            f"a patch size from 1 to {img_size}, the size that the embedding is made for",
            str(patch_size),
            "The published models have 14.",
        )
    from dinov2.models import vision_transformer

    model: nn.Module = getattr(vision_transformer, arch)(
        patch_size=patch_size,
        img_size=img_size,
        init_values=1.0,
        ffn_layer="swiglufused" if arch == "vit_giant2" else "mlp",
        block_chunks=0,
        **_registers(vision_transformer, 4 if registers else 0),
    )
    return model.eval()


def build_like(architecture: Architecture) -> nn.Module:
    """Build what ``architecture`` says from the importable ``dinov2``, flat, in eval mode.

    As ``build``, from which it does not differ where ``build`` has a name for it.
    """
    from dinov2.models import vision_transformer
    from torch.nn import LayerNorm

    model: nn.Module = vision_transformer.DinoVisionTransformer(
        img_size=architecture.img_size,
        patch_size=architecture.patch_size,
        in_chans=architecture.in_chans,
        embed_dim=architecture.embed_dim,
        depth=architecture.depth,
        num_heads=architecture.num_heads,
        mlp_ratio=_mlp_ratio(architecture),
        qkv_bias=architecture.qkv_bias,
        ffn_bias=architecture.ffn_bias,
        proj_bias=architecture.proj_bias,
        init_values=1.0 if architecture.layer_scale else None,
        ffn_layer=architecture.ffn,
        block_chunks=0,
        block_fn=partial(vision_transformer.Block, attn_class=vision_transformer.MemEffAttention),
        **_registers(vision_transformer, architecture.registers, architecture.interpolation),
    )
    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.eps = architecture.eps
    return model.eval()


def _mlp_ratio(architecture: Architecture) -> float:
    """Return a ratio that upstream, which rounds down, makes ``hidden`` of."""
    hidden: float = architecture.hidden
    if architecture.ffn == "swiglufused":
        hidden = hidden * 3 / 2  # of which it takes two thirds
    return (hidden + 0.5) / architecture.embed_dim


def _registers(
    vision_transformer: ModuleType, number: int, interpolation: Interpolation | None = None
) -> dict[str, Any]:
    parameters = inspect.signature(vision_transformer.DinoVisionTransformer).parameters
    chosen: dict[str, Any] = {}
    if interpolation is not None and "interpolate_offset" in parameters:
        chosen = dict(zip(INTERPOLATION_WITH_REGISTERS, interpolation, strict=True))
    if not number:
        return chosen
    if "num_register_tokens" not in parameters:
        raise UnavailableError(
            "a revision of upstream with registers, of 2023-10-27 or later",
            f"one without, at {vision_transformer.__file__}",
            "Name a newer checkout with --repo PATH, or take a model without registers.",
        )
    return {"num_register_tokens": number, **INTERPOLATION_WITH_REGISTERS, **chosen}
