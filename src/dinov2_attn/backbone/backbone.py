"""Whose attention is recorded: the one DINOv2 inside a model, and its attention modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dinov2_attn.backbone.contract import name_of
from dinov2_attn.backbone.structure import Part, part_of_module
from dinov2_attn.backbone.validation import layers_to_take
from dinov2_attn.errors import IncompatibleUpstream, InvalidInput, NotGrafted
from dinov2_attn.grafting.models import flat_blocks
from dinov2_attn.grafting.modules import takes
from dinov2_attn.typing import Layers


def transformer_in(model: object) -> Any:
    """Return the one vision transformer that ``model`` is or contains, wrapped or not."""
    if not isinstance(model, nn.Module):
        raise InvalidInput(
            "a model: a DINOv2, or a torch.nn.Module that contains one",
            f"{type(model).__name__}",
            "Pass the module whose forward will run.",
        )
    found = {name: m for name, m in model.named_modules() if _is_transformer(m)}
    if len(found) != 1:
        names = ", ".join(name or "the model itself" for name in found)
        raise InvalidInput(
            f"one DINOv2 inside {name_of(type(model))}",
            f"{len(found)}: {names}" if found else "none",
            "Pass the one to record; the others may run too.",
        )
    return next(iter(found.values()))


def attentions_of(transformer: Any, n: Layers) -> dict[nn.Module, int]:
    """Return the attention modules of the blocks that ``n`` takes, with their layer."""
    blocks = flat_blocks(transformer.blocks)
    layers = layers_to_take(n, len(blocks))
    if not layers:
        raise InvalidInput("at least one layer to record", f"n={n!r}", "Leave n out for all.")
    modules = {_attention_of(blocks[layer]): layer for layer in layers}
    if len(modules) != len(layers):
        raise IncompatibleUpstream(
            f"an attention module of its own in each of the layers {layers}",
            f"{len(modules)} modules",
            "Weights of shared modules cannot be told apart.",
        )
    return modules


def other_attentions(transformer: Any, recorded: Mapping[nn.Module, int]) -> dict[nn.Module, int]:
    """Return the attention modules of ``transformer`` not ``recorded``, with their layer."""
    found: dict[nn.Module, int] = {}
    for layer, block in enumerate(flat_blocks(transformer.blocks)):
        found.update(dict.fromkeys(filter(_is_attention, block.modules()), layer))
    return {module: layer for module, layer in found.items() if module not in recorded}


# The first question of each is cheap, and no for almost every module.


def _is_transformer(module: nn.Module) -> bool:
    return "blocks" in module._modules and part_of_module(module) is Part.TRANSFORMER


def _is_attention(module: nn.Module) -> bool:
    return "qkv" in module._modules and part_of_module(module) is Part.ATTENTION


def _attention_of(block: nn.Module) -> nn.Module:
    # Sharded, compiled and adapted modules are wrappers, around the block or in it.
    found = [m for m in block.modules() if _is_attention(m)]
    if len(found) != 1 or not takes(found[0], "return_attn"):
        raise NotGrafted(
            "one attention module in each block, whose forward install() has reached",
            f"in {name_of(type(block))}: "
            + (", ".join(name_of(type(m)) for m in found) or "no attention module"),
            "Call dinov2_attn.install(), or install(model) with the live model, before recording.",
        )
    return found[0]
