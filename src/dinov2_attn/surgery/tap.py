"""Listening to the blocks of one forward pass, in one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

Ask = Callable[..., Any]
Listener = Callable[[nn.Module, Ask, tuple[Any, ...], dict[str, Any]], None]


class _Tap(threading.local):
    """What the grafted blocks of this thread report to: nobody, as a rule."""

    def __init__(self) -> None:
        # On the instance from the start, in every thread: Dynamo guards on its presence too.
        self.listener: Listener | None = None


TAP = _Tap()


@contextmanager
def attentions_of_pass(**selection: Any) -> Iterator[list[Any]]:
    """Collect the attention of every block that runs inside, in the order in which they run.

    The weights come from the very tokens that a block is given, so features and weights
    belong together even where a pass draws random numbers. ``selection`` holds
    ``queries`` and ``heads``.
    """
    seen: set[int] = set()
    caught: list[Any] = []

    def listen(block: nn.Module, ask: Ask, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A grafted class calls its grafted base for the same block: listen to the first.
        if id(block) not in seen:
            seen.add(id(block))
            caught.append(ask(block, *args, **kwargs, **selection))

    before, TAP.listener = TAP.listener, listen
    try:
        yield caught
    finally:
        TAP.listener = before
