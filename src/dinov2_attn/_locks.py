"""Locks and switches that outlive neither their thread, in a forked process, nor their block."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


def fork_safe_lock() -> Any:
    """Return a reentrant lock, as ``threading.RLock()`` does.

    In a forked process it is free, unless the thread that forked holds it: other threads do not
    exist there, and would never release it.
    """
    made: Any = threading.RLock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=partial(_free, made))
    return made


def _free(lock: Any) -> None:
    if not lock._is_owned():
        lock._at_fork_reinit()  # as logging and threading do with theirs


class Life:
    """Exists while a block is entered. Only the block refers to it.

    So what belongs to a block, and refers to this weakly, is known to be left over where an
    interruption ended the lines that remove it.
    """

    def __init__(self) -> None:
        self._thread, self._process = threading.get_ident(), os.getpid()

    @property
    def is_forked(self) -> bool:
        """Whether the block was entered in a process of which this one is a fork."""
        return self._process != os.getpid()

    @property
    def thread(self) -> int:
        """The thread in which the block was entered."""
        return self._thread

    @property
    def is_here(self) -> bool:
        """Whether the block was entered in this thread."""
        return self._thread == threading.get_ident()


class cached_property(Generic[T]):
    """``functools.cached_property`` without its lock, which Python has before 3.12.

    All objects of a class share that lock. In a forked process it may stay locked for ever.
    """

    def __init__(self, function: Callable[[Any], T]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        found: T = self._function(instance)
        vars(instance)[self._name] = found  # which is found first from now on
        return found
