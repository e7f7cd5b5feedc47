"""Packages that are not installed for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import dinov2_attn
from dinov2_attn.grafting import api


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
