"""How weights get out of a model, in one thread: past wrappers and hooks, or along with a pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dinov2_attn._compat import is_compiling, is_transformed
from dinov2_attn.backbone.projection import draws_nothing
from dinov2_attn.typing import Forward

# Runs the first function, a block's forward, and asks the second for the weights.
Listener = Callable[[Forward, Forward, nn.Module, tuple[Any, ...], dict[str, Any]], Any]


class Recorder(Protocol):
    """Who is told of the ordinary passes of a thread, by the grafts in ``recording``."""

    def begin(self, model: nn.Module, images: Tensor | None) -> None:
        """Note that ``model`` has made tokens, of ``images`` where that is known."""

    def wants(self, attention: nn.Module) -> bool:
        """Say whether ``take`` is to be called when ``attention`` runs."""

    def take(self, attention: nn.Module, weigh: Callable[..., Any]) -> None:
        """Keep what ``weigh(queries=, heads=)`` gives: the weights that are about to be used."""


class _State(threading.local):
    """What the grafts of this thread report to: nobody, as a rule."""

    def __init__(self) -> None:
        # On the instance from the start, in every thread: Dynamo guards on their presence too.
        self.listener: Listener | None = None
        self.published: list[Any] | None = None
        self.recorders: tuple[Recorder, ...] = ()


STATE = _State()


class _Active:
    """Whether any thread reports to anybody: what grafts look at first.

    A plain attribute is guarded by every Dynamo. Those of torch before 2.4 take what is None or
    empty on a ``threading.local`` for true, so that no graph may see it without need.
    """

    def __init__(self) -> None:
        self.on = False
        self._users = 0
        self._lock = threading.Lock()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Keep it on inside, for this thread and so for all."""
        if is_compiling():  # a graph ends as it began, and takes no lock
            before, self.on = self.on, True
            try:
                yield
            finally:
                self.on = before
            return
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, users: int) -> None:
        with self._lock:
            self._users += users
            self.on = self._users > 0


ACTIVE = _Active()


@contextmanager
def unrecorded() -> Iterator[tuple[Recorder, ...]]:
    """Let nothing that runs inside be recorded; yields who would have been told."""
    before, STATE.recorders = STATE.recorders, ()
    try:
        yield before
    finally:
        STATE.recorders = before


class _Results:
    """What the blocks of a pass answered, in the order in which they ran, and which is running.

    Dynamo guards a list by its length and what is asked for its ``id`` by that: a block that is
    compiled by itself would be compiled anew for every other. So one answer points to the next.
    """

    def __init__(self) -> None:
        self._start = self._end = _Result(None)
        self.running: nn.Module | None = None

    def add(self, weights: Any) -> None:
        """Put ``weights`` behind those that are there."""
        link = _Result(weights)
        self._end.behind = link
        self._end = link

    def all(self) -> tuple[Any, ...]:
        """Return all weights that were added."""
        found, link = [], self._start.behind
        while link is not None:
            found.append(link.weights)
            link = link.behind
        return tuple(found)


class _Result:
    def __init__(self, weights: Any) -> None:
        self.weights = weights
        self.behind: _Result | None = None


@contextmanager
def attentions_of_pass(**selection: Any) -> Iterator[_Results]:
    """Collect the attention of every block that runs inside, in the order in which they run.

    The weights come from the very tokens that a block is given, so features and weights
    belong together even where a pass draws random numbers. ``selection`` holds
    ``queries`` and ``heads``.
    """
    collected = _Results()

    def listen(
        original: Forward,
        weights_of: Forward,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        # A grafted class calls its grafted base for the same block: listen to the first.
        outer = collected.running
        if outer is block:
            return original(block, *args, **kwargs)
        # What the projection draws (LoRA's dropout) is then drawn again by the pass itself.
        # Dynamo cannot follow that, so no graph may see it without need.
        draws = block.training and not (is_compiling() and draws_nothing(block))
        with _same_draws(*args, *kwargs.values()) if draws else nullcontext(), unpacked():
            collected.add(weights_of(block, *args, **kwargs, **selection))
        collected.running = block
        try:
            return original(block, *args, **kwargs)
        finally:
            collected.running = outer

    before, STATE.listener = STATE.listener, listen
    try:
        with ACTIVE.active():
            yield collected
    finally:
        STATE.listener = before


def _same_draws(tokens: Any, *_: Any) -> AbstractContextManager[object]:
    device = tokens[0].device if isinstance(tokens, list) else tokens.device
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def unpacked() -> AbstractContextManager[object]:
    """Keep what autograd saves for the weights from whoever packs tensors around a pass.

    Checkpointing counts the tensors that a block saves, and its second run asks for nothing.
    """
    # A graph and what torch.func differentiates have no such packing inside.
    if not torch.is_grad_enabled() or is_transformed():
        return nullcontext()
    # Detached: a softmax saves its own result, which would hold itself alive through its graph.
    return torch.autograd.graph.saved_tensors_hooks(torch.detach, lambda saved: saved)
