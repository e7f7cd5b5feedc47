"""How many heads a model has: weights do not tell, so it is said, known, or assumed aloud."""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import nn

from dinov2_attn.apps.weights.models import Architecture
from dinov2_attn.apps.weights.reading import Checkpoint
from dinov2_attn.errors import InvalidInputError, UnreadableFileError

log = logging.getLogger(__name__)

# In every published model.
HEAD_DIM = 64

# A key of a safetensors file's metadata, whose value is a number as text.
HEADS_KEY = "num_heads"

# Features, blocks, FFN and what is inside of it: DINOv2's and DINO's models, and the ViT-Ti of
# the same family, each with 64 features a head.
_PUBLISHED = {
    (192, 12, "mlp", 768),
    (384, 12, "mlp", 1536),
    (768, 12, "mlp", 3072),
    (1024, 24, "mlp", 4096),
    (1536, 40, "swiglufused", 4096),
}


# Features and blocks of larger transformers whose heads have not 64 features: ViT-H and others.
_KNOWN = {(1280, 32): 16, (1408, 40): 16, (1664, 48): 16, (1152, 27): 16}


def heads_of(
    checkpoint: Checkpoint, architecture: Architecture, asked: int | None = None
) -> Architecture:
    """Return ``architecture`` with its number of heads, and whether that is an assumption."""
    embed_dim = architecture.embed_dim
    source, said = _said(checkpoint, architecture)
    if asked is not None and said is not None and asked != said:
        raise InvalidInputError(f"{asked} heads, as asked", f"{source} with {said}", _LEAVE_OUT)
    heads = asked or said
    assumed = heads is None and not _is_published(architecture)
    if heads is None:
        heads = _KNOWN.get((embed_dim, architecture.depth), embed_dim // HEAD_DIM)
        if (embed_dim, architecture.depth) not in _KNOWN and embed_dim % HEAD_DIM:
            raise InvalidInputError(
                "the number of heads, which weights do not tell",
                f"{checkpoint.path} with {embed_dim} features, which are not {HEAD_DIM} for each",
                f"Give it with --num-heads N: {candidates(embed_dim)}; or in a safetensors file's "
                f"metadata as {{'{HEADS_KEY}': 'N'}}.",
            )
        if not assumed:
            log.info("%d heads: %d features for each, as published", heads, HEAD_DIM)
    if embed_dim % heads:
        raise InvalidInputError(
            f"a number of heads that {embed_dim} features can be divided among",
            f"{heads}",
            f"Give another with --num-heads N: {candidates(embed_dim)}.",
        )
    return replace(architecture, num_heads=heads, heads_assumed=assumed)


_LEAVE_OUT = "Leave out --num-heads."


def doubt(architecture: Architecture) -> str | None:
    """Return what has to stand on every result of a model whose heads are assumed."""
    if not architecture.heads_assumed:
        return None
    return (
        f"heads assumed: {architecture.num_heads}. Weights do not tell; with another number "
        f"every map is another. Give --num-heads N: {candidates(architecture.embed_dim)}"
    )


def candidates(embed_dim: int) -> str:
    """Name the numbers of heads that are likely: with 32 to 128 features each, in eights.

    >>> candidates(320)
    '4 (80 features each), 5 (64), 8 (40), 10 (32)'
    """
    divisors = [n for n in range(1, embed_dim + 1) if embed_dim % n == 0]
    likely = [n for n in divisors if 32 <= embed_dim // n <= 128 and embed_dim // n % 8 == 0]
    first, *others = likely or divisors[:8]
    texts = [f"{first} ({embed_dim // first} features each)"]
    return ", ".join(texts + [f"{n} ({embed_dim // n})" for n in others])


def require_as_stated(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise ``InvalidInputError`` if ``model`` is otherwise than a file beside its weights says."""
    stated = checkpoint.stated
    for module in model.modules():
        embed_dim, blocks = getattr(module, "embed_dim", None), getattr(module, "n_blocks", None)
        if stated is None or embed_dim is None or blocks is None:
            continue
        if not stated.is_of(embed_dim, blocks):
            continue
        _require("num_heads", getattr(module, "num_heads", None), stated.heads, stated.source)
        eps = {norm.eps for norm in module.modules() if isinstance(norm, nn.LayerNorm)}
        if stated.eps is not None and eps - {stated.eps}:
            raise InvalidInputError(
                f"a model whose norms have eps={stated.eps:g}, as {stated.source} says",
                ", ".join(f"{value:g}" for value in sorted(eps)),
                "Set it on each: norm.eps = … of every torch.nn.LayerNorm in model.modules().",
            )


def _require(name: str, ours: int | None, theirs: int | None, source: str) -> None:
    if None not in (ours, theirs) and ours != theirs:
        raise InvalidInputError(
            f"a model with {name}={theirs}, as {source} says",
            f"{name}={ours}",
            f"Build it with {name}={theirs}.",
        )


def _is_published(architecture: Architecture) -> bool:
    shape = architecture.embed_dim, architecture.depth, architecture.ffn, architecture.hidden
    return shape in _PUBLISHED


def _said(checkpoint: Checkpoint, architecture: Architecture) -> tuple[str, int | None]:
    """Return the file that states the number of heads, and the number."""
    text, stated = checkpoint.metadata.get(HEADS_KEY), checkpoint.stated
    if text is None:
        if stated is not None and stated.is_of(architecture.embed_dim, architecture.depth):
            return stated.source, stated.heads
        return str(checkpoint.path), None
    if not (text.isdecimal() and len(text) < 6 and int(text)):
        raise UnreadableFileError(
            f"a whole number above 0 as {HEADS_KEY} in the file's metadata",
            f"{checkpoint.path} with {text[:20]!r}",
            "Save it again with the number of heads as text.",
        )
    return str(checkpoint.path), int(text)
