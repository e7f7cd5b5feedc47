"""The architecture of a checkpoint: read from its weights, and the number of heads."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dinov2_attn.apps.weights.files import some
from dinov2_attn.apps.weights.foreign import have_memory
from dinov2_attn.apps.weights.layouts import ANCHORS, find_backbone
from dinov2_attn.apps.weights.models import Architecture
from dinov2_attn.apps.weights.reading import Checkpoint
from dinov2_attn.errors import InvalidInputError, UnreadableFileError, shown_name

log = logging.getLogger(__name__)

Weights = Mapping[str, Tensor]

# In every published model.
HEAD_DIM = 64

# A key of a safetensors file's metadata, whose value is a number as text.
HEADS_KEY = "num_heads"

# Features, blocks, kind of FFN and its hidden features: the models of DINOv2 and DINO, and the
# ViT-Ti of the same family. All have 64 features per head.
_PUBLISHED = {
    (192, 12, "mlp", 768),
    (384, 12, "mlp", 1536),
    (768, 12, "mlp", 3072),
    (1024, 24, "mlp", 4096),
    (1536, 40, "swiglufused", 4096),
}

# Heads by features and blocks, for larger transformers without 64 features per head (ViT-H, …).
_KNOWN = {(1280, 32): 16, (1408, 40): 16, (1664, 48): 16, (1152, 27): 16}


def infer(
    checkpoint: Checkpoint, heads: int | None = None, *, key: str | None = None
) -> Architecture:
    """Return the architecture of the model in a checkpoint.

    Shapes are read from the weights. The number of heads is the first that is known of: ``heads``,
    the metadata of a safetensors file, the ``config.json`` or ``config.yaml`` of the file, the
    published model of the same shape. Otherwise it is one per 64 features, and ``heads_assumed``
    is true.

    Args:
        checkpoint: The file, as ``read`` returns it.
        heads: The number of heads.
        key: The name of one of several models in the file.

    Raises:
        UnreadableFileError: If the file holds no vision transformer of upstream's kind.
        InvalidInputError: If the number of heads is unknown, impossible, or not that of the file.

    """
    weights = find_backbone(checkpoint, ANCHORS, key).weights
    try:
        architecture = _read(weights)
    except _OtherArchitecture as error:
        raise UnreadableFileError(
            "a checkpoint of a DINOv2 backbone with upstream's parameter names",
            f"{checkpoint.path}, {error}",
            "Name the file of the backbone. Convert it to upstream's names if another library "
            "saved it.",
        ) from error
    return heads_of(checkpoint, _with_config(checkpoint, architecture), heads)


def describe(weights: Weights) -> str:
    """Return the name of the architecture of ``weights``; ``""`` if it cannot be read."""
    try:
        return str(_read(weights))
    except _OtherArchitecture:
        return ""


def _with_config(checkpoint: Checkpoint, architecture: Architecture) -> Architecture:
    """Return ``architecture`` with what only the config file of the checkpoint states."""
    config = checkpoint.config
    if config is None:
        if "reg_token" in {name.rpartition(".")[2] for name in checkpoint.tensors}:
            return replace(architecture, interpolation=(True, 0.0))  # timm's
        return architecture
    if not config.describes(architecture.embed_dim, architecture.depth):
        names = map(shown_name, (config.source, checkpoint.path))
        log.info("%s describes another model than %s", *names)
        return architecture
    if config.activation not in (None, "gelu") and architecture.ffn == "mlp":
        raise UnreadableFileError(
            "a model with GELU, as in upstream's classes",
            f"{config.source} with {config.activation!r}",
            "Load it with the library that made it.",
        )
    return replace(
        architecture,
        eps=config.eps or architecture.eps,
        interpolation=config.interpolation,
    )


# Shapes


class _OtherArchitecture(Exception):
    """Weights are missing, or their shapes are not those of upstream's classes."""


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
        f"whose attention does not have {embed_dim} features",
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
    """Return the weights of one block, and the number of blocks."""
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        first, _, rest = name.partition(".")
        number, _, key = rest.partition(".")
        if first == "blocks" and key:
            blocks.setdefault(number, {})[key] = tensor
    _expect("0" in blocks, "without blocks")
    gaps = [f"blocks.{i}" for i in range(len(blocks)) if str(i) not in blocks]
    _expect(not gaps, f"without {some(gaps)}")
    # All blocks must have the same shapes. Otherwise a small file could describe a huge model.
    shapes = {name: _shapes(block) for name, block in blocks.items()}
    odd = [f"blocks.{name}" for name in shapes if shapes[name] != shapes["0"]]
    _expect(not odd, f"with {some(odd)} unlike blocks.0")
    return blocks["0"], len(blocks)


def _shapes(block: Weights) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in block.items()}


def _ffn(block: Weights) -> tuple[str, int]:
    """Return upstream's name of the kind of FFN, and its number of hidden features."""
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
        raise _OtherArchitecture(otherwise)


# Heads


