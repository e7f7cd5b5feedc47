"""Other wheels of PyPI that vendor DINOv2's or DINOv3's classes."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.wild.builders import (
    EINOPS,
    dinov2,
    features_of,
    imported,
    on_views,
)
from tests.wild.target import PyPI, Target
from tests.wild.weights import images, sharp

RUN = features_of(2, 28, 42)
VISMATCH = PyPI("vismatch==1.4.0")
DEPTH_3 = "depth_anything_3.model.dinov2"
RFDETR = "rfdetr.models.backbone.dinov2_with_windowed_attn"


def build_romav2() -> nn.Module:
    model = imported("romav2.vit", "MatchTransformer")(
        in_dim=32,
        out_dim=32,
        use_rope=True,
        dim=48,
        depth=2,
        num_heads=3,
        ffn_ratio=2,
        multiview=True,
        mv_position_mode="same",
        mv_attention_mode="alternating",
    )
    model.init_weights()
    return sharp(model)


def run_romav2(model: Any) -> Any:
    """Call the model with a batch of two pairs of feature maps."""
    return model(images(2, 4, 3, channels=32).reshape(2, 32, 2, 2, 3).permute(0, 2, 3, 4, 1))


def build_rfdetr() -> nn.Module:
    config = imported(RFDETR, "WindowedDinov2WithRegistersConfig")(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=56,
        patch_size=14,
        num_windows=2,
        window_block_indexes=[0, 2],
        out_features=["stage2", "stage3"],
    )
    return sharp(imported(RFDETR, "WindowedDinov2WithRegistersBackbone")(config))


def run_rfdetr(model: Any) -> Any:
    return model(images(2, 56, 56)).feature_maps


TARGETS = [
    Target(
        "kornia",
        PyPI("kornia==0.9.0"),
        "explicit softmax; no bias in the signature",
        dinov2("kornia.feature.dedode.transformer.dinov2"),
        RUN,
        bare=("kornia", "kornia.feature", "kornia.feature.dedode"),
    ),
    Target(
        "romav2",
        PyPI("romav2==2.0.1"),
        "DINOv3's blocks over pairs of images, the rotation in every second one",
        build_romav2,
        run_romav2,
        bare=("romav2",),
        needs=(EINOPS,),
    ),
    Target(
        "rfdetr",
        PyPI("rfdetr==1.11.2"),
        "transformers' older class, windows",
        build_rfdetr,
        run_rfdetr,
        bare=("rfdetr", "rfdetr.models", "rfdetr.models.backbone"),
    ),
    Target(
        "dinocell",
        PyPI("dinocell==0.74"),
        "own return_attn, passed on as is_causal",
        dinov2("dinov2.dinov2.models.vision_transformer"),
        RUN,
        path="dinocell",
    ),
    Target(
        "vismatch-loma",
        VISMATCH,
        "SDPA; no bias in the signature",
        dinov2("loma.descriptor.transformer.dinov2"),
        RUN,
        path="vismatch/third_party/LoMa/src",
        bare=("loma", "loma.descriptor", "loma.descriptor.transformer"),
    ),
    Target(
        "vismatch-dedode",
        VISMATCH,
        "explicit softmax",
        dinov2("DeDoDe.transformer.dinov2"),
        RUN,
        path="vismatch/third_party/DeDoDe",
        bare=("DeDoDe", "DeDoDe.transformer"),
    ),
    Target(
        "romatch",
        PyPI("romatch==0.1.2"),
        "SDPA",
        dinov2("romatch.models.transformer.dinov2"),
        RUN,
        bare=("romatch", "romatch.models", "romatch.models.transformer"),
    ),
    Target(
        "jkp-depth-anything-v2",
        PyPI("jkp-depth-anything-v2==0.1.1"),
        "explicit softmax",
        dinov2("depth_anything_v2.dinov2"),
        RUN,
        bare=("depth_anything_v2",),
    ),
    Target(
        "dlr-moge",
        PyPI("dlr-moge==2.0.0"),
        "SDPA",
        dinov2("moge.model.dinov2.models.vision_transformer"),
        RUN,
        bare=("moge", "moge.model"),
    ),
    Target(
        "depth-anything-3",
        PyPI("depth-anything-3==0.1.1"),
        "q/k norm and rotation from block 1 on, pairs of views",
        dinov2(
            f"{DEPTH_3}.vision_transformer",
            alt_start=1,
            qknorm_start=1,
            rope_start=1,
            cat_token=False,
        ),
        on_views,
        bare=("depth_anything_3", "depth_anything_3.model", DEPTH_3),
        needs=(EINOPS,),
    ),
]
