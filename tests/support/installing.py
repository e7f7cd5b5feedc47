"""Packages that are not installed for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import dinov2_attn
from dinov2_attn.grafting import api
from dinov2_attn.grafting.registry import REGISTRY


def installed() -> set[str]:
    """Return the packages and live models that are installed now."""
    models = {str(target) for graft in REGISTRY for target in graft.targets}
    return {*api._PACKAGES, *(name for name in models if name.startswith("model with"))}


@contextmanager
def uninstalled() -> Iterator[None]:
    """Uninstall every package inside; afterwards those are installed that were before."""
    before = list(api._PACKAGES)
    dinov2_attn.uninstall()
    try:
        yield
    finally:
        dinov2_attn.uninstall()
        for package in before:
            dinov2_attn.install(package)
