"""Where in a checkpoint a backbone is, and its parameters' names as upstream's classes have them.

One model is saved under many names: below ``teacher.backbone.``, in a dict of dicts, with
the names that DDP, FSDP, activation checkpoints and ``torch.compile`` put between, its
blocks in a row or in chunks. All of them lead to the plain names of a flat model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dinov2_attn.apps.weights.folders import some
from dinov2_attn.apps.weights.foreign import as_upstreams, is_dinov3, joined
from dinov2_attn.apps.weights.reading import Checkpoint
from dinov2_attn.errors import InvalidInputError, UnreadableFileError

# What a module is called that holds the real one, in the names of its parameters.
WRAPPERS = frozenset({
    "module",  # DataParallel, DDP, DeepSpeed
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",  # Lightning
})  # fmt: skip

# Every backbone has these, and nothing else does.
ANCHORS = ("cls_token", "pos_embed", "patch_embed.proj.weight")

# What upstream's training keeps beside a backbone, and what others train on top of one: their
# classifiers, poolers and decoders, none of which a block's attention depends on.
_HEADS = re.compile(
    r"dino_loss|ibot_patch_loss|(\w+_)?(heads?|fc|linear|classifiers?|pooler|attn_pool|projectors?|"
    r"predictors?|decoder)(_\w+|\d+)?"
)

# Of several models, a teacher's is taken, then a moving average's.
PREFERRED = (re.compile("teacher"), re.compile(r"(\w+_)?ema(_\w+)?"))


@dataclass(frozen=True, eq=False)
class Backbone:
    """The weights of one model in a checkpoint: by plain names, and by those in the file.

    ``root`` is where it was, such as ``teacher.backbone``. ``left_out`` is what else there
    is, each part once: ``student``, ``teacher.dino_head``, ``optimizer``.
    """

    root: str
    weights: Mapping[str, Tensor]
    left_out: tuple[str, ...]


def plain(name: str) -> str:
    """Return a parameter's name without wrappers, and without the chunk that its block is in.

    The number of a block is the same in a flat model and in a chunked one, whose chunks
    begin with as many ``Identity`` as there are blocks before them.

    >>> plain("module.blocks.1.7._orig_mod.norm1.weight")
    'blocks.7.norm1.weight'
    """
    kept = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return re.sub(r"(^|\.)blocks\.\d+\.(\d+)(?=\.)", r"\1blocks.\2", kept)


def find_backbone(
    checkpoint: Checkpoint, names: Collection[str], key: str | None = None
) -> Backbone:
    """Find the weights of a model whose parameters have the plain ``names``.

    Of several that of ``key`` is taken, else the teacher's, which is what upstream evaluates
    and publishes, else that of a moving average (``model_ema``). Raises ``UnreadableFileError`` if
    it is not clear which, or if two tensors have one name, and ``InvalidInputError`` for a ``key``
    that the file does not have.
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
    stated = checkpoint.stated
    weights = joined(inside, names, None if stated is None else stated.no_embed_class)
    return Backbone(root.removesuffix("."), weights, tuple(left_out))


def _names_in(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, str]:
    """Return the plain name in upstream's words of each tensor; raise for DINOv3's."""
    found = {name: plain(name) for name in checkpoint.tensors}
    if "pos_embed" in names and is_dinov3(found.values()):
        raise UnreadableFileError(
            "a checkpoint of DINOv2 or DINO",
            f"{checkpoint.path}, a DINOv3 checkpoint, whose positions are rotations",
            "Load it with the code that it is of: DINOv2's classes cannot hold it.",
        )
    upstreams = as_upstreams(found.values())
    return {name: upstreams[key] for name, key in found.items()}


def _roots(found: Collection[str], anchors: Sequence[str]) -> Mapping[str, int]:
    """Return the prefixes under which anchors are, and how many of them."""
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
    """Return the root that ``key`` is, or the one that is below it or has it as a part."""
    asked = plain(f"{key}.").removesuffix(".")
    whole = {root: root.removesuffix(".") for root in roots}
    below = [root for root in roots if asked and root.startswith(f"{asked}.")]
    parts = [root for root in roots if asked in whole[root].split(".")]
    best = next(
        (
            found
            for found in ([r for r in roots if whole[r] == asked], below, parts)
            if len(found) == 1
        ),
        None,
    )
    if best is None:
        raise InvalidInputError(
            f"a model in {checkpoint.path} by the name of {key!r}",
            f"models at {', '.join(name or repr('') for name in whole.values()) or 'no name'}",
            "Name one of them, or leave out the key.",
        )
    return best[0]


def _part_of(name: str, root: str) -> str:
    """Shorten the name of what is not in ``root`` to where it parts from there."""
    parts, shared = name.split("."), 0
    for ours, roots in zip(parts, root.split("."), strict=False):
        if ours != roots:
            break
        shared += 1
    return ".".join(parts[: shared + 1])


def _twice(checkpoint: Checkpoint, names: list[str]) -> UnreadableFileError:
    return UnreadableFileError(
        "a checkpoint with each parameter once",
        f"{checkpoint.path} with {' and '.join(names)}, which are one",
        "If its chunks count their blocks from 0 each, number them through: upstream does.",
    )
