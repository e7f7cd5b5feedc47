"""LightlyTrain: copies of DINOv2 and DINOv3, and task models around them."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.wild.builders import dinov2, dinov3, features_of, imported, on_images
from tests.wild.target import PyPI, Target
from tests.wild.weights import images, sharp

LIGHTLY = PyPI("lightly-train==0.18.0")
DINOV2 = "lightly_train._models.dinov2_vit.dinov2_vit_src"
DINOV3 = "lightly_train._models.dinov3.dinov3_src"
EOMT = "lightly_train._task_models.dinov2_eomt_semantic_segmentation.task_model"
BARE = (
    "lightly_train",
    "lightly_train._export",
    "lightly_train._models",
    "lightly_train._models.dinov2_vit",
    DINOV2,
    "lightly_train._models.dinov3",
    DINOV3,
)
# What reads "${...}" in configurations: its own dependency is no wheel on PyPI.
GRAMMAR = "omegaconf.grammar.gen.OmegaConfGrammar"
EOMT_STUBS = (
    *("pytorch_lightning.utilities", "lightly.transforms.utils", "antlr4.error.ErrorListener"),
    *(f"{GRAMMAR}{part}" for part in ("Lexer", "Parser", "ParserListener", "ParserVisitor")),
)


def build_ecvit() -> nn.Module:
    cls = imported("lightly_train._models.ecvit.ecvit", "VisionTransformer")
    return sharp(cls(embed_dim=48, depth=2, num_heads=3, return_layers=[0, 1]))


def build_eomt() -> nn.Module:
    model = imported(EOMT, "DINOv2EoMTSemanticSegmentation")(
        model_name="dinov2/_vittest14-eomt",
        classes={0: "a", 1: "b"},
        class_ignore_index=None,
        image_size=(28, 28),
        image_normalize={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
        num_queries=3,
        num_joint_blocks=1,
        backbone_args={"img_size": 28},
        load_weights=False,
    )
    return sharp(model)


def run_eomt(model: Any) -> Any:
    return model.forward_train(images(2, 28, 28), return_logits_per_layer=False)


TARGETS = [
    Target(
        "lightly-dinov2",
        LIGHTLY,
        "explicit softmax",
        dinov2(f"{DINOV2}.models.vision_transformer"),
        features_of(2, 28, 42),
        bare=BARE,
    ),
    Target(
        "lightly-dinov3",
        LIGHTLY,
        "rotation, masked key bias, storage tokens",
        dinov3(f"{DINOV3}.models.vision_transformer"),
        features_of(2, 32, 48),
        bare=BARE,
    ),
    Target(
        "lightly-ecvit",
        LIGHTLY,
        "rotation given as an argument; one register and no CLS",
        build_ecvit,
        on_images(2, 32, 48),
        bare=BARE,
    ),
    Target(
        "lightly-eomt",
        LIGHTLY,
        "the task model calls the kernel itself, with a mask; queries before CLS",
        build_eomt,
        run_eomt,
        bare=BARE,
        stubs=EOMT_STUBS,
        needs=("omegaconf==2.3.0",),
    ),
]