def heads_of(
    checkpoint: Checkpoint, architecture: Architecture, given: int | None = None
) -> Architecture:
    """Return ``architecture`` with its number of heads, and whether that is an assumption."""
    embed_dim = architecture.embed_dim
    source, stated = _stated_heads(checkpoint, architecture)
    if given is not None and stated is not None and given != stated:
        raise InvalidInputError(
            f"{given} heads, as requested", f"{source} with {stated}", "Leave out --num-heads."
        )
    heads = given or stated
    assumed = heads is None and not _is_published(architecture)
    if heads is None:
        heads = _KNOWN.get((embed_dim, architecture.depth), embed_dim // HEAD_DIM)
        if (embed_dim, architecture.depth) not in _KNOWN and embed_dim % HEAD_DIM:
            raise InvalidInputError(
                "the number of heads, which weights do not contain",
                f"{checkpoint.path} with {embed_dim} features, not a multiple of {HEAD_DIM}",
                f"Give it with --num-heads N: {candidates(embed_dim)}; or in a safetensors file's "
                f"metadata as {{'{HEADS_KEY}': 'N'}}.",
            )
        if not assumed:
            log.info("%d heads: %d features for each, as published", heads, HEAD_DIM)
    if embed_dim % heads:
        raise InvalidInputError(
            f"a number of heads that divides {embed_dim} features",
            f"{heads}",
            f"Give another with --num-heads N: {candidates(embed_dim)}.",
        )
    return replace(architecture, num_heads=heads, heads_assumed=assumed)


def doubt(architecture: Architecture) -> str | None:
    """Return the warning for every result of a model whose number of heads is assumed."""
    if not architecture.heads_assumed:
        return None
    return (
        f"heads assumed: {architecture.num_heads}. Weights do not contain the number, and another "
        f"number changes every map. Give --num-heads N: {candidates(architecture.embed_dim)}"
    )


def candidates(embed_dim: int) -> str:
    """Return the likely numbers of heads: each with 32 to 128 features, a multiple of 8.

    >>> candidates(320)
    '4 (80 features each), 5 (64), 8 (40), 10 (32)'
    """
    divisors = [n for n in range(1, embed_dim + 1) if embed_dim % n == 0]
    likely = [n for n in divisors if 32 <= embed_dim // n <= 128 and embed_dim // n % 8 == 0]
    first, *others = likely or divisors[:8]
    texts = [f"{first} ({embed_dim // first} features each)"]
    return ", ".join(texts + [f"{n} ({embed_dim // n})" for n in others])


def require_as_configured(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise ``InvalidInputError`` if ``model`` contradicts the config file of its weights."""
    config = checkpoint.config
    for module in model.modules():
        sizes = _sizes(module)
        if config is None or sizes is None or not config.describes(*sizes[:2]):
            continue
        _require_heads(sizes[2], config.heads, config.source)
        eps = {norm.eps for norm in module.modules() if isinstance(norm, nn.LayerNorm)}
        if config.eps is not None and eps - {config.eps}:
            raise InvalidInputError(
                f"a model whose norms have eps={config.eps:g}, as {config.source} says",
                ", ".join(f"{value:g}" for value in sorted(eps)),
                "Set it on each: norm.eps = … of every torch.nn.LayerNorm in model.modules().",
            )


def _sizes(module: Any) -> tuple[int, int, int | None] | None:
    """Return features, blocks and heads of a transformer: upstream's, transformers' or timm's."""
    config: Any = getattr(module, "config", None)
    blocks = getattr(module, "blocks", None)
    if hasattr(module, "embed_dim") and hasattr(module, "n_blocks"):
        return module.embed_dim, module.n_blocks, getattr(module, "num_heads", None)
    if hasattr(config, "hidden_size") and hasattr(config, "num_hidden_layers"):
        heads = getattr(config, "num_attention_heads", None)
        return config.hidden_size, config.num_hidden_layers, heads
    if hasattr(module, "embed_dim") and isinstance(blocks, nn.Sequential | nn.ModuleList):
        attention = getattr(blocks[0], "attn", None) if len(blocks) else None
        return module.embed_dim, len(blocks), getattr(attention, "num_heads", None)
    return None


def _require_heads(ours: int | None, theirs: int | None, source: str) -> None:
    if None not in (ours, theirs) and ours != theirs:
        raise InvalidInputError(
            f"a model with num_heads={theirs}, as {source} says",
            f"num_heads={ours}",
            f"Build it with num_heads={theirs}.",
        )


def _is_published(architecture: Architecture) -> bool:
    shape = architecture.embed_dim, architecture.depth, architecture.ffn, architecture.hidden
    return shape in _PUBLISHED


def _stated_heads(checkpoint: Checkpoint, architecture: Architecture) -> tuple[str, int | None]:
    """Return the file that states the number of heads, and the number."""
    text, config = checkpoint.metadata.get(HEADS_KEY), checkpoint.config
    if text is None:
        if config is not None and config.describes(architecture.embed_dim, architecture.depth):
            return config.source, config.heads
        return str(checkpoint.path), None
    if not (text.isdecimal() and len(text) < 6 and int(text)):
        raise UnreadableFileError(
            f"a whole number above 0 as {HEADS_KEY} in the file's metadata",
            f"{checkpoint.path} with {text[:20]!r}",
            "Save it again with the number of heads as text.",
        )
    return str(checkpoint.path), int(text)
