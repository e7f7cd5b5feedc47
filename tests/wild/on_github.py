"""Targets from GitHub that keep DINOv2's or DINOv3's constructor."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.wild.builders import EINOPS, dinov2, dinov3, features_of, on_images
from tests.wild.target import GitHub, Target
from tests.wild.weights import images

DINOV2 = GitHub("facebookresearch/dinov2", "b8931f7bf91576930313be2c6d6af376033b35f0")
DINOV3 = GitHub("facebookresearch/dinov3", "6876159a11b4df116f30f667f8c9888617df0751")
UNIDEPTH = GitHub("lpiccinelli-eth/UniDepth", "8d8cfe4c7ee15297099983607febf0d4f32eb3d6")
PI3 = GitHub("yyfz/Pi3", "9fa3ddb3f8d53041f8b2738df404f62223bbaa7b")
NECO = GitHub("vpariza/NeCo", "393216026b4d045e2e0b803f70a7d89d9a58937e")
WEBSSL = GitHub("facebookresearch/webssl", "c85b60bbe8b8436f30316c7e28db1777475db3d9")
METRIC3D = GitHub("YvanYin/Metric3D", "eb5b6fac0dc155e4e52f576e304fbf11655ff339")
SIMDINO = GitHub("RobinWu218/SimDINO", "8149fc4ed8ee3fd97b7bde900447414e6669e71b")
STREAMVGGT = GitHub("wzzheng/StreamVGGT", "3e28c5c5d31128cc45a2f4832245664cb899d764")
UNIC = GitHub("naver/unic", "02269dbfa2935d53ba7cef76c29d5453333d9ba7")
SIGN2GPT = GitHub("ryanwongsa/Sign2GPT", "55559355772fd074f73c39e32513af3468613b99")
DEPTH_V1 = GitHub("LiheYoung/Depth-Anything", "1d03336771fe09c5398ffdd211441e33941a97dc")
DEPTH_V2 = GitHub("DepthAnything/Depth-Anything-V2", "a561b849ebae10a6f5ef49e26c83cbbcd36c71bf")
PROMPTDA = GitHub("DepthAnything/PromptDA", "b05523cf9c27e2dbce578b9003a8906bf8ed2eb3")
REGISTERS = GitHub(
    "nickjiang2378/test-time-registers", "860df43515c8d8e9e90952af25a46c26e4469570"
)
RADIO = GitHub("NVlabs/RADIO", "c0f37017930e9dda53f93424cf4bf39fc51f287e")
DISTILL = GitHub(
    "Westlake-AGI-Lab/Distill-Any-Depth", "6d8f415392eafb49c96a38cc4dedbd09a1607f50"
)

MODELS = "dinov2.models.vision_transformer"
PATCHES_OF_14 = features_of(2, 28, 42)
HUB = "torchhub/facebookresearch_dinov2_main"
LORA = {"w_lora": True, "lora_rank": 4, "lora_a": 8.0, "lora_drop": 0.0}


def run_two_crops(model: Any) -> Any:
    """Call a model of DINOv3 with two crops of different sizes in one list."""
    return model.forward_features([images(2, 32, 48), images(2, 32, 32, seed=2)], [None, None])


def run_blocks_of_v3(model: nn.Module) -> Any:
    return model.get_intermediate_layers(images(2, 32, 48), n=2, reshape=True)  # type: ignore[operator]


ON_GITHUB = [
    Target("dinov2", DINOV2, "upstream", dinov2(MODELS, block_chunks=0), PATCHES_OF_14),
    Target(
        "dinov2-chunks",
        DINOV2,
        "upstream, registers, blocks in chunks",
        dinov2(MODELS, block_chunks=2, num_register_tokens=4),
        PATCHES_OF_14,
    ),
    Target(
        "dinov3",
        DINOV3,
        "rotation, masked key bias, storage tokens",
        dinov3("dinov3.models.vision_transformer"),
        features_of(2, 32, 48),
    ),
    Target(
        "dinov3-plain-bias",
        DINOV3,
        "rotation in float32, no storage tokens",
        dinov3(
            "dinov3.models.vision_transformer",
            mask_k_bias=False,
            n_storage_tokens=0,
            pos_embed_rope_dtype="fp32",
        ),
        features_of(2, 32, 48),
    ),
    Target(
        "dinov3-two-crops",
        DINOV3,
        "two crops in a list: two kernel calls for one layer",
        dinov3("dinov3.models.vision_transformer"),
        run_two_crops,
    ),
    Target(
        "dinov3-intermediate",
        DINOV3,
        "get_intermediate_layers",
        dinov3("dinov3.models.vision_transformer"),
        run_blocks_of_v3,
    ),
    Target(
        "unidepth",
        UNIDEPTH,
        "SDPA, no bias in Attention; forward returns lists",
        dinov2("unidepth.models.backbones.dinov2", block_chunks=0, output_idx=[1, 2]),
        bare=("unidepth", "unidepth.models", "unidepth.models.backbones"),
    ),
    Target(
        "pi3",
        PI3,
        "attn_bias in the signature is ignored",
        dinov2("pi3.models.dinov2.models.vision_transformer", block_chunks=0),
        PATCHES_OF_14,
        bare=("pi3", "pi3.models"),
    ),
    Target(
        "neco",
        NECO,
        "own return_attn and get_last_selfattention",
        dinov2("src.models.vit_v2", output_dim=8, hidden_dim=8),
        PATCHES_OF_14,
        bare=("src", "src.models"),
    ),
    Target(
        "webssl",
        WEBSSL,
        "own get_last_selfattention",
        dinov2("dinov2.vision_transformer", block_chunks=0),
        PATCHES_OF_14,
        bare=("dinov2",),
    ),
    Target(
        "metric3d",
        METRIC3D,
        "one file, attn_bias given on",
        dinov2("mono.model.backbones.ViT_DINO_reg", num_register_tokens=4, block_chunks=0),
        PATCHES_OF_14,
        path="training",
        bare=("mono", "mono.model", "mono.model.backbones"),
    ),
    Target(
        "simdino",
        SIMDINO,
        "q/k norm off",
        dinov2("simdinov2.models.vision_transformer", block_chunks=0),
        PATCHES_OF_14,
        needs=(EINOPS,),
    ),
    Target(
        "simdino-qknorm",
        SIMDINO,
        "q/k norm on",
        dinov2("simdinov2.models.vision_transformer", block_chunks=0, qknorm=True),
        PATCHES_OF_14,
        needs=(EINOPS,),
    ),
    Target(
        "vggt-vit",
        STREAMVGGT,
        "VGGT's ViT: q/k norm off, rope None",
        dinov2("vggt.layers.vision_transformer", block_chunks=0, num_register_tokens=4),
        PATCHES_OF_14,
        path="src",
        needs=(EINOPS,),
    ),
    Target(
        "vggt-vit-qknorm",
        STREAMVGGT,
        "VGGT's ViT: q/k norm on",
        dinov2("vggt.layers.vision_transformer", block_chunks=0, qk_norm=True),
        PATCHES_OF_14,
        path="src",
        needs=(EINOPS,),
    ),
    Target(
        "unic",
        UNIC,
        "no attribute scale",
        dinov2(MODELS, block_chunks=0),
        PATCHES_OF_14,
    ),
    Target(
        "unic-qknorm",
        UNIC,
        "q/k norm on",
        dinov2(MODELS, block_chunks=0, qk_norm=True),
        PATCHES_OF_14,
    ),
    Target(
        "sign2gpt",
        SIGN2GPT,
        "LoRA off",
        dinov2("models.dinov2.model.vision_transformer", block_chunks=0),
        PATCHES_OF_14,
    ),
    Target(
        "sign2gpt-lora",
        SIGN2GPT,
        "LoRA on in every block",
        dinov2(
            "models.dinov2.model.vision_transformer",
            block_chunks=0,
            adaptor_layers=[0, 1],
            adapt_params={**LORA, "w_lora_ff": True},
        ),
        PATCHES_OF_14,
    ),
    Target(
        "depth-anything-v1",
        DEPTH_V1,
        "the ViT is a module outside its package",
        dinov2("vision_transformer", block_chunks=0),
        PATCHES_OF_14,
        path=HUB,
    ),
    Target(
        "depth-anything-v2",
        DEPTH_V2,
        "registers supported",
        dinov2("depth_anything_v2.dinov2", block_chunks=0, num_register_tokens=4),
        PATCHES_OF_14,
        bare=("depth_anything_v2",),
    ),
    Target(
        "promptda",
        PROMPTDA,
        "the ViT is a module outside its package",
        dinov2("vision_transformer", block_chunks=0),
        PATCHES_OF_14,
        path=HUB,
    ),
    Target(
        "test-time-registers",
        REGISTERS,
        "registers behind the patches",
        dinov2(MODELS, block_chunks=0, num_register_tokens=4),
        PATCHES_OF_14,
        path="dinov2",
    ),
    Target(
        "radio-dinov2",
        RADIO,
        "one file, SDPA by a flag",
        dinov2("radio.dinov2_arch", block_chunks=0, num_register_tokens=4),
        PATCHES_OF_14,
        bare=("radio",),
    ),
    Target(
        "distill-any-depth",
        DISTILL,
        "a copy of Depth Anything V2's",
        dinov2("distillanydepth.modeling.backbones.vit.dinov2", block_chunks=0),
        PATCHES_OF_14,
        bare=("distillanydepth", "distillanydepth.modeling", "distillanydepth.modeling.backbones",
              "distillanydepth.modeling.backbones.vit"),
    ),
    Target(
        "distill-any-depth-reg",
        DISTILL,
        "Metric3D's file",
        dinov2(
            "distillanydepth.modeling.backbones.vit.ViT_DINO_reg",
            block_chunks=0,
            num_register_tokens=4,
        ),
        on_images(2, 28, 42, is_training=True),
        bare=("distillanydepth", "distillanydepth.modeling", "distillanydepth.modeling.backbones",
              "distillanydepth.modeling.backbones.vit"),
    ),
]
