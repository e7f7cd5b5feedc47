"""The answer that is compared with the truth: what this package says of the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import dinov2_attn
from dinov2_attn.maps.layers import recorded_in


def answer(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, list[Tensor]]:
    """Run ``model`` once and return the weights of each attention module by its path."""
    with dinov2_attn.record(model, check="every") as recording:
        run(model)
    paths = {module: path for path, module in model.named_modules()}
    wanted = recorded_in(model, None, every=True).wanted
    layers = {layer: paths[module] for module, layer in wanted.items()}
    weights: dict[str, list[Tensor]] = {}
    for maps in recording:
        for layer, of_layer in zip(maps.layers, maps.weights, strict=True):
            weights.setdefault(layers[layer], []).append(of_layer)
    return weights
