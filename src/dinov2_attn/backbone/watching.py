"""Watching what a module is given and returns, in one thread, without a hook on the module.

A hook is part of a module: copies and pickles that other threads make meanwhile would keep it. So
the class gets a ``__call__`` that looks for watchers of its thread.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakSet, ref

from torch import nn

from dinov2_attn._compat import grad_mode_kept, is_compiling
from dinov2_attn._locks import Life, fork_safe_lock

Before = Callable[[tuple[Any, ...], dict[str, Any]], None]
After = Callable[[Any], Any]


class _Watch(NamedTuple):
    module: nn.Module
    before: Before | None
    after: After | None
    life: ref[Life]


class _Set(NamedTuple):
    """A method of ours on a class, and what the class itself had there."""

    old: Any
    new: Callable[..., Any]


class _Thread(threading.local):
    def __init__(self) -> None:
        self.watches: tuple[_Watch, ...] = ()


_HERE = _Thread()
_LOCK = fork_safe_lock()
# The watchers that need the ``__call__`` of a class, and which one that is.
_NEEDED: dict[type, WeakSet[Life]] = {}
_SET: dict[type, _Set] = {}


@contextmanager
def watching(
    module: nn.Module, *, before: Before | None = None, after: After | None = None
) -> Iterator[None]:
    """Call ``before`` and ``after`` whenever ``module`` is called in this thread inside.

    Args:
        module: The module. Nothing is set on it.
        before: Called with the arguments, positional ones and by name, before any hook.
        after: Called with what the module returned, after all hooks. What it returns takes the
            place of that, unless it is None.

    """
    cls, life = type(module), Life()
    watch = _Watch(module, before, after, ref(life))
    try:
        with _LOCK:
            _NEEDED.setdefault(cls, WeakSet()).add(life)
            _tidy()
        with grad_mode_kept():
            _HERE.watches = (*(one for one in _HERE.watches if one.life() is not None), watch)
            yield
    finally:
        _HERE.watches = tuple(one for one in _HERE.watches if one is not watch)
        with _LOCK:
            _NEEDED.get(cls, WeakSet()).discard(life)
            _tidy()


def _tidy() -> None:
    """Give the classes that need it a ``__call__`` of ours, and take it from all others."""
    for cls, lives in list(_NEEDED.items()):
        if not lives:
            _restore(cls, _SET.get(cls))
            _SET.pop(cls, None)
            del _NEEDED[cls]
            continue
        if cls not in _SET:
            _SET[cls] = _Set(vars(cls).get("__call__"), _watched(cls, cls.__call__))
        if vars(cls).get("__call__") is _SET[cls].old:  # not set yet
            setattr(cls, "__call__", _SET[cls].new)  # noqa: B010


def _restore(cls: type, found: _Set | None) -> None:
    """Remove our method, unless another one is on top: then it goes on without watchers."""
    if found is None or vars(cls).get("__call__") is not found.new:
        return
    if found.old is None:
        delattr(cls, "__call__")
    else:
        setattr(cls, "__call__", found.old)  # noqa: B010


def _of(module: nn.Module) -> list[_Watch]:
    return [w for w in _HERE.watches if w.module is module and w.life() is not None]


def _watched(cls: type, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original, updated=())
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A subclass that is watched too comes by here on its way.
        watches = () if is_compiling() or type(self) is not cls else _of(self)
        for watch in watches:
            if watch.before is not None:
                watch.before(args, kwargs)
        output = original(self, *args, **kwargs)
        for watch in watches:
            found = None if watch.after is None else watch.after(output)
            output = output if found is None else found
        return output

    return __call__


def _forget_other_threads() -> None:
    """In a forked child: the threads whose watchers these are do not run there."""
    here = {id(watch.life()) for watch in _HERE.watches}
    for lives in _NEEDED.values():
        for life in [one for one in lives if id(one) not in here]:
            lives.discard(life)
    _tidy()


if hasattr(os, "register_at_fork"):  # behind that of _LOCK, which is free by then
    os.register_at_fork(after_in_child=_forget_other_threads)
