"""Self-supervision, segmentation, anomalies and other tasks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.wild.builders import (
    BLOCK,
    DINOV2,
    EINOPS,
    dinov2,
    features_of,
    imported,
    on_images,
    vit_of_2021,
)
from tests.wild.target import GitHub, Target
from tests.wild.weights import images, sharp

NECO = GitHub("vpariza/NeCo", "393216026b4d045e2e0b803f70a7d89d9a58937e")
SIMDINO = GitHub("RobinWu218/SimDINO", "8149fc4ed8ee3fd97b7bde900447414e6669e71b")
UNIC = GitHub("naver/unic", "02269dbfa2935d53ba7cef76c29d5453333d9ba7")
SIGN2GPT = GitHub("ryanwongsa/Sign2GPT", "55559355772fd074f73c39e32513af3468613b99")
REGISTERS = GitHub("nickjiang2378/test-time-registers", "860df43515c8d8e9e90952af25a46c26e4469570")
RADIO = GitHub("NVlabs/RADIO", "c0f37017930e9dda53f93424cf4bf39fc51f287e")
DINOMALY = GitHub("guojiajeremy/Dinomaly", "c5c76d01a2bd7212f1c4b7dfdad14902d0f48cfe")
REIN = GitHub("w1oves/Rein", "7da85bcbc36cae6bd6467408cf5fb71fdbbd828c")
PANOPTICON = GitHub("Panopticon-FM/panopticon", "5ad7f82f9d4aa303e630f86d22e3f27304511f29")
FRANCA = GitHub("valeoai/Franca", "24f8c60ab24c465b861e46fc3f02c4238db37cf1")
IBOT = GitHub("bytedance/ibot", "da316d82636a7a7356835ef224b13d5f3ace0489")

VIT = "dinov2.models.vision_transformer"
RUN = features_of(2, 28, 42)
LORA = {"w_lora": True, "w_lora_ff": True, "lora_rank": 4, "lora_a": 8.0, "lora_drop": 0.0}
REIN_STUBS = ("mmseg.models.builder", "mmengine.model", "mmengine.logging")
REIN_BARE = ("rein", "rein.models", "rein.models.backbones")


def build_dinomaly(mask_neighbor_size: int) -> nn.Module:
    attention = imported("models.vision_transformer", "Attention")
    block = partial(imported("models.vision_transformer", "Block"), **BLOCK, attn=attention)
    model = imported("models.uad", "ViTill")(
        encoder=imported(VIT, "DinoVisionTransformer")(**DINOV2),
        bottleneck=nn.ModuleList([nn.Identity()]),
        decoder=nn.ModuleList([block(qkv_bias=True) for _ in range(2)]),
        target_layers=[0, 1],
        fuse_layer_encoder=[[0, 1]],
        fuse_layer_decoder=[[0, 1]],
        mask_neighbor_size=mask_neighbor_size,
    )
    return sharp(model)


def build_rein(with_reins: bool) -> nn.Module:
    """Build Rein's ViT, with stand-ins for mmengine's base class and mmseg's registries."""
    registries = {"BACKBONES": _Registry(), "MODELS": _Registry()}
    vars(sys.modules["mmengine.model"])["BaseModule"] = _BaseModule
    vars(sys.modules["mmseg.models.builder"]).update(registries)
    cls = imported("rein.models.backbones.reins_dinov2", "ReinsDinoVisionTransformer")
    options = {**DINOV2, "out_indices": [0, 1]}
    if not with_reins:
        return sharp(cls.__mro__[1](**options))
    reins = {"num_layers": 2, "embed_dims": 48, "patch_size": 14, "token_length": 5}
    return sharp(cls(reins_config={"type": "Reins", **reins}, **options))


class _Registry(dict[str, Any]):
    def register_module(self) -> Callable[[type], type]:
        return lambda cls: self.setdefault(cls.__name__, cls)

    def build(self, config: dict[str, Any]) -> Any:
        options = dict(config)
        return self[options.pop("type")](**options)


