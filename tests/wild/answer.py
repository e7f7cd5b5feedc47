"""The answer that is compared with the truth: what this package says of the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import dinov2_attn
from dinov2_attn.backbone.backbone import backbone_in


def answer(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, list[Tensor]]:
    """Run ``model`` once and return the weights of each attention module by its path."""
    with dinov2_attn.install(model), dinov2_attn.record(model) as recording:
        paths = _paths(model)
        run(model)
    weights: dict[str, list[Tensor]] = {}
    for maps in recording:
        for layer, of_layer in zip(maps.layers, maps.weights, strict=True):
            weights.setdefault(paths[layer], []).append(of_layer)
    return weights


def _paths(model: nn.Module) -> dict[int, str]:
    names = {module: name for name, module in model.named_modules()}
    return {layer: names[module] for module, layer in backbone_in(model).attentions(None).items()}
