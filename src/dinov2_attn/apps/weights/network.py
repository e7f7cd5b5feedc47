"""Downloads that give up soon and leave the standard output to results."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator

TIMEOUT = 10.0


@contextlib.contextmanager
def brief() -> Iterator[None]:
    """Bound every wait for the network inside to ``TIMEOUT`` seconds; print to stderr.

    ``torch.hub`` takes no timeout and would wait for minutes where packets are dropped,
    hence Python's own default, which holds for the whole process meanwhile.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)
