"""Repositories of facebookresearch: DINOv2 and DINOv3 themselves, and their relatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.wild.builders import (
    EINOPS,
    dinov2,
    dinov3,
    features_of,
    imported,
    on_images,
    vit_of_2021,
)
from tests.wild.target import GitHub, Target
from tests.wild.weights import images, sharp

DINOV2 = GitHub("facebookresearch/dinov2", "b8931f7bf91576930313be2c6d6af376033b35f0")
# A fork that holds upstream's commits of 2026.
DINOV2_OF_2026 = GitHub("emondaca/dinov2_EMC", "b0ca6fd8f2bb21944ff90675ba4f9ce72616d963")
DINOV3 = GitHub("facebookresearch/dinov3", "6876159a11b4df116f30f667f8c9888617df0751")
CAPI = GitHub("facebookresearch/capi", "98b4fa17ee8eec8810c17022df9a27a44845368b")
WEBSSL = GitHub("facebookresearch/webssl", "c85b60bbe8b8436f30316c7e28db1777475db3d9")
DINO = GitHub("facebookresearch/dino", "7c446df5b9f45747937fb0d72314eb9f7b66930a")
VJEPA2 = GitHub("facebookresearch/vjepa2", "c2963a47433ecca0ad4f06ec28bcfa8cb5b5cefb")

V2 = "dinov2.models.vision_transformer"
V3 = "dinov3.models.vision_transformer"
RUN = features_of(2, 28, 42)
RUN_V3 = features_of(2, 32, 48)
JAXTYPING = ("jaxtyping==0.3.11", "wadler-lindig==0.1.8")


def run_five_channels(model: Any) -> Any:
    return model.get_intermediate_layers(images(2, 28, 42, channels=5), n=2)


def run_intermediate(model: Any) -> Any:
    return model.get_intermediate_layers(images(2, 32, 48), n=2, reshape=True)


def crops(batch: int) -> Callable[[Any], Any]:
    """Return a run with two crops of different sizes in one list."""

    def run(model: Any) -> Any:
        pair = [images(batch, 32, 48), images(batch, 32, 32, seed=2)]
        return model.forward_features(pair, [None, None])

    return run


def training(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return ``run`` in training mode, with the same random numbers in every call."""

    def seeded(model: Any) -> Any:
        model.train()
        torch.manual_seed(0)
        return run(model)

    return seeded


def autocast(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return ``run`` under autocast to bfloat16."""

    def cast(model: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return run(model)

    return cast


def build_text() -> nn.Module:
    cls = imported("dinov3.eval.text.text_transformer", "TextTransformer")
    size = {"context_length": 8, "vocab_size": 16, "dim": 48, "num_heads": 3, "num_layers": 2}
    return sharp(cls(**size, ffn_ratio=2.0, is_causal=True))


def run_text(model: Any) -> Any:
    return model(torch.arange(16).reshape(2, 8))


def build_vjepa2() -> nn.Module:
    cls = imported("src.models.vision_transformer", "VisionTransformer")
    size = {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return sharp(cls(img_size=(32, 48), **size, use_sdpa=False, use_rope=True))


def build_capi() -> nn.Module:
    transformer = {"embed_dim": 48, "depth": 2, "drop_path_rate": 0.0}
    model = imported("model", "EncoderDecoder")(
        n_registers=4,
        transformers_kwargs={"block_kwargs": {"attn_kwargs": {"num_heads": 3}}},
        encoder_kwargs=transformer,
        decoder_kwargs=transformer,
    )
    built = sharp(model)
    for module in model.modules():  # the rotation's parameters are frequencies, not noise
        if hasattr(module, "freqs"):
            module._device_weight_init()
    return built


TARGETS = [
    Target("dinov2", DINOV2, "upstream", dinov2(V2), RUN),
    Target(
        "dinov2-chunks",
        DINOV2,
        "upstream, registers, blocks in chunks",
        dinov2(V2, block_chunks=2, num_register_tokens=4),
        RUN,
    ),
    Target(
        "dinov2-training",
        DINOV2,
        "stochastic depth drops samples",
        dinov2(V2, drop_path_rate=0.4),
        training(features_of(8, 28, 42)),
    ),
    Target("dinov2-autocast", DINOV2, "bfloat16", dinov2(V2), autocast(RUN)),
    Target(
        "dinov2-channel-adaptive",
        DINOV2_OF_2026,
        "channels go into the batch",
        dinov2(V2, in_chans=1, channel_adaptive=True),
        run_five_channels,
    ),
    Target("dinov3", DINOV3, "rotation, masked key bias, storage tokens", dinov3(V3), RUN_V3),
    Target(
        "dinov3-plain-bias",
        DINOV3,
        "rotation in float32, no storage tokens",
        dinov3(V3, mask_k_bias=False, n_storage_tokens=0, pos_embed_rope_dtype="fp32"),
        RUN_V3,
    ),
    Target(
        "dinov3-two-crops",
        DINOV3,
        "two crops in a list: two kernel calls for one layer",
        dinov3(V3),
        crops(2),
    ),
    Target("dinov3-intermediate", DINOV3, "get_intermediate_layers", dinov3(V3), run_intermediate),
    Target(
        "dinov3-training",
        DINOV3,
        "two crops and stochastic depth: forward_list, and never forward",
        dinov3(V3, drop_path_rate=0.4),
        training(crops(8)),
    ),
    Target("dinov3-autocast", DINOV3, "bfloat16", dinov3(V3), autocast(RUN_V3)),
    Target("dinov3-text", DINOV3, "causal", build_text, run_text, bare=("dinov3.eval.text",)),
    Target(
        "capi",
        CAPI,
        "separate projections, rotation, a predictor with cross attention",
        build_capi,
        stubs=("omegaconf", "rich.logging", "sklearn.decomposition", "sklearn.preprocessing"),
        needs=(*JAXTYPING, EINOPS),
    ),
    Target(
        "webssl",
        WEBSSL,
        "own get_last_selfattention",
        dinov2("dinov2.vision_transformer"),
        RUN,
        bare=("dinov2",),
    ),
    Target(
        "dino",
        DINO,
        "DINO of 2021: attention returns (x, attn), own get_last_selfattention",
        vit_of_2021("vision_transformer"),
        on_images(2, 32, 48),
    ),
    Target(
        "vjepa2",
        VJEPA2,
        "rotation over three axes, explicit softmax, no CLS",
        build_vjepa2,
        on_images(2, 32, 48),
        needs=(EINOPS,),
        bare=("src", "src.models"),
    ),
]
