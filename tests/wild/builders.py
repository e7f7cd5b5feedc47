"""Small models: DINOv2's and DINOv3's own constructors, as most projects have kept them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.wild.weights import images, sharp

EINOPS = "einops==0.8.1"

# Heads of 16 channels: DINOv3's rotation divides them by four.
DINOV2: dict[str, Any] = {
    "img_size": 28,
    "patch_size": 14,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "init_values": 1.0,
    "block_chunks": 0,
}
DINOV3: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 16,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "n_storage_tokens": 4,
    "layerscale_init": 1.0,
    "mask_k_bias": True,
}
BLOCK: dict[str, Any] = {"dim": 48, "num_heads": 3}


def imported(module: str, name: str) -> Any:
    """Import ``module`` of the project and return ``name`` of it."""
    return getattr(importlib.import_module(module), name)


def dinov2(
    module: str, cls: str = "DinoVisionTransformer", **changed: Any
) -> Callable[[], nn.Module]:
    """Return a builder of a model whose class takes DINOv2's arguments."""
    return lambda: sharp(imported(module, cls)(**{**DINOV2, **changed}))


def dinov3(module: str, **changed: Any) -> Callable[[], nn.Module]:
    """Return a builder of a model whose class takes DINOv3's arguments.

    Its key bias is masked by a buffer that is NaN until ``init_weights``.
    """

    def build() -> nn.Module:
        model = imported(module, "DinoVisionTransformer")(**{**DINOV3, **changed})
        model.init_weights()
        return sharp(model)

    return build


def vit_of_2021(module: str, **changed: Any) -> Callable[[], nn.Module]:
    """Return a builder of a model whose class takes the arguments of DINO, DINOv2's forerunner."""
    size = {"img_size": [32], "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return lambda: sharp(imported(module, "VisionTransformer")(**{**size, **changed}))


def on_images(batch: int, height: int, width: int, **options: Any) -> Callable[[Any], Any]:
    """Return a run that calls the model with noise of this size, and with ``options``."""
    return lambda model: model(images(batch, height, width), **options)


def features_of(batch: int, height: int, width: int, **options: Any) -> Callable[[Any], Any]:
    """Return a run that calls ``forward_features`` with noise of this size."""
    return lambda model: model.forward_features(images(batch, height, width), **options)


def on_tokens(model: Any) -> Any:
    """Call ``model`` with two sequences of six tokens."""
    return model(images(2, 2, 3, channels=48).flatten(2).transpose(1, 2))


def on_views(model: Any) -> Any:
    """Call a model of several views with two scenes of two images each."""
    views = images(4, 28, 42).reshape(2, 2, 3, 28, 42)
    return model.get_intermediate_layers(views, n=2)


class WithPositions(nn.Module):
    """Blocks in a row, each of which is given the positions of a grid of 2 x 3."""

    def __init__(self, blocks: list[nn.Module], argument: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.argument = argument

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.cartesian_prod(torch.arange(2), torch.arange(3))
        positions = grid.expand(len(x), -1, -1)
        for block in self.blocks:
            x = block(x, **{self.argument: positions})
        return x
