"""Checkpoints of transformers and timm, converted to upstream's names and layouts.

transformers stores queries, keys and values separately. timm stores the positions of the patches
without that of CLS. The values are the same: parts are concatenated, a missing position is 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

# In every ViT of transformers, and in no other library's.
_HUGGING_FACE = "embeddings.patch_embeddings.projection.weight"

# In DINOv3's of transformers.
_DINOV3 = "embeddings.patch_embeddings.weight"

_OUTSIDE_BLOCKS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}

# The names of DINOv2 and ViT (DINO v1) in transformers, before version 5 and since.
_IN_BLOCKS = {
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w2",
    "mlp.down_proj": "mlp.w3",
}

# What is concatenated, in this order.
_JOINED = {
    "attn.qkv": ("attn.q", "attn.k", "attn.v"),
    "mlp.w12": ("mlp.w1", "mlp.w2"),
}
_TIMM_SWIGLU = {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3"}

_BLOCK = re.compile(r"(?:encoder\.)?layers?\.(\d+)\.(.+)")
_LEAF = re.compile(r"(.+?)(\.weight|\.bias)?$")


def as_upstreams(names: Collection[str]) -> dict[str, str]:
    """Return upstream's name for each of ``names``. Only those of transformers change.

    >>> as_upstreams(["dinov2.layernorm.bias", f"dinov2.{_HUGGING_FACE}"])["dinov2.layernorm.bias"]
    'dinov2.norm.bias'
    """
    roots = {
        name.removesuffix(anchor): rename
        for anchor, rename in ((_HUGGING_FACE, _as_upstreams), (_DINOV3, _as_first_written))
        for name in names
        if name == anchor or name.endswith(f".{anchor}")
    }
    longest = sorted(roots, key=len, reverse=True)
    renamed = {}
    for name in names:
        root = next((root for root in longest if name.startswith(root)), None)
        renamed[name] = name if root is None else root + roots[root](name[len(root) :])
    return renamed


def _as_first_written(name: str) -> str:
    """Return a name of DINOv3 in transformers as its files have it, in which no ``model.`` is."""
    return name.removeprefix("model.") if name.startswith("model.layer.") else name


def _as_upstreams(name: str) -> str:
    block = _BLOCK.fullmatch(name)
    start, rest = (f"blocks.{block[1]}.", block[2]) if block else ("", name)
    return start + _look_up(_IN_BLOCKS if block else _OUTSIDE_BLOCKS, rest)


def _look_up(table: Mapping[str, str], name: str) -> str:
    leaf = _LEAF.fullmatch(name)
    if leaf is None:
        return name
    return table.get(leaf[1], leaf[1]) + (leaf[2] or "")


def is_dinov3(names: Collection[str]) -> bool:
    """Return whether plain ``names`` are those of DINOv3, its own or in transformers."""
    ends = ("rope_embed.periods", "storage_tokens", "embeddings.patch_embeddings.weight")
    return any(name == end or name.endswith(f".{end}") for name in names for end in ends)


def joined(
    weights: Mapping[str, Tensor], names: Collection[str], no_embed_class: bool | None = None
) -> dict[str, Tensor]:
    """Return the weights of one backbone in upstream's layout.

    Args:
        weights: The tensors by upstream's names.
        names: The names of the model's parameters, which are not converted.
        no_embed_class: timm's option of that name, if known.

    """
    weights = _with_swiglu(weights, names)
    for key in list(weights):
        for whole, parts in _JOINED.items():
            start, found, leaf = key.rpartition(parts[0])
            keys = [f"{start}{part}{leaf}" for part in parts]
            fits = found and leaf in (".weight", ".bias") and (not start or start.endswith("."))
            fits = fits and all(part in weights and part not in names for part in keys)
            if fits and have_memory([weights[part] for part in keys]):
                tensors = [weights.pop(part).detach() for part in keys]
                weights[f"{start}{whole}{leaf}"] = torch.cat(tensors)
    return _with_positions(weights, names, no_embed_class)


def have_memory(tensors: Collection[Tensor]) -> bool:
    """Return whether every element has memory of its own: expanded views have any shape."""
    if any(tensor.layout != torch.strided or tensor.is_meta for tensor in tensors):
        return False
    storages = [tensor.untyped_storage() for tensor in tensors]
    memory = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(t.numel() * t.element_size() for t in tensors) <= sum(memory.values())


def _with_swiglu(weights: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Rename timm's SwiGLU, packed (fc1 has twice the features that fc2 takes) or in two parts."""
    renamed = {}
    for key, tensor in weights.items():
        start, found, leaf = key.rpartition("mlp.")
        layer = _LEAF.fullmatch(f"{found}{leaf}")
        new = None
        if layer is not None and found and key not in names:
            new = _swiglu_name(weights, start, layer[1])
        renamed[f"{start}{new}{layer[2] or ''}" if new and layer else key] = tensor
    return renamed


def _swiglu_name(weights: Mapping[str, Tensor], start: str, layer: str) -> str | None:
    if f"{start}mlp.fc1_g.weight" in weights:
        return _TIMM_SWIGLU.get(layer)
    wide, narrow = weights.get(f"{start}mlp.fc1.weight"), weights.get(f"{start}mlp.fc2.weight")
    if wide is None or narrow is None or not wide.ndim == narrow.ndim == 2:
        return None
    packed = wide.shape[0] == 2 * narrow.shape[1] > 0
    return {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}.get(layer) if packed else None


def _with_positions(
    weights: dict[str, Tensor], names: Collection[str], no_embed_class: bool | None
) -> dict[str, Tensor]:
    """Convert timm's positions to upstream's layout: CLS, then patches, none for registers."""
    if "reg_token" in names:  # a model of timm's, which has that layout itself
        return weights
    timms = "reg_token" in weights
    if timms:
        weights["register_tokens"] = weights.pop("reg_token")
    positions, registers = weights.get("pos_embed"), weights.get("register_tokens")
    if positions is None or positions.ndim != 3 or not (timms or "mask_token" not in weights):
        return weights
    count = registers.shape[1] if timms and registers is not None and registers.ndim == 3 else 0
    tokens = positions.shape[1]
    if _is_square(tokens) and no_embed_class is not False and have_memory([positions]):
        nothing = positions.new_zeros(positions.shape[0], 1, positions.shape[2])
        weights["pos_embed"] = torch.cat([nothing, positions.detach()], dim=1)
    elif (
        registers is not None
        and count
        and _is_square(tokens - 1 - count)
        and registers.shape[2] == positions.shape[2]
        and have_memory([positions, registers])
    ):
        _split_positions(weights, positions.detach(), registers.detach())
    return weights


def _split_positions(weights: dict[str, Tensor], positions: Tensor, registers: Tensor) -> None:
    """Add the positions of registers to the registers: upstream adds none in its forward pass."""
    end = 1 + registers.shape[1]
    weights["register_tokens"] = registers + positions[:, 1:end]
    weights["pos_embed"] = torch.cat([positions[:, :1], positions[:, end:]], dim=1)


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
