"""Where the page gets its outliers from: one place, as they are found elsewhere."""

from __future__ import annotations

import importlib
import importlib.util

from torch import Tensor

from dinov2_attn.show.page.frame import Outliers

_ELSEWHERE = "dinov2_attn.maps.artifacts"


def outliers_of(model: object, images: Tensor) -> Outliers | None:
    """Return the artifact tokens of ``images``; ``None`` where there is nothing to find them."""
    if importlib.util.find_spec(_ELSEWHERE) is None:
        return None
    found: Outliers = importlib.import_module(_ELSEWHERE).artifact_tokens(model, images)
    return found
