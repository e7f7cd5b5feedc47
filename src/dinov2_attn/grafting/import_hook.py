"""Call a function after certain modules are executed, at every import and reload.

This is a finder, because post-import hooks fire once per process. After a failure they let the
second import succeed without a patch.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class Finder(MetaPathFinder):
    """Leave finding and loading to the other finders, and run ``callback`` afterwards.

    ``wanted(name)`` picks the modules. An exception from ``callback(module)`` makes the
    import fail, so that the next import tries again.
    """

    def __init__(
        self, wanted: Callable[[str], bool], callback: Callable[[ModuleType], None]
    ) -> None:
        self._wanted = wanted
        self._callback = callback
        self._thread = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the other finders' spec with a loader that calls back, or ``None``."""
        # Another finder that delegates as we do would call us back without end.
        if not self._wanted(fullname) or getattr(self._thread, "asking", False):
            return None
        self._thread.asking = True
        try:
            spec = self._ask_others(fullname, path, target)
        finally:
            self._thread.asking = False
        # A namespace package has no code to run, an old-style loader no such method.
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _NotifyingLoader(spec.loader, self._callback)
        return spec

    def _ask_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            if finder is not self and find_spec is not None:
                spec: ModuleSpec | None = find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None


class _NotifyingLoader(Loader):
    def __init__(self, loader: Loader, callback: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._callback = callback

    def __getattr__(self, name: str) -> object:
        # For callers that do not load: importlib.util.find_spec, pkgutil, runpy.
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module is as without us: inspect, pickle and importlib.resources all
        # use its loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._callback(module)
