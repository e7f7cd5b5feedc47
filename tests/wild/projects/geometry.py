"""Depth and geometry: Depth Anything, UniDepth, Metric3D, VGGT, Pi3, MoGe and their copies."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from tests.wild.builders import (
    BLOCK,
    EINOPS,
    WithPositions,
    dinov2,
    dinov3,
    features_of,
    imported,
    on_images,
    on_tokens,
    on_views,
)
from tests.wild.target import GitHub, Target
from tests.wild.weights import images, sharp

UNIDEPTH = GitHub("lpiccinelli-eth/UniDepth", "8d8cfe4c7ee15297099983607febf0d4f32eb3d6")
PI3 = GitHub("yyfz/Pi3", "9fa3ddb3f8d53041f8b2738df404f62223bbaa7b")
METRIC3D = GitHub("YvanYin/Metric3D", "eb5b6fac0dc155e4e52f576e304fbf11655ff339")
STREAMVGGT = GitHub("wzzheng/StreamVGGT", "3e28c5c5d31128cc45a2f4832245664cb899d764")
DEPTH_1 = GitHub("LiheYoung/Depth-Anything", "1d03336771fe09c5398ffdd211441e33941a97dc")
DEPTH_2 = GitHub("DepthAnything/Depth-Anything-V2", "a561b849ebae10a6f5ef49e26c83cbbcd36c71bf")
DEPTH_3 = GitHub("ByteDance-Seed/Depth-Anything-3", "2c21ea849ceec7b469a3e62ea0c0e270afc3281a")
PROMPTDA = GitHub("DepthAnything/PromptDA", "b05523cf9c27e2dbce578b9003a8906bf8ed2eb3")
DISTILL = GitHub("Westlake-AGI-Lab/Distill-Any-Depth", "6d8f415392eafb49c96a38cc4dedbd09a1607f50")
UNIK3D = GitHub("lpiccinelli-eth/UniK3D", "29f7862f3c3ee79c53ef0153dfc901ce511df575")
VIDEO = GitHub("DepthAnything/Video-Depth-Anything", "4f5ae23172ba60fd7bc11ef671cca678842c7072")
OMEGA = GitHub("facebookresearch/vggt-omega", "39a0cb8af88554f15ddcb5354cd52bde588fa014")
MOGE = GitHub("microsoft/MoGe", "07444410f1e33f402353b99d6ccd26bd31e469e8")

RUN = features_of(2, 28, 42)
HUB = "torchhub/facebookresearch_dinov2_main"
VIT = "distillanydepth.modeling.backbones.vit"
DISTILL_BARE = (
    "distillanydepth",
    "distillanydepth.modeling",
    "distillanydepth.modeling.backbones",
    VIT,
)
DEPTH_3_VIT = "depth_anything_3.model.dinov2"


def build_pi3_decoder() -> nn.Module:
    block = imported("pi3.models.layers.block", "BlockRope")
    attention = imported("pi3.models.layers.attention", "FlashAttentionRope")
    rope = imported("pi3.models.layers.pos_embed", "RoPE2D")()
    options = {**BLOCK, "qk_norm": True, "qkv_bias": True, "rope": rope}
    blocks = [block(**options, attn_class=attention) for _ in range(2)]
    return sharp(WithPositions(blocks, "xpos"))


def build_vggt_blocks(package: str) -> nn.Module:
    block = imported(f"{package}.layers.block", "Block")
    rope = imported(f"{package}.layers.rope", "RotaryPositionEmbedding2D")()
    blocks = [block(**BLOCK, qk_norm=True, rope=rope, init_values=1.0) for _ in range(2)]
    return sharp(WithPositions(blocks, "pos"))


def build_unidepth_decoder() -> nn.Module:
    block = imported("unidepth.layers.attention", "AttentionBlock")
    return sharp(nn.Sequential(*(block(**BLOCK) for _ in range(2))))


def build_motion(slice_size: int | None) -> nn.Module:
    attention = imported("video_depth_anything.motion_module.attention", "CrossAttention")
    layer = attention(query_dim=48, heads=3, dim_head=16)
    layer.set_attention_slice(slice_size)
    return sharp(nn.Sequential(layer))


def build_moge() -> nn.Module:
    model = imported("moge.model.modules", "DINOv2Encoder")(
        "dinov2_vits14", intermediate_layers=2, dim_out=8
    )
    model.backbone.blocks = model.backbone.blocks[:2]
    model.enable_pytorch_native_sdpa()
    return sharp(model)


def run_moge(model: Any) -> Any:
    return model(images(2, 28, 42), 2, 3)


TARGETS = [
    Target(
        "unidepth",
        UNIDEPTH,
        "SDPA; no bias in Attention; forward returns lists",
        dinov2("unidepth.models.backbones.dinov2", output_idx=[1, 2]),
        bare=("unidepth", "unidepth.models", "unidepth.models.backbones"),
    ),
    Target(
        "unidepth-decoder",
        UNIDEPTH,
        "projections q and kv; the block itself calls the kernel",
        build_unidepth_decoder,
        on_tokens,
        bare=("unidepth", "unidepth.layers", "unidepth.utils"),
        stubs=("scipy.interpolate",),
        needs=(EINOPS,),
    ),
    Target(
        "pi3",
        PI3,
        "attn_bias in the signature is ignored",
        dinov2("pi3.models.dinov2.models.vision_transformer"),
        RUN,
        bare=("pi3", "pi3.models"),
    ),
    Target(
        "pi3-decoder",
        PI3,
        "q/k norm, rotation, sdpa_kernel([MATH])",
        build_pi3_decoder,
        on_tokens,
        bare=("pi3", "pi3.models", "pi3.models.layers"),
        needs=(EINOPS,),
    ),
    Target(
        "metric3d",
        METRIC3D,
        "one file; attn_bias given on by the block",
        dinov2("mono.model.backbones.ViT_DINO_reg", num_register_tokens=4),
        RUN,
        path="training",
        bare=("mono", "mono.model", "mono.model.backbones"),
    ),
    Target(
        "vggt-vit",
        STREAMVGGT,
        "VGGT's ViT: q/k norm off, rope None",
        dinov2("vggt.layers.vision_transformer", num_register_tokens=4),
        RUN,
        path="src",
        needs=(EINOPS,),
    ),
    Target(
        "vggt-vit-qknorm",
        STREAMVGGT,
        "VGGT's ViT: q/k norm on",
        dinov2("vggt.layers.vision_transformer", qk_norm=True),
        RUN,
        path="src",
        needs=(EINOPS,),
    ),
    Target(
        "vggt-aggregator",
        STREAMVGGT,
        "VGGT's blocks: q/k norm, rotation",
        partial(build_vggt_blocks, "vggt"),
        on_tokens,
        path="src",
        needs=(EINOPS,),
    ),
    Target(
        "streamvggt",
        STREAMVGGT,
        "the same, with arguments for masks and a cache of keys",
        partial(build_vggt_blocks, "streamvggt"),
        on_tokens,
        path="src",
        needs=(EINOPS,),
    ),
    Target(
        "depth-anything-v1",
        DEPTH_1,
        "the ViT is a module outside its package",
        dinov2("vision_transformer"),
        RUN,
        path=HUB,
    ),
    Target(
        "depth-anything-v2",
        DEPTH_2,
        "explicit softmax, registers",
        dinov2("depth_anything_v2.dinov2", num_register_tokens=4),
        RUN,
        bare=("depth_anything_v2",),
    ),
    Target(
        "depth-anything-3-main",
        DEPTH_3,
        "q/k norm and rotation from block 1 on, pairs of views",
        dinov2(
            f"{DEPTH_3_VIT}.vision_transformer",
            alt_start=1,
            qknorm_start=1,
            rope_start=1,
            cat_token=False,
        ),
        on_views,
        path="src",
        bare=("depth_anything_3", "depth_anything_3.model", DEPTH_3_VIT),
        needs=(EINOPS,),
    ),
    Target(
        "promptda",
        PROMPTDA,
        "the ViT is a module outside its package",
        dinov2("vision_transformer"),
        RUN,
        path=HUB,
    ),
    Target(
        "distill-any-depth",
        DISTILL,
        "a copy of Depth Anything V2's",
        dinov2(f"{VIT}.dinov2"),
        RUN,
        bare=DISTILL_BARE,
    ),
    Target(
        "distill-any-depth-reg",
        DISTILL,
        "Metric3D's file; a tuning mode that is off",
        dinov2(f"{VIT}.ViT_DINO_reg", num_register_tokens=4),
        on_images(2, 28, 42, is_training=True),
        bare=DISTILL_BARE,
    ),
    Target(
        "distill-any-depth-ssf",
        DISTILL,
        "tuning mode ssf: scale and shift behind the projection",
        dinov2(f"{VIT}.ViT_DINO_reg", num_register_tokens=4, tuning_mode="ssf"),
        on_images(2, 28, 42, is_training=True),
        bare=DISTILL_BARE,
    ),
    Target(
        "moge-2",
        MOGE,
        "the class of each block's attention is swapped",
        build_moge,
        run_moge,
        bare=("moge", "moge.model"),
        stubs=("cv2", "utils3d", "scipy.signal", "scipy.sparse", "scipy.optimize"),
    ),
    Target(
        "unik3d",
        UNIK3D,
        "as UniDepth, with Identity for dropout",
        dinov2("unik3d.models.backbones.dinov2", output_idx=[1, 2]),
        bare=("unik3d", "unik3d.models", "unik3d.models.backbones"),
    ),
    Target(
        "video-depth-anything",
        VIDEO,
        "a copy of Depth Anything V2's",
        dinov2("video_depth_anything.dinov2"),
        RUN,
    ),
    Target(
        "video-depth-anything-motion",
        VIDEO,
        "to_q, to_k, to_v; heads in the batch; softmax with baddbmm and bmm",
        partial(build_motion, None),
        on_tokens,
    ),
    Target(
        "video-depth-anything-slices",
        VIDEO,
        "the same in slices: three kernel calls in one forward",
        partial(build_motion, 2),
        on_tokens,
    ),
    Target(
        "vggt-omega",
        OMEGA,
        "a copy of DINOv3's",
        dinov3("vggt_omega.models.layers.vision_transformer"),
        features_of(2, 32, 48),
        bare=("vggt_omega", "vggt_omega.models"),
    ),
]
