"""Building upstream's models as its hub does."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import TYPE_CHECKING

from dinov2_attn.errors import InvalidInput, Unavailable

# Importing torch takes seconds, and the names below are all that ``--help`` needs.
if TYPE_CHECKING:
    from torch import nn

ARCHS = ("vit_small", "vit_base", "vit_large", "vit_giant2")

# The published models with registers were trained with this positional embedding too.
REGISTERS = {
    "num_register_tokens": 4,
    "interpolate_antialias": True,
    "interpolate_offset": 0.0,
}


def build(
    arch: str, *, patch_size: int = 14, registers: bool = False, img_size: int = 518
) -> nn.Module:
    """Build one of ``ARCHS`` from the importable ``dinov2``, in eval mode.

    Its weights are random, drawn from torch's global generator. ``img_size`` is the size
    of the square that the positional embedding is made for. Raises ``InvalidInput`` for an
    unknown architecture or an impossible patch size, and ``Unavailable`` if this revision
    of upstream has no registers.
    """
    if arch not in ARCHS:
        raise InvalidInput(f"an architecture of {', '.join(ARCHS)}", repr(arch), "Name one.")
    if not 0 < patch_size <= img_size:
        raise InvalidInput(
            f"a patch size from 1 to {img_size}, the size that the embedding is made for",
            str(patch_size),
            "The published models have 14.",
        )
    from dinov2.models import vision_transformer

    if registers:
        _require_registers(vision_transformer)
    model: nn.Module = getattr(vision_transformer, arch)(
        patch_size=patch_size,
        img_size=img_size,
        init_values=1.0,
        ffn_layer="swiglufused" if arch == "vit_giant2" else "mlp",
        block_chunks=0,
        **(REGISTERS if registers else {}),
    )
    return model.eval()


def _require_registers(vision_transformer: ModuleType) -> None:
    parameters = inspect.signature(vision_transformer.DinoVisionTransformer).parameters
    if "num_register_tokens" not in parameters:
        raise Unavailable(
            "a revision of upstream with registers, of 2023-10-27 or later",
            f"one without, at {vision_transformer.__file__}",
            "Name a newer checkout with --repo PATH, or leave out --registers.",
        )
