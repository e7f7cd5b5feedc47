"""Optional libraries, and the error that is raised if one is missing."""

from __future__ import annotations

import importlib.util
from typing import Any

from dinov2_attn.errors import UnavailableError


def safetensors() -> Any:
    """Return the module ``safetensors``, with its part for torch."""
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
    """Raise ``UnavailableError`` if one of these modules is missing."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise UnavailableError(
                "the libraries for pictures",
                f"no {name} in this environment",
                "Install them with `pip install 'dinov2-attn[viz]'`.",
            )
