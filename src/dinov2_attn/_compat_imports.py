"""The private names of CPython's import system. Apart from ``_compat``, which imports torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

_bootstrap: Any = importlib._bootstrap


def wait_for_imports(wanted: Callable[[str], bool]) -> None:
    """Wait for the wanted modules that other threads are importing.

    A module whose import has just begun is not in ``sys.modules`` yet. Only its lock shows it, in
    CPython 3.10 to 3.14. Another Python without these locks waits for nothing.
    """
    for name in filter(wanted, getattr(_bootstrap, "_module_locks", {}).copy()):
        _bootstrap._lock_unlock_module(name)


def is_initializing(module: ModuleType) -> bool:
    """Return whether the import of ``module`` has not ended."""
    # Every CPython: its import system asks the same. Odd entries of sys.modules have no spec.
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))
