"""Libraries that only some of this package needs, and what to do where they are missing."""

from __future__ import annotations

from typing import Any

from dinov2_attn.errors import Unavailable


def safetensors() -> Any:
    """Return the module ``safetensors``, its part for torch loaded; raise ``Unavailable``."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise Unavailable(
            "the library safetensors",
            str(error),
            "Install it with `pip install 'dinov2-attn[viz]'`.",
        ) from error
    return safetensors
