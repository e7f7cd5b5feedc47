"""Build upstream's models: by the names of its hub, or from an architecture."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dinov2_attn.apps.weights.config_files import Interpolation
from dinov2_attn.errors import InvalidInputError, UnavailableError

# --help needs the names below without the seconds that importing torch takes.
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
DEPTHS = {arch: depth for arch, (_, _, depth) in PUBLISHED.items()}

# By the names of upstream's hub: the architecture, and whether the model has registers.
HUB = {
    f"dinov2_{arch.replace('_', '')[:4]}14{suffix}": (arch, bool(suffix))
    for arch in ARCHS
    for suffix in ("", "_reg")
}

# The same with a linear classifier of ImageNet's 1000 classes: by name, the name of the backbone.
CLASSIFIERS = {f"{name}_lc": name for name in HUB}

# Models with registers are published with this interpolation of the positional embedding.
INTERPOLATION_WITH_REGISTERS = {"interpolate_antialias": True, "interpolate_offset": 0.0}


@dataclass(frozen=True)
class Architecture:
    """The arguments of a vision transformer of upstream's; ``str()`` gives its name in captions.

    Attributes:
        embed_dim: The features of a token.
        depth: The number of blocks.
        num_heads: The heads of each block.
        patch_size: The side of a patch in pixels.
        img_size: The side in pixels of the square image of the positional embedding.
        in_chans: The channels of an image.
        registers: The number of register tokens.
        ffn: Upstream's name for the kind of FFN.
        hidden: The hidden features of the FFN.
        layer_scale: Whether blocks have LayerScale.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_bias: Whether the output projection has a bias.
        ffn_bias: Whether the layers of the FFN have a bias.
        eps: The epsilon of the norms.
        interpolation: How the positional embedding is resized; ``None`` for the default of the
            published models.
        heads_assumed: Whether ``num_heads`` is only an assumption.

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
        """The published family, such as ``ViT-S``; otherwise features and blocks."""
        for name, *dimensions in PUBLISHED.values():
            if dimensions == [self.embed_dim, self.depth]:
                return name
        return f"ViT-{self.embed_dim}x{self.depth}"


def caption(family: str, patch_size: int, registers: int) -> str:
    """Return the name of a model in captions: ``ViT-S/14, 4 registers``."""
    plural = "" if registers == 1 else "s"
    return f"{family}/{patch_size}" + (f", {registers} register{plural}" if registers else "")


def build(
    arch: str, *, patch_size: int = 14, registers: bool = False, img_size: int = 518
) -> nn.Module:
    """Build a model from the importable ``dinov2``, in eval mode and with random weights.

    The weights are drawn from torch's global generator.

    Args:
        arch: One of ``ARCHS``.
        patch_size: The side of a patch in pixels.
        registers: Whether the model has four register tokens.
        img_size: The side in pixels of the square image of the positional embedding.

    Raises:
        InvalidInputError: If the architecture is unknown, or the patch size impossible.
        UnavailableError: If this revision of upstream has no registers.

    """
    if arch not in ARCHS:
        raise InvalidInputError(
            f"one of the architectures {', '.join(ARCHS)}", repr(arch), "Choose one of them."
        )
    if not 0 < patch_size <= img_size:
        raise InvalidInputError(
            f"a patch size from 1 to {img_size}, the image size of the positional embedding",
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
    """Build a model of this architecture from the importable ``dinov2``, without chunks.

    The model is in eval mode with random weights. It equals that of ``build`` for an architecture
    that ``build`` knows.
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
    """Return a ratio from which upstream, rounding down, computes ``hidden``."""
    hidden: float = architecture.hidden
    if architecture.ffn == "swiglufused":
        hidden = hidden * 3 / 2  # upstream takes two thirds of it
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
            "Name a newer checkout with --repo PATH, or choose a model without registers.",
        )
    return {"num_register_tokens": number, **INTERPOLATION_WITH_REGISTERS, **chosen}
