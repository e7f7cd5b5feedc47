"""Processes that do not outlive the one that started them, however that one ended.

A worker of a ``DataLoader`` notices the end of its parent only while it waits for work, and only
if the parent was alive when it began. One that writes into a full pipe, or that was importing
torch at that moment, would stay for ever. This module imports no torch, so that it runs first.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, TypeVar

from dinov2_attn.errors import InvalidInputError

# Of Linux: sets or gets the signal that a process receives when its parent ends.
PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
# Seconds between two looks for the parent, where no signal comes.
PERIOD = 0.5
# torchrun's own store is there before it starts processes. So few and short tries are enough.
TRIES, PAUSE = 5, 0.5

P = TypeVar("P", bound="EndingProcess")


class EndingProcess(SpawnProcess):
    """A spawned process that ends with its parent."""

    def __reduce__(self) -> tuple[Any, ...]:
        # In the new process this function runs before the state is read, which imports torch.
        return _begun, (type(self), os.getpid()), self.__dict__


class EndingContext(SpawnContext):
    """The start method ``spawn``, for processes that end with their parent."""

    Process = EndingProcess


def ending_context() -> EndingContext:
    """Return the context for a ``DataLoader``.

    The tracker, which removes names in shared memory at the end, is started before the first name
    is made.
    """
    if os.name == "posix":
        from multiprocessing.resource_tracker import ensure_running

        ensure_running()
    return EndingContext()


def end_with(parent: int) -> None:
    """End this process when its parent, the process ``parent``, ends or has ended.

    On Windows this does nothing: there a ``DataLoader`` keeps a handle of its parent.
    """
    if os.name != "posix":
        return
    # It comes when the thread ends that started this process, which runs the extraction.
    _set_signal(signal.SIGKILL)
    # The parent may have ended before the request for a signal.
    if os.getppid() != parent:
        os._exit(1)
    _watch(parent, threading.Event())


@contextmanager
def ending_with_torchrun() -> Iterator[None]:
    """End this process, while it is inside, when torchrun ends, which started it.

    Without torchrun this does nothing. Afterwards all is as before: the process may be a script
    that goes on.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.name != "posix":
        yield
        return
    done, before = threading.Event(), _set_signal(signal.SIGKILL)
    _watch(os.getppid(), done)
    try:
        yield
    finally:
        done.set()
        _set_signal(before)


def check_torchrun() -> None:
    """Raise unless torchrun is still there, where it keeps the store by which processes meet.

    It may have been killed while this process was starting, which would then wait for others
    for as long as anybody looked.

    Raises:
        InvalidInputError: If its store does not answer.

    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return
    host, port = os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT", "0")
    for _ in range(TRIES):
        try:
            socket.create_connection((host, int(port)), timeout=PAUSE).close()
        except (OSError, ValueError, OverflowError):
            time.sleep(PAUSE)
        else:
            return
    raise InvalidInputError(
        "torchrun's store to answer, by which its processes meet",
        f"none at {host}:{port}, so torchrun has ended",
        "Start torchrun again. The run continues where it stopped.",
    )


def _begun(cls: type[P], parent: int) -> P:
    end_with(parent)
    return cls.__new__(cls)


def _set_signal(number: int) -> int:
    """Let Linux send a signal when the parent ends, 0 for none; return the one before."""
    if sys.platform != "linux":
        return 0
    libc, before = ctypes.CDLL(None), ctypes.c_int()
    libc.prctl(PR_GET_PDEATHSIG, ctypes.byref(before))
    libc.prctl(PR_SET_PDEATHSIG, number)
    return before.value


def _watch(parent: int, done: threading.Event) -> None:
    """Look for the parent in a thread, until ``done`` is set."""

    def look() -> None:
        while not done.wait(PERIOD):
            if os.getppid() != parent:
                os._exit(1)

    threading.Thread(target=look, daemon=True, name="end_with").start()
