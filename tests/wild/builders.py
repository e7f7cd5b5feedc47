"""Small models: DINOv2's and DINOv3's own constructors, as most projects have kept them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from tests.wild.weights import images, sharp

EINOPS = "einops==0.8.1"

# A grid of 2 x 3 patches, and heads of 16 channels, which DINOv3's rotation divides by four.
DINOV2 = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3}
DINOV3 = {
    **{"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3},
    **{"n_storage_tokens": 4, "layerscale_init": 1.0, "mask_k_bias": True},
}


def made_by(
    module: str, cls: str = "DinoVisionTransformer", **options: Any
) -> Callable[[], nn.Module]:
    """Return a builder that imports ``module`` and calls ``cls`` of it with ``options``."""

    def build() -> nn.Module:
        model: nn.Module = getattr(importlib.import_module(module), cls)(**options)
        return sharp(model)

    return build


def dinov2(
    module: str, cls: str = "DinoVisionTransformer", **changed: Any
) -> Callable[[], nn.Module]:
    """Return a builder of a model that takes DINOv2's arguments."""
    return made_by(module, cls, **{**DINOV2, "init_values": 1.0, **changed})


def dinov3(module: str, **changed: Any) -> Callable[[], nn.Module]:
    """Return a builder of a model that takes DINOv3's arguments.

    Its key bias is masked by a buffer that is NaN until ``init_weights``.
    """

    def build() -> nn.Module:
        cls = importlib.import_module(module).DinoVisionTransformer
        model: nn.Module = cls(**{**DINOV3, **changed})
        model.init_weights()
        return sharp(model)

    return build


def on_images(batch: int, height: int, width: int, **options: Any) -> Callable[[nn.Module], Any]:
    """Return a run that calls the model with noise of this size, and with ``options``."""
    return lambda model: model(images(batch, height, width), **options)


def features_of(batch: int, height: int, width: int, **options: Any) -> Callable[[nn.Module], Any]:
    """Return a run that calls ``forward_features`` with noise of this size."""
    return partial(_forward_features, size=(batch, height, width), options=options)


def _forward_features(model: Any, size: tuple[int, int, int], options: dict[str, Any]) -> Any:
    return model.forward_features(images(*size), **options)
