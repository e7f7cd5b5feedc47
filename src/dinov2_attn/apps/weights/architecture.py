"""What a vision transformer is built like, read off its weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from dinov2_attn.apps.weights.folders import some
from dinov2_attn.apps.weights.foreign import have_memory
from dinov2_attn.apps.weights.heads import heads_of
from dinov2_attn.apps.weights.layouts import ANCHORS, find_backbone
from dinov2_attn.apps.weights.models import Architecture
from dinov2_attn.apps.weights.reading import Checkpoint
from dinov2_attn.errors import UnreadableFileError

log = logging.getLogger(__name__)

Weights = Mapping[str, Tensor]


def infer(
    checkpoint: Checkpoint, heads: int | None = None, *, key: str | None = None
) -> Architecture:
    """Read the architecture of a checkpoint off its weights, and off what is said beside them.

    ``key`` chooses one of several models in it. The number of heads is ``heads``, else what
    the file says (metadata of safetensors) or one beside it (``config.json``,
    ``config.yaml``), else that of the published model of this shape. Of another shape it is
    one for every 64 features, and ``heads_assumed``. Raises ``UnreadableFileError`` if there is no
    vision transformer of upstream's kind and ``InvalidInputError`` if the number of heads is not
    known, cannot be or contradicts the file.
    """
    weights = find_backbone(checkpoint, ANCHORS, key).weights
    try:
        architecture = _read(weights)
    except _NotUpstreams as error:
        raise UnreadableFileError(
            "a checkpoint of a DINOv2 backbone, named as upstream's classes are",
            f"{checkpoint.path}, {error}",
            "Name the file of the backbone, converted to upstream's names if it is another "
            "library's.",
        ) from error
    return heads_of(checkpoint, _as_stated(checkpoint, architecture), heads)


def _as_stated(checkpoint: Checkpoint, architecture: Architecture) -> Architecture:
    """Take over what weights do not tell and a file beside them does."""
    stated = checkpoint.stated
    if stated is None:
        if "reg_token" in {name.rpartition(".")[2] for name in checkpoint.tensors}:
            return replace(architecture, interpolation=(True, 0.0))  # timm's
        return architecture
    if not stated.is_of(architecture.embed_dim, architecture.depth):
        log.info("%s is of another model than %s", stated.source, checkpoint.path)
        return architecture
    if stated.activation not in (None, "gelu") and architecture.ffn == "mlp":
        raise UnreadableFileError(
            "a model with GELU, as upstream's classes have it",
            f"{stated.source} with {stated.activation!r}",
            "Load it with the code that it is of.",
        )
    return replace(
        architecture,
        eps=stated.eps or architecture.eps,
        interpolation=stated.interpolation,
    )


def describe(weights: Weights) -> str:
    """Name the architecture of a backbone's weights; ``""`` if it cannot be read."""
    try:
        return str(_read(weights))
    except _NotUpstreams:
        return ""


class _NotUpstreams(Exception):
    """Weights are missing or of other shapes than upstream's classes give them."""


def _read(weights: Weights) -> Architecture:
    _expect(have_memory(weights.values()), "with tensors that share their memory")
    embed_dim, in_chans, patch_size, patch_width = _shape(weights, "patch_embed.proj.weight", 4)
    _expect(patch_size == patch_width, f"with patches of {patch_size} × {patch_width}")
    tokens = _shape(weights, "pos_embed", 3)[1]
    grid = math.isqrt(tokens - 1)
    _expect(grid * grid == tokens - 1 > 0, f"with {tokens} positions, not 1 and a square")
    block, depth = _block(weights)
    _expect(
        _shape(block, "attn.qkv.weight", 2) == (3 * embed_dim, embed_dim)
        and _shape(block, "attn.proj.weight", 2) == (embed_dim, embed_dim),
        f"whose attention is not one of {embed_dim} features",
    )
    registers = "register_tokens" in weights and _shape(weights, "register_tokens", 3)[1]
    ffn, hidden = _ffn(block)
    return Architecture(
        embed_dim=embed_dim,
        depth=depth,
        num_heads=1,
        patch_size=patch_size,
        img_size=grid * patch_size,
        in_chans=in_chans,
        registers=int(registers),
        ffn=ffn,
        hidden=hidden,
        layer_scale="ls1.gamma" in block,
        qkv_bias="attn.qkv.bias" in block,
        proj_bias="attn.proj.bias" in block,
        ffn_bias="mlp.fc1.bias" in block or "mlp.w12.bias" in block,
    )


def _block(weights: Weights) -> tuple[Weights, int]:
    """Return the weights of one block, and how many alike there are."""
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        first, _, rest = name.partition(".")
        number, _, key = rest.partition(".")
        if first == "blocks" and key:
            blocks.setdefault(number, {})[key] = tensor
    _expect("0" in blocks, "without blocks")
    gaps = [f"blocks.{i}" for i in range(len(blocks)) if str(i) not in blocks]
    _expect(not gaps, f"without {some(gaps)}")
    # Alike, or a small file could ask for a model of any size.
    shapes = {name: _shapes(block) for name, block in blocks.items()}
    odd = [f"blocks.{name}" for name in shapes if shapes[name] != shapes["0"]]
    _expect(not odd, f"with {some(odd)} unlike blocks.0")
    return blocks["0"], len(blocks)


def _shapes(block: Weights) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in block.items()}


def _ffn(block: Weights) -> tuple[str, int]:
    """Return upstream's word for the kind of FFN, and how many features it has inside."""
    if "mlp.fc1.weight" in block:
        return "mlp", _shape(block, "mlp.fc1.weight", 2)[0]
    if "mlp.w12.weight" in block:
        return "swiglufused", _shape(block, "mlp.w12.weight", 2)[0] // 2
    return "identity", 0


def _shape(weights: Weights, key: str, dimensions: int) -> tuple[int, ...]:
    _expect(key in weights, f"without {key}; it holds {some(list(weights)) or 'none of it'}")
    tensor = weights[key]
    shape = tuple(tensor.shape)
    _expect(len(shape) == dimensions and 0 not in shape, f"with {key} of shape {shape}")
    return shape


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _NotUpstreams(otherwise)
