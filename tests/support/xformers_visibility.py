"""Real xFormers, hidden from upstream or shown to it, where this machine has it."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

# The fallback says so once for each copy of upstream, in whichever test comes first.
quiet = pytest.mark.filterwarnings("ignore::dinov2_attn.errors.KernelFallbackWarning")

# Importing it a second time would define its operators a second time.
_REAL: dict[str, ModuleType] = {}


def hide() -> None:
    """Let ``import xformers`` fail from here on."""
    _REAL.update({name: m for name, m in sys.modules.items() if _is_xformers(name) and m})
    for name in _REAL:
        sys.modules.pop(name, None)
    sys.modules["xformers"] = None  # type: ignore[assignment]  # Python's own sign


@contextmanager
def visible() -> Iterator[None]:
    """Let the real xFormers be imported inside; skip the test where there is none."""
    if sys.modules.get("xformers") is not None:  # inside of another such block
        yield
        return
    del sys.modules["xformers"]
    sys.modules.update(_REAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                importlib.import_module("xformers.ops")
            except ImportError:
                pytest.skip("xFormers is not installed: test_agreement answers lists one by one")
        yield
    finally:
        hide()


def _is_xformers(module: str) -> bool:
    return module.partition(".")[0] == "xformers"


devices = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(),
            reason="no CUDA device: the same test runs on the CPU, over the fallback",
        ),
    ),
]
