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
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, TypeVar

from dinov2_attn.errors import InvalidInputError

# Of Linux: the signal that a process gets when its parent ends.
PR_SET_PDEATHSIG = 1
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
    if sys.platform == "linux":
        # It comes when the thread ends that started this process, which runs the extraction.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have ended before the request for a signal.
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=_watch, args=(parent,), daemon=True, name="end_with").start()


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


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PERIOD)
    os._exit(1)
