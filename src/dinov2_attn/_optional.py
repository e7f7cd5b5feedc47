"""Libraries that only some of this package needs, and what to do where they are missing."""

from __future__ import annotations

import importlib.util
from typing import Any

from dinov2_attn.errors import UnavailableError


def safetensors() -> Any:
    """Return the module ``safetensors``, its part for torch loaded; raise ``UnavailableError``."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise UnavailableError(
            "the library safetensors",
            str(error),
            "Install it with `pip install 'dinov2-attn[viz]'`.",
        ) from error
    return safetensors


def require(*modules: str) -> None:
    """Raise ``UnavailableError`` where one of these is missing."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise UnavailableError(
                "the libraries for pictures",
                f"no {name} in this environment",
                "Install them with `pip install 'dinov2-attn[viz]'`.",
            )
