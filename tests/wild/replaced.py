"""Functions replaced wherever they are held, and put back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced(real: Any, new: Any, model: nn.Module) -> Iterator[None]:
    """Put ``new`` in each module, dictionary, class and object that holds ``real``."""
    with ExitStack() as undo:
        for holder in _holders(model):
            for key in [key for key, value in holder.items() if value is real]:
                undo.callback(holder.__setitem__, key, real)
                holder[key] = new
        for cls in {cls for module in model.modules() for cls in type(module).__mro__}:
            for key, value in list(vars(cls).items()):
                if getattr(value, "__func__", value) is real:
                    undo.callback(setattr, cls, key, value)
                    setattr(cls, key, staticmethod(new))
        yield


@contextmanager
def replaced_by_name(name: str, owner: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Put ``wrap(function)`` for each function ``name`` in modules outside package ``owner``."""
    with ExitStack() as undo:
        for names in _modules():
            outside = str(names["__name__"]).partition(".")[0] != owner
            if outside and callable(names.get(name)):
                undo.callback(names.__setitem__, name, names[name])
                names[name] = wrap(names[name])
        yield


def _holders(model: nn.Module) -> Iterator[dict[Any, Any]]:
    for names in _modules():
        yield names
        yield from (value for value in list(names.values()) if type(value) is dict)
    yield from (vars(module) for module in model.modules())


def _modules() -> Iterator[dict[str, Any]]:
    """Yield the names of each module, but not of those that define what is replaced.

    A ``TorchFunctionMode`` is handed what torch._C names: the real function stays there.
    """
    for module in list(sys.modules.values()):
        names: dict[str, Any] = getattr(module, "__dict__", None) or {}
        name = str(names.get("__name__", "torch._C"))
        if not name.startswith(("torch._C", "tests.wild")):
            yield names