class _BaseModule(nn.Module):
    def __init__(self, init_cfg: Any = None) -> None:
        super().__init__()


def build_panopticon() -> nn.Module:
    channels = {"attn_dim": 48, "chnfus_cfg": {"attn_cfg": {"num_heads": 3}}}
    return dinov2(VIT, embed_layer="PanopticonPE", pe_args=channels)()


def run_panopticon(model: Any) -> Any:
    channels = torch.tensor([[450.0, 550.0, 650.0, -1.0]]).repeat(2, 1)  # nm; -1 is radar
    return model.forward_features({"imgs": images(2, 28, 28, channels=4), "chn_ids": channels})


TARGETS = [
    Target(
        "neco",
        NECO,
        "own return_attn and get_last_selfattention",
        dinov2("src.models.vit_v2", output_dim=8, hidden_dim=8),
        RUN,
        bare=("src", "src.models"),
    ),
    Target(
        "simdino",
        SIMDINO,
        "q/k norm off",
        dinov2("simdinov2.models.vision_transformer"),
        RUN,
        needs=(EINOPS,),
    ),
    Target(
        "simdino-qknorm",
        SIMDINO,
        "q/k norm on",
        dinov2("simdinov2.models.vision_transformer", qknorm=True),
        RUN,
        needs=(EINOPS,),
    ),
    Target("unic", UNIC, "no attribute scale", dinov2(VIT), RUN),
    Target("unic-qknorm", UNIC, "q/k norm on", dinov2(VIT, qk_norm=True), RUN),
    Target(
        "sign2gpt",
        SIGN2GPT,
        "LoRA off",
        dinov2("models.dinov2.model.vision_transformer"),
        RUN,
    ),
    Target(
        "sign2gpt-lora",
        SIGN2GPT,
        "LoRA on in every block",
        dinov2("models.dinov2.model.vision_transformer", adaptor_layers=[0, 1], adapt_params=LORA),
        RUN,
    ),
    Target(
        "test-time-registers",
        REGISTERS,
        "registers behind the patches",
        dinov2(VIT, num_register_tokens=4),
        RUN,
        path="dinov2",
    ),
    Target(
        "radio-dinov2",
        RADIO,
        "one file, SDPA by a flag",
        dinov2("radio.dinov2_arch", num_register_tokens=4),
        RUN,
        bare=("radio",),
    ),
    Target(
        "dinomaly",
        DINOMALY,
        "attention returns (x, attn); a decoder of another class",
        partial(build_dinomaly, 0),
        on_images(2, 42, 42),
        stubs=("sklearn.cluster",),
    ),
    Target(
        "dinomaly-neighbours",
        DINOMALY,
        "the decoder writes zeros into the weights after the softmax",
        partial(build_dinomaly, 1),
        on_images(2, 42, 42),
        stubs=("sklearn.cluster",),
    ),
    Target(
        "rein-plain",
        REIN,
        "forward_features returns a list",
        partial(build_rein, False),
        RUN,
        stubs=REIN_STUBS,
        bare=REIN_BARE,
    ),
    Target(
        "rein",
        REIN,
        "attention to learned tokens after every block, outside any module's call",
        partial(build_rein, True),
        RUN,
        stubs=REIN_STUBS,
        bare=REIN_BARE,
    ),
    Target(
        "panopticon",
        PANOPTICON,
        "a dict of images; cross attention over channels before the blocks",
        build_panopticon,
        run_panopticon,
    ),
    Target("franca", FRANCA, "explicit softmax", dinov2("franca.models.vision_transformer"), RUN),
    Target(
        "ibot",
        IBOT,
        "attention returns (x, attn), own get_last_selfattention",
        vit_of_2021("models.vision_transformer"),
        on_images(2, 32, 48),
    ),
]
