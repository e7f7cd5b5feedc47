"""Real upstream code for the tests: the first commit and forks of it, pinned, from PyPI.

Forks are loaded without their dependencies: the packages around the attention code are
entered as bare namespaces, so that their ``__init__`` (downloads, OpenCV, Lightning)
never runs. The attention code itself runs as it was published.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import inspect
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dinov2_attn._download import Wheel, fetch_wheel
from dinov2_attn.apps.weights.source import DINOV2_WHEEL

# The environment's way to run the same tests on a checkout in place of PyPI's first commit.
CHECKOUT = os.environ.get("DINOV2_ATTN_CHECKOUT")


@dataclass(frozen=True)
class Upstream:
    """Where one copy of the code keeps its parts, and what ``install`` is given for it."""

    name: str
    package: str
    attention: str
    block: str
    model: str | None
    wheel: Wheel
    bare: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def load(self) -> None:
        """Make the code importable; import nothing yet."""
        path = CHECKOUT if CHECKOUT and self.package == "dinov2" else fetch_wheel(self.wheel)
        if str(path) not in sys.path:
            sys.path.append(str(path))
        for package in self.bare:
            _enter_bare(package, path)

    def module(self, name: str) -> ModuleType:
        """Import one of this copy's modules, past its warnings about xFormers."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)

    @contextmanager
    def imported_anew(self) -> Iterator[None]:
        """Import this copy's modules again inside, as a process would that starts here."""
        before = self.purge()
        try:
            yield
        finally:
            self.purge()
            sys.modules.update(before)
            for name, module in before.items():  # what `import a.b as c` reads
                parent, _, child = name.rpartition(".")
                if parent:
                    setattr(sys.modules[parent], child, module)

    def purge(self) -> dict[str, ModuleType]:
        """Take this copy's modules out of ``sys.modules``, and return them by name."""
        return {name: sys.modules.pop(name) for name in list(sys.modules) if self._owns(name)}

    def _owns(self, module: str) -> bool:
        inside = module == self.package or module.startswith(f"{self.package}.")
        return inside and module not in self.bare

    @property
    def attentions(self) -> list[type]:
        """``Attention`` and ``MemEffAttention``."""
        module = self.module(self.attention)
        return [module.Attention, module.MemEffAttention]

    def cls(self, name: str) -> Any:
        """Return an attention, block or model class by upstream's name."""
        for module in filter(None, (self.attention, self.block, self.model)):
            if hasattr(self.module(module), name):
                return getattr(self.module(module), name)
        raise LookupError(f"{self.name} has no {name}")

    @property
    def has_registers(self) -> bool:
        return (
            "num_register_tokens" in inspect.signature(self.cls("DinoVisionTransformer")).parameters
        )


def _enter_bare(name: str, wheel: Path | str) -> None:
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [f"{wheel}/{name.replace('.', '/')}"]
        package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = package


FIRST = Upstream(
    "dinov2",
    "dinov2",
    "dinov2.layers.attention",
    "dinov2.layers.block",
    "dinov2.models.vision_transformer",
    DINOV2_WHEEL,
)
DEPTH_ANYTHING = Upstream(
    "depth-anything-v2",
    "depth_anything_v2",
    "depth_anything_v2.dinov2_layers.attention",
    "depth_anything_v2.dinov2_layers.block",
    "depth_anything_v2.dinov2",
    Wheel(
        "jkp-depth-anything-v2",
        "0.1.1",
        "864150e8f51c8b27ac96908922a36937868c63adb13c0a2e6ca47b44e2bf29f3",
    ),
    bare=("depth_anything_v2",),
)
MOGE = Upstream(
    "moge",
    "moge.model.dinov2",
    "moge.model.dinov2.layers.attention",
    "moge.model.dinov2.layers.block",
    "moge.model.dinov2.models.vision_transformer",
    Wheel("dlr-moge", "2.0.0", "395d27bfa2ec2f22749bb2aa63872cc2ce1da66408cee8d05651c98927858d1a"),
    bare=("moge", "moge.model"),
)
ROMA = Upstream(
    "roma",
    "romatch.models.transformer",
    "romatch.models.transformer.layers.attention",
    "romatch.models.transformer.layers.block",
    "romatch.models.transformer.dinov2",
    Wheel("romatch", "0.1.2", "4a9f1e21e9876aee471acddd0ae7092584d928a9f109b03a5344f859f5d67798"),
    bare=("romatch", "romatch.models", "romatch.models.transformer"),
)
# The newest era's classes, CausalAttentionBlock among them; no vision transformer.
ANOMALIB = Upstream(
    "anomalib",
    "anomalib.models.components.dinov2",
    "anomalib.models.components.dinov2.layers.attention",
    "anomalib.models.components.dinov2.layers.block",
    None,
    Wheel("anomalib", "2.7.0", "8b31490815670549a3901068addd0306856c174c032ba93388e7b37b90219332"),
    bare=(
        "anomalib",
        "anomalib.models",
        "anomalib.models.components",
        "anomalib.models.components.dinov2",
    ),
)
LIGHTLY = Upstream(
    "lightly-train",
    "lightly_train._models.dinov2_vit.dinov2_vit_src",
    "lightly_train._models.dinov2_vit.dinov2_vit_src.layers.attention",
    "lightly_train._models.dinov2_vit.dinov2_vit_src.layers.block",
    "lightly_train._models.dinov2_vit.dinov2_vit_src.models.vision_transformer",
    Wheel(
        "lightly-train",
        "0.18.0",
        "5786c355e7a7a9ba780b4a6e9bf7468b37415054a2a275a7ba52d120941f376d",
    ),
    bare=(
        "lightly_train",
        "lightly_train._export",
        "lightly_train._models",
        "lightly_train._models.dinov2_vit",
        "lightly_train._models.dinov2_vit.dinov2_vit_src",
    ),
)
# Norms and a rotation between projection and kernel: to be refused.
DEPTH_ANYTHING_3 = Upstream(
    "depth-anything-3",
    "depth_anything_3.model.dinov2",
    "depth_anything_3.model.dinov2.layers.attention",
    "depth_anything_3.model.dinov2.layers.block",
    None,
    Wheel(
        "depth-anything-3",
        "0.1.1",
        "d7de119f5d235bb06044d83e0e41ee63dee7f30126776b23d648e4dbcf106542",
    ),
    bare=("depth_anything_3", "depth_anything_3.model", "depth_anything_3.model.dinov2"),
)

WITH_MODELS = (FIRST, DEPTH_ANYTHING, MOGE, ROMA, LIGHTLY)
ALL = (*WITH_MODELS, ANOMALIB)
