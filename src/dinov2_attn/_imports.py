"""What is imported at its first use: names of a package, and optional libraries."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from dinov2_attn.errors import UnavailableError


def lazily(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of ``package``, for names with a module as home.

    Each name is imported once and then kept in the package. ``dir`` lists it before that.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = import_module(homes[name])
        value = found if found.__name__ == f"{package}.{name}" else getattr(found, name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names


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


def is_installed(module: str) -> bool:
    """Return whether ``module`` can be found. It is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # it was set to None
        return False


def require(*modules: str) -> None:
    """Raise ``UnavailableError`` if one of these modules is missing."""
    for name in modules:
        if not is_installed(name):
            raise UnavailableError(
                "the libraries for pictures",
                f"no {name} in this environment",
                "Install them with `pip install 'dinov2-attn[viz]'`.",
            )
