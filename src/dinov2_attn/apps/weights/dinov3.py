"""DINOv3's models by the names of its hub, from code that the user has.

Code and weights are under Meta's DINOv3 License, which a user accepts on Meta's pages. So nothing
of it is downloaded here.
"""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dinov2_attn.apps.weights import checkout
from dinov2_attn.errors import UnavailableError, in_one_line
from dinov2_attn.history.projects import DINOV3

# --help needs the names below without the seconds that importing torch takes.
if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

# By the name of its function in DINOv3's hub, the name in papers.
PUBLISHED = {
    "dinov3_vits16": "ViT-S/16",
    "dinov3_vits16plus": "ViT-S+/16",
    "dinov3_vitb16": "ViT-B/16",
    "dinov3_vitl16": "ViT-L/16",
    "dinov3_vitl16plus": "ViT-L+/16",
    "dinov3_vith16plus": "ViT-H+/16",
    "dinov3_vit7b16": "ViT-7B/16",
}
ARCHS = tuple(PUBLISHED)

_HUB = f"{DINOV3.package}.hub.backbones"


def obtain(repo: str | Path | None = None) -> Path:
    """Make DINOv3's code importable in this process, and return its folder.

    Args:
        repo: A checkout. Without it the ``dinov3`` of this environment is used.

    Raises:
        UnreadableFileError: If ``repo`` is not a checkout.
        UnavailableError: If there is no such code, another ``dinov3`` is already imported, or the
            import fails.

    """
    if repo is not None:
        folder = checkout.check(repo, dinov3=True)
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    try:
        hub = importlib.import_module(_HUB)
    except Exception as error:  # foreign code runs here and can raise anything
        raise UnavailableError(
            "DINOv3's code, which is not downloaded here because of its licence",
            f"{type(error).__name__}: {in_one_line(error)}",
            f"Clone {DINOV3.address} and name the folder: --repo PATH.",
        ) from error
    found = Path(str(hub.__file__)).parents[2]
    if repo is not None and found.resolve() != folder:
        raise UnavailableError(
            f"dinov3 of {folder}",
            f"this process has imported {found} already",
            "Choose the source before dinov3 is imported, in a new process.",
        )
    log.warning("the code of dinov3 is under %s: see LICENSE.md in %s", DINOV3.licence, found)
    return found


def build(arch: str) -> nn.Module:
    """Build one of ``ARCHS`` with random weights, in eval mode."""
    model: nn.Module = getattr(importlib.import_module(_HUB), arch)(pretrained=False)
    return model.eval()
