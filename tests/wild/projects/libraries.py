"""timm and transformers, which have classes of their own for DINOv2's and DINOv3's weights."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from tests.wild.builders import imported, on_images
from tests.wild.target import Installed, Target
from tests.wild.weights import images, sharp

TIMM = Installed("timm")
TRANSFORMERS = Installed("transformers")

IMPLEMENTATIONS = ("sdpa", "eager")
CLASSES = {
    "Dinov2": "transformers' class",
    "Dinov2WithRegisters": "transformers' class, registers",
    "DINOv3ViT": "transformers' class, rotation",
}


def build_timm(name: str, **options: Any) -> nn.Module:
    create = imported("timm", "create_model")
    return sharp(create(name, img_size=32, embed_dim=48, depth=2, num_heads=3, **options))


def build_transformers(name: str, implementation: str) -> nn.Module:
    config = imported("transformers", f"{name}Config")(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=16,
        attn_implementation=implementation,
    )
    return sharp(imported("transformers", f"{name}Model")(config))


def run_transformers(model: Any) -> Any:
    return model(images(2, 32, 48)).last_hidden_state


def _timm(name: str, differs: str, **options: Any) -> Target:
    build = partial(build_timm, f"vit_small_{name}", **options)
    return Target(f"timm-{name}", TIMM, differs, build, on_images(2, 32, 32))


def _transformers(name: str, implementation: str) -> Target:
    differs = CLASSES[name] + (", explicit softmax" if implementation == "eager" else "")
    build = partial(build_transformers, name, implementation)
    target = f"transformers-{name.lower()}-{implementation}"
    return Target(target, TRANSFORMERS, differs, build, run_transformers)


TARGETS = [
    _timm("patch14_dinov2", "timm's class", patch_size=16),
    _timm("patch14_reg4_dinov2", "timm's class, registers", patch_size=16),
    _timm("patch16_dinov3", "timm's class Eva, rotation"),
    *(_transformers(name, how) for name in CLASSES for how in IMPLEMENTATIONS),
]
