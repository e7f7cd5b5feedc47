"""UniCeption: an encoder that swaps classes, and transformers over several views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.wild.builders import BLOCK, DINOV2, imported
from tests.wild.target import GitHub, Target
from tests.wild.weights import images, sharp

UNICEPTION = GitHub("castacks/UniCeption", "802ebc1783d71bbaa9d139c88d87d062ad18ce62")
JAXTYPING = ("jaxtyping==0.3.11", "wadler-lindig==0.1.8")
SHARING = "uniception.models.info_sharing"


def build_encoder() -> nn.Module:
    """Build the encoder; torch.hub gives it a small model of PyPI's DINOv2."""
    vit = imported("dinov2.models.vision_transformer", "DinoVisionTransformer")
    small = vit(**{**DINOV2, "embed_dim": 384, "num_heads": 6})  # it reshapes to 384 channels
    before, torch.hub.load = torch.hub.load, lambda *_, **__: small
    try:
        encoder = imported("uniception.models.encoders.dinov2", "DINOv2Encoder")
        return sharp(encoder("dinov2", size="small", torch_hub_pretrained=False))
    finally:
        torch.hub.load = before


def run_encoder(model: Any) -> Any:
    return model.model.forward_features(images(2, 28, 42))


def sharing(module: str, cls: str, **options: Any) -> Callable[[], nn.Module]:
    """Return a builder of a transformer that shares information between views."""
    size = {"name": "small", "input_embed_dim": 48, **BLOCK, "depth": 2, "mlp_ratio": 2.0}
    return lambda: sharp(imported(f"{SHARING}.{module}", cls)(**{**size, **options}))


def run_sharing(model: Any) -> Any:
    views = [images(2, 2, 3, channels=48, seed=seed) for seed in (1, 2)]
    torch.manual_seed(0)  # it draws the positions of views
    return model(imported(f"{SHARING}.base", "MultiViewTransformerInput")(features=views)).features


def _of_views(name: str, differs: str, build: Callable[[], nn.Module]) -> Target:
    bare = ("uniception", "uniception.models", SHARING)
    return Target(
        f"uniception-{name}", UNICEPTION, differs, build, run_sharing, bare=bare, needs=JAXTYPING
    )


TARGETS = [
    Target(
        "uniception-dinov2",
        UNICEPTION,
        "the class of each block's attention is swapped",
        build_encoder,
        run_encoder,
        bare=("uniception", "uniception.models", "uniception.models.encoders"),
        needs=(*JAXTYPING, "dinov2==0.0.1.dev2"),
    ),
    _of_views(
        "alternating",
        "views in turn one by one and together",
        sharing("alternating_attention_transformer", "MultiViewAlternatingAttentionTransformer"),
    ),
    _of_views(
        "entropy",
        "q/k norm, queries scaled by the number of tokens",
        sharing(
            "global_attention_transformer",
            "MultiViewGlobalAttentionTransformer",
            qk_norm=True,
            use_entropy_scaling=True,
        ),
    ),
    _of_views(
        "cross",
        "self and cross attention",
        sharing("cross_attention_transformer", "MultiViewCrossAttentionTransformer", num_views=2),
    ),
    _of_views(
        "differential",
        "differential attention: two kernel calls in one forward",
        sharing(
            "diff_cross_attention_transformer",
            "DifferentialMultiViewCrossAttentionTransformer",
            num_views=2,
            num_heads=4,
            dim=64,
        ),
    ),
]
