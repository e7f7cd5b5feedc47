"""Targets that PyPI serves: wheels, and the libraries that the tests install themselves."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tests.wild.builders import EINOPS, DINOV2, dinov2, dinov3, features_of, made_by, on_images
from tests.wild.target import Installed, PyPI, Target
from tests.wild.weights import images, sharp


KORNIA = PyPI("kornia==0.9.0")
LIGHTLY = PyPI("lightly-train==0.18.0")
ROMAV2 = PyPI("romav2==2.0.1")
RFDETR = PyPI("rfdetr==1.11.2")
DINOCELL = PyPI("dinocell==0.74")
VISMATCH = PyPI("vismatch==1.4.0")
TIMM = Installed("timm")
TRANSFORMERS = Installed("transformers")

LIGHTLY_DINOV2 = "lightly_train._models.dinov2_vit.dinov2_vit_src"
LIGHTLY_DINOV3 = "lightly_train._models.dinov3.dinov3_src"
LIGHTLY_BARE = (
    "lightly_train",
    "lightly_train._export",
    "lightly_train._models",
    "lightly_train._models.dinov2_vit",
    LIGHTLY_DINOV2,
    "lightly_train._models.dinov3",
    LIGHTLY_DINOV3,
)

# What reads "${...}" in configurations: its own dependency is no wheel on PyPI.
GRAMMAR = "omegaconf.grammar.gen.OmegaConfGrammar"
EOMT_STUBS = (
    *("pytorch_lightning.utilities", "lightly.transforms.utils", "antlr4.error.ErrorListener"),
    *(f"{GRAMMAR}{part}" for part in ("Lexer", "Parser", "ParserListener", "ParserVisitor")),
)


def build_ecvit() -> nn.Module:
    from lightly_train._models.ecvit.ecvit import VisionTransformer

    return sharp(VisionTransformer(embed_dim=48, depth=2, num_heads=3, return_layers=[0, 1]))


def build_eomt() -> nn.Module:
    from lightly_train._task_models.dinov2_eomt_semantic_segmentation.task_model import (
        DINOv2EoMTSemanticSegmentation,
    )

    model = DINOv2EoMTSemanticSegmentation(
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


def build_timm(name: str, **options: Any) -> nn.Module:
    import timm

    model = timm.create_model(
        name, pretrained=False, img_size=32, embed_dim=48, depth=2, num_heads=3, **options
    )
    return sharp(model)


def build_transformers(name: str, implementation: str) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=16,
        attn_implementation=implementation,
    )
    return sharp(getattr(transformers, f"{name}Model")(config))


def build_romav2() -> nn.Module:
    from romav2.vit import MatchTransformer

    model = MatchTransformer(
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


def run_romav2(model: nn.Module) -> Any:
    return model(images(2, 2 * 2, 3, channels=32).unflatten(2, (2, 2)).permute(0, 2, 3, 4, 1))


def build_rfdetr() -> nn.Module:
    from rfdetr.models.backbone.dinov2_with_windowed_attn import (
        WindowedDinov2WithRegistersBackbone,
        WindowedDinov2WithRegistersConfig,
    )

    config = WindowedDinov2WithRegistersConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=56,
        patch_size=14,
        num_windows=2,
        window_block_indexes=[0, 2],
        out_features=["stage2", "stage3"],
    )
    return sharp(WindowedDinov2WithRegistersBackbone(config))


def run_rfdetr(model: Any) -> Any:
    return model(images(2, 56, 56)).feature_maps


def build_loma() -> nn.Module:
    return dinov2("loma.descriptor.transformer.dinov2", block_chunks=0)()


def hidden_of(height: int, width: int) -> Any:
    """Return a run of a model of transformers, for its last hidden state."""

    def run(model: nn.Module) -> Tensor:
        state: Tensor = model(images(2, height, width)).last_hidden_state
        return state

    return run


def run_views(model: Any) -> Any:
    """Call a model of several views with two scenes of two images each."""
    return model.get_intermediate_layers(images(4, 28, 42).unflatten(0, (2, 2)), n=2)


def _timm(name: str, differs: str, **options: Any) -> Target:
    return Target(
        f"timm-{name.removeprefix('vit_small_')}",
        TIMM,
        differs,
        lambda: build_timm(name, **options),
        on_images(2, 32, 32),
    )


def _transformers(name: str, implementation: str, differs: str) -> Target:
    return Target(
        f"transformers-{name.lower()}-{implementation}",
        TRANSFORMERS,
        differs,
        lambda: build_transformers(name, implementation),
        hidden_of(32, 48),
    )


ON_PYPI = [
    Target(
        "kornia",
        KORNIA,
        "explicit softmax; no bias in the signature",
        dinov2("kornia.feature.dedode.transformer.dinov2", block_chunks=0),
        features_of(2, 28, 42),
        bare=("kornia", "kornia.feature", "kornia.feature.dedode"),
    ),
    Target(
        "lightly-dinov2",
        LIGHTLY,
        "own SDPA branch",
        dinov2(f"{LIGHTLY_DINOV2}.models.vision_transformer", block_chunks=0),
        features_of(2, 28, 42),
        bare=LIGHTLY_BARE,
    ),
    Target(
        "lightly-dinov3",
        LIGHTLY,
        "rotation, masked key bias, storage tokens",
        dinov3(f"{LIGHTLY_DINOV3}.models.vision_transformer"),
        features_of(2, 32, 48),
        bare=LIGHTLY_BARE,
    ),
    Target(
        "lightly-ecvit",
        LIGHTLY,
        "rotation given as an argument; one register and no CLS",
        build_ecvit,
        on_images(2, 32, 48),
        bare=LIGHTLY_BARE,
    ),
    Target(
        "lightly-eomt",
        LIGHTLY,
        "the task model calls the kernel itself, with a mask; queries before CLS",
        build_eomt,
        run_eomt,
        bare=LIGHTLY_BARE,
        stubs=EOMT_STUBS,
        needs=("omegaconf==2.3.0",),
    ),
    _timm("vit_small_patch14_dinov2", "timm's class", patch_size=16),
    _timm("vit_small_patch14_reg4_dinov2", "timm's class, registers", patch_size=16),
    _timm("vit_small_patch16_dinov3", "timm's class Eva, rotation"),
    _transformers("Dinov2", "sdpa", "transformers' class"),
    _transformers("Dinov2", "eager", "transformers' class, explicit softmax"),
    _transformers("Dinov2WithRegisters", "sdpa", "transformers' class, registers"),
    _transformers("Dinov2WithRegisters", "eager", "the same, explicit softmax"),
    _transformers("DINOv3ViT", "sdpa", "transformers' class, rotation"),
    _transformers("DINOv3ViT", "eager", "the same, explicit softmax"),
    Target(
        "romav2",
        ROMAV2,
        "DINOv3's blocks over pairs of images, the rotation in every second one",
        build_romav2,
        run_romav2,
        bare=("romav2",),
        needs=(EINOPS,),
    ),
    Target(
        "rfdetr",
        RFDETR,
        "transformers' older class, windows",
        build_rfdetr,
        run_rfdetr,
        bare=("rfdetr", "rfdetr.models", "rfdetr.models.backbone"),
    ),
    Target(
        "dinocell",
        DINOCELL,
        "own return_attn, passed on as is_causal",
        dinov2("dinov2.dinov2.models.vision_transformer", block_chunks=0),
        features_of(2, 28, 42),
        path="dinocell",
    ),
    Target(
        "vismatch-loma",
        VISMATCH,
        "SDPA, no bias in the signature",
        build_loma,
        features_of(2, 28, 42),
        path="vismatch/third_party/LoMa/src",
        bare=("loma", "loma.descriptor", "loma.descriptor.transformer"),
    ),
    Target(
        "vismatch-dedode",
        VISMATCH,
        "explicit softmax",
        dinov2("DeDoDe.transformer.dinov2", block_chunks=0),
        features_of(2, 28, 42),
        path="vismatch/third_party/DeDoDe",
        bare=("DeDoDe", "DeDoDe.transformer"),
    ),
    Target(
        "romatch",
        PyPI("romatch==0.1.2"),
        "explicit softmax",
        dinov2("romatch.models.transformer.dinov2", block_chunks=0),
        features_of(2, 28, 42),
        bare=("romatch", "romatch.models", "romatch.models.transformer"),
    ),
    Target(
        "jkp-depth-anything-v2",
        PyPI("jkp-depth-anything-v2==0.1.1"),
        "explicit softmax",
        dinov2("depth_anything_v2.dinov2", block_chunks=0),
        features_of(2, 28, 42),
        bare=("depth_anything_v2",),
    ),
    Target(
        "dlr-moge",
        PyPI("dlr-moge==2.0.0"),
        "SDPA",
        dinov2("moge.model.dinov2.models.vision_transformer", block_chunks=0),
        features_of(2, 28, 42),
        bare=("moge", "moge.model"),
    ),
    Target(
        "depth-anything-3",
        PyPI("depth-anything-3==0.1.1"),
        "q/k norm and rotation from block 1 on, pairs of views",
        made_by(
            "depth_anything_3.model.dinov2.vision_transformer",
            **{**DINOV2, "init_values": 1.0},
            **{"alt_start": 1, "qknorm_start": 1, "rope_start": 1, "cat_token": False},
        ),
        run_views,
        bare=("depth_anything_3", "depth_anything_3.model", "depth_anything_3.model.dinov2"),
        needs=(EINOPS,),
    ),
]
