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

from dinov2_attn.errors import UnreadableFile
from dinov2_attn.upstream.reading import Checkpoint, some

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

# What upstream's training keeps beside a backbone.
HEADS = frozenset({"dino_head", "ibot_head", "dino_loss", "ibot_patch_loss"})

PREFERRED = "teacher"


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


def find_backbone(checkpoint: Checkpoint, names: Collection[str]) -> Backbone:
    """Find the weights of a model whose parameters have the plain ``names``.

    Of several the teacher's are taken, which is what upstream evaluates and publishes.
    Raises ``UnreadableFile`` if it is not clear which, or if two tensors have one name.
    """
    anchors = [name for name in ANCHORS if name in names] or list(names)
    found = {name: plain(name) for name in checkpoint.tensors}
    root = _choose(checkpoint, _roots(found.values(), anchors))
    inside, outside = {}, [plain(name) for name in checkpoint.others]
    for name, tensor in checkpoint.tensors.items():
        key = found[name].removeprefix(root)
        is_head = key.partition(".")[0] in HEADS and key not in names
        if is_head or not found[name].startswith(root):
            outside.append(found[name])
        elif key in inside:
            raise _twice(checkpoint, [name for name in found if found[name] == root + key])
        else:
            inside[key] = tensor
    left_out = dict.fromkeys(_part_of(name, root) for name in outside)
    return Backbone(root.removesuffix("."), inside, tuple(left_out))


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
    preferred = {root: n for root, n in roots.items() if PREFERRED in root.split(".")}
    candidates = preferred or roots
    most = max(candidates.values())
    best = [root for root, n in candidates.items() if n == most]
    if len(best) > 1:
        raise UnreadableFile(
            "a checkpoint of one model, or of a teacher and others",
            f"{checkpoint.path} with one in each of {some([r.removesuffix('.') for r in best])}",
            "Save the one that you want by itself, as a dict of names to tensors.",
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


def _twice(checkpoint: Checkpoint, names: list[str]) -> UnreadableFile:
    return UnreadableFile(
        "a checkpoint with each parameter once",
        f"{checkpoint.path} with {' and '.join(names)}, which are one",
        "If its chunks count their blocks from 0 each, number them through: upstream does.",
    )
