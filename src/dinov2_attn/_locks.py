"""Locks and switches that outlive neither their thread, in a forked process, nor their block."""

from __future__ import annotations

import os
import threading
from functools import partial
from typing import Any


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
    def is_here(self) -> bool:
        """Whether the block was entered in this thread."""
        return self._thread == threading.get_ident()
