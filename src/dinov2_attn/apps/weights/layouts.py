"""The backbone in a checkpoint, and its parameter names as in upstream's classes.

The names of one model vary: a prefix such as ``teacher.backbone.``, nested dicts, the names that
DDP, FSDP, activation checkpointing and ``torch.compile`` insert, blocks in chunks or not. This
module converts all of them to the plain names of a model without chunks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dinov2_attn.apps.weights.files import some
from dinov2_attn.apps.weights.foreign import as_upstreams, is_dinov3, joined
from dinov2_attn.apps.weights.reading import Checkpoint
from dinov2_attn.errors import InvalidInputError, UnreadableFileError

# The names that wrapper modules insert into parameter names.
WRAPPERS = frozenset({
    "module",  # DataParallel, DDP, DeepSpeed
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",  # Lightning
})  # fmt: skip

# Every backbone has these parameters, and no other module does.
ANCHORS = ("cls_token", "pos_embed", "patch_embed.proj.weight")

# Modules on top of a backbone: upstream's losses and heads, and the classifiers, poolers and
# decoders of other projects. The attention of a block does not depend on them.
_HEADS = re.compile(
    r"dino_loss|ibot_patch_loss|(\w+_)?(heads?|fc|linear|classifiers?|pooler|attn_pool|projectors?|"
    r"predictors?|decoder)(_\w+|\d+)?"
)

# Of several models: the teacher's first, then that of a moving average.
PREFERRED = (re.compile("teacher"), re.compile(r"(\w+_)?ema(_\w+)?"))


@dataclass(frozen=True, eq=False)
class Backbone:
    """The weights of one model in a checkpoint.

    Attributes:
        root: Its place in the file, such as ``teacher.backbone``.
        weights: The tensors by plain name.
        left_out: The other parts of the file: ``student``, ``teacher.dino_head``, ``optimizer``.

    """

    root: str
    weights: Mapping[str, Tensor]
    left_out: tuple[str, ...]


def plain(name: str) -> str:
    """Return a parameter's name without wrappers and without the chunk of its block.

    A block has the same number with and without chunks: upstream fills each chunk with
    ``Identity`` modules in place of the blocks before it.

    >>> plain("module.blocks.1.7._orig_mod.norm1.weight")
    'blocks.7.norm1.weight'
    """
    kept = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return re.sub(r"(^|\.)blocks\.\d+\.(\d+)(?=\.)", r"\1blocks.\2", kept)


def find_backbone(
    checkpoint: Checkpoint, names: Collection[str], key: str | None = None
) -> Backbone:
    """Return the weights of the model whose parameters have the plain ``names``.

    Args:
        checkpoint: The file.
        names: The plain names of the parameters of the model to fill.
        key: Which of several models to take. By default the teacher, which upstream evaluates and
            publishes, or else a moving average (``model_ema``).

    Raises:
        UnreadableFileError: If the choice is ambiguous, or two tensors have the same name.
        InvalidInputError: If the file has no model named ``key``.

    """
    anchors = [name for name in ANCHORS if name in names] or list(names)
    found = _names_in(checkpoint, names)
    roots = _roots(found.values(), anchors)
    root = _choose(checkpoint, roots) if key is None else _named(checkpoint, roots, key)
    inside, outside = {}, [plain(name) for name in checkpoint.others]
    for name, tensor in checkpoint.tensors.items():
        key = found[name].removeprefix(root)
        is_head = bool(roots) and key not in names and _HEADS.fullmatch(key.partition(".")[0])
        if is_head or not found[name].startswith(root):
            outside.append(found[name])
        elif key in inside:
            raise _twice(checkpoint, [name for name in found if found[name] == root + key])
        else:
            inside[key] = tensor
    left_out = dict.fromkeys(_part_of(name, root) for name in outside)
    config = checkpoint.config
    weights = joined(inside, names, None if config is None else config.no_embed_class)
    return Backbone(root.removesuffix("."), weights, tuple(left_out))


def _names_in(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, str]:
    """Return upstream's plain name of each tensor. Raise ``UnreadableFileError`` for DINOv3."""
    found = {name: plain(name) for name in checkpoint.tensors}
    if "pos_embed" in names and is_dinov3(found.values()):
        raise UnreadableFileError(
            "a checkpoint of DINOv2 or DINO",
            f"{checkpoint.path}, a DINOv3 checkpoint, with rotary positions",
            "Load it with DINOv3's code: --arch dinov3_vits16 or its like, with --repo PATH. "
            "DINOv2's classes cannot hold it.",
        )
    upstreams = as_upstreams(found.values())
    return {name: upstreams[key] for name, key in found.items()}


def _roots(found: Collection[str], anchors: Sequence[str]) -> Mapping[str, int]:
    """Return the prefixes of anchors, with the number of anchors below each."""
    return Counter(
        name.removesuffix(anchor)
        for name in dict.fromkeys(found)
        for anchor in anchors
        if name == anchor or name.endswith(f".{anchor}")
    )


def _choose(checkpoint: Checkpoint, roots: Mapping[str, int]) -> str:
    if not roots:
        return ""
    candidates = roots
    for pattern in reversed(PREFERRED):
        candidates = {
            root: n for root, n in roots.items() if any(map(pattern.fullmatch, root.split(".")))
        } or candidates
    most = max(candidates.values())
    best = [root for root, n in candidates.items() if n == most]
    if len(best) > 1:
        raise UnreadableFileError(
            "a checkpoint of one model, or of a teacher and others",
            f"{checkpoint.path} with one in each of {some([r.removesuffix('.') for r in best])}",
            f"Choose one: --key {best[-1].removesuffix('.')}, or load_checkpoint(…, key=…).",
        )
    return best[0]


def _named(checkpoint: Checkpoint, roots: Mapping[str, int], key: str) -> str:
    """Return the root ``key``, or else the only one below it, or the only one that contains it."""
    wanted = plain(f"{key}.").removesuffix(".")
    whole = {root: root.removesuffix(".") for root in roots}
    below = [root for root in roots if wanted and root.startswith(f"{wanted}.")]
    parts = [root for root in roots if wanted in whole[root].split(".")]
    best = next(
        (
            found
            for found in ([r for r in roots if whole[r] == wanted], below, parts)
            if len(found) == 1
        ),
        None,
    )
    if best is None:
        raise InvalidInputError(
            f"a model in {checkpoint.path} named {key!r}",
            f"models at {', '.join(name or repr('') for name in whole.values()) or 'no name'}",
            "Name one of them, or leave out the key.",
        )
    return best[0]


def _part_of(name: str, root: str) -> str:
    """Shorten ``name`` to its first part that differs from ``root``."""
    parts, shared = name.split("."), 0
    for ours, roots in zip(parts, root.split("."), strict=False):
        if ours != roots:
            break
        shared += 1
    return ".".join(parts[: shared + 1])


def _twice(checkpoint: Checkpoint, names: list[str]) -> UnreadableFileError:
    return UnreadableFileError(
        "a checkpoint with each parameter once",
        f"{checkpoint.path} with {' and '.join(names)}, which are the same",
        "If each chunk counts its blocks from 0, number them consecutively, as upstream does.",
    )
