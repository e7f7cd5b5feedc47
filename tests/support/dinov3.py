"""DINOv3's code for the tests: LightlyTrain's copy from PyPI, and a checkout that a user names.

DINOv3 has a licence of its own (Meta's DINOv3 License), so nothing of it is in this repository.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dinov2_attn._download import fetch_wheel
from tests.support import upstreams

# A checkout of github.com/facebookresearch/dinov3.
CHECKOUT = os.environ.get("DINOV2_ATTN_DINOV3")

# No two sizes are the same, and heads of 16 channels: the rotation divides them by four.
SIZES: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 16,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
    "n_storage_tokens": 4,
    "layerscale_init": 1.0,
    "mask_k_bias": True,
}
IMAGES = torch.randn(2, 3, 32, 80, generator=torch.Generator().manual_seed(1))
CROPS = torch.randn(5, 3, 48, 32, generator=torch.Generator().manual_seed(2))
PREFIX, PATCHES = 5, 10


@dataclass(frozen=True)
class Dinov3:
    """One copy of DINOv3's code."""

    package: str
    bare: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.package.partition(".")[0]

    def load(self) -> Dinov3:
        """Make the code importable."""
        path: Path | str = CHECKOUT or ""
        if self.bare:
            path = fetch_wheel(upstreams.LIGHTLY.wheel)
        if str(path) not in sys.path:
            sys.path.append(str(path))
        for name in self.bare:
            upstreams._enter_bare(name, path)
        return self

    def module(self, name: str) -> ModuleType:
        """Import a module of the package: ``layers.attention``."""
        return importlib.import_module(f"{self.package}.{name}")

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the modules that define attention, blocks and models."""
        names = ("layers.attention", "layers.block", "models.vision_transformer")
        return tuple(f"{self.package}.{name}" for name in names)

    def build(self, **changes: Any) -> Any:
        """Return a small model in evaluation mode, with weights that make attention sharp."""
        cls = self.module("models.vision_transformer").DinoVisionTransformer
        model = cls(**{**SIZES, **changes})
        model.init_weights()
        with torch.no_grad():
            for seed, parameter in enumerate(model.parameters()):
                noise = torch.Generator().manual_seed(seed)
                parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.3)
        return model.eval()


LIGHTLY = Dinov3(
    "lightly_train._models.dinov3.dinov3_src",
    bare=(
        "lightly_train",
        "lightly_train._models",
        "lightly_train._models.dinov3",
        "lightly_train._models.dinov3.dinov3_src",
    ),
)
META = Dinov3("dinov3")
COPIES = (LIGHTLY, META) if CHECKOUT else (LIGHTLY,)


class Truth(TorchFunctionMode):
    """What the kernel is given inside: weights in float64 from queries and keys, call by call.

    Attributes:
        weights: The weights of each call.
        kept: The samples that stochastic depth keeps, draw by draw.

    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []
        self.kept: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "randperm":
            self.kept.append(out)
        if name == "scaled_dot_product_attention":
            query, key = (tensor.detach().to(out.dtype).double() for tensor in args[:2])
            causal = (kwargs or {}).get("is_causal", False)
            scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf)
            self.weights.append(scores.softmax(-1))
        return out
