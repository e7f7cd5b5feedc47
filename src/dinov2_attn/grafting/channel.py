"""How weights leave a forward pass: the state of a thread, listeners on blocks, and recorders.

A listener asks each block for its weights before it runs. A recorder takes queries and keys from
the pass itself. A hook that lives as long as one call sees what ``qkv`` returns, after adapters
and all other hooks. So nothing runs twice, and nothing stays on a module between calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dinov2_attn._compat import is_compiling, is_in_backward, is_transformed
from dinov2_attn.backbone.contract import name_of
from dinov2_attn.backbone.projection import draws_nothing
from dinov2_attn.errors import NotRecordedError
from dinov2_attn.typing import Forward

# Runs the first function, a block's forward, and gets the weights from the second.
Listener = Callable[[Forward, Forward, nn.Module, tuple[Any, ...], dict[str, Any]], Any]


class Recorder(Protocol):
    """What the grafts call during an ordinary pass of a thread that records."""

    def begin(self, model: nn.Module, images: Tensor | None) -> None:
        """Note that ``model`` has made tokens, of ``images`` if they are known."""

    def wants(self, attention: nn.Module) -> bool:
        """Return whether to call ``take`` when ``attention`` runs."""

    def take(self, attention: nn.Module, weigh: Callable[..., Any]) -> None:
        """Keep what ``weigh(queries=, heads=)`` returns: the weights that the pass will use."""


class _State(threading.local):
    """The receivers in this thread: usually none."""

    def __init__(self) -> None:
        # On the instance from the start, in every thread: Dynamo guards on their presence too.
        self.listener: Listener | None = None
        self.published: list[Any] | None = None
        self.recorders: tuple[Recorder, ...] = ()


STATE = _State()


class _Active:
    """Whether any thread has a receiver: what the grafts check first.

    Every Dynamo can guard a plain attribute. Those of torch before 2.4 take None and empty values
    on a ``threading.local`` for true, so a graph must not read that without need.
    """

    def __init__(self) -> None:
        self.on = False
        self._users = 0
        self._lock = threading.Lock()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Keep it on inside, for this thread and so for all."""
        if is_compiling():  # a graph must restore the state, and cannot take a lock
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
    """Record nothing that runs inside. Yields the recorders that are set aside."""
    before, STATE.recorders = STATE.recorders, ()
    try:
        yield before
    finally:
        STATE.recorders = before


def unpacked() -> AbstractContextManager[object]:
    """Hide the tensors saved for the backward of the weights from surrounding hooks.

    Activation checkpointing counts the tensors that a block saves. Its second run does not ask
    for weights.
    """
    # A graph has no such hooks inside, nor has what torch.func differentiates.
    if not torch.is_grad_enabled() or is_transformed():
        return nullcontext()
    # Detached: a softmax saves its own result, which would hold itself alive through its graph.
    return torch.autograd.graph.saved_tensors_hooks(torch.detach, lambda saved: saved)


class _Result:
    def __init__(self, weights: Any) -> None:
        self.weights = weights
        self.next: _Result | None = None


class _Results:
    """The weights of the blocks of a pass in the order in which they ran, and the running block.

    A linked list, because Dynamo guards a list by its length. A block that is compiled by itself
    would be compiled again for every other block.
    """

    def __init__(self) -> None:
        self._first = self._last = _Result(None)
        self.running: nn.Module | None = None

    def add(self, weights: Any) -> None:
        """Add ``weights`` at the end."""
        result = _Result(weights)
        self._last.next = result
        self._last = result

    def all(self) -> tuple[Any, ...]:
        """Return all weights that were added."""
        found, result = [], self._first.next
        while result is not None:
            found.append(result.weights)
            result = result.next
        return tuple(found)


@contextmanager
def attentions_of_pass(**selection: Any) -> Iterator[_Results]:
    """Collect the attention of every block that runs inside, in the order in which they run.

    The weights come from the same tokens as the features. So they belong together even if a pass
    draws random numbers.

    Args:
        selection: ``queries`` and ``heads``.

    """
    results = _Results()

    def listen(
        original: Forward,
        weights_of: Forward,
        block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        # A grafted class calls its grafted base for the same block: only the first counts.
        outer = results.running
        if outer is block:
            return original(block, *args, **kwargs)
        # What the projection draws (LoRA's dropout) is drawn again by the pass itself.
        # Dynamo cannot trace that, so no graph may see it without need.
        draws = block.training and not (is_compiling() and draws_nothing(block))
        with _same_draws(*args, *kwargs.values()) if draws else nullcontext(), unpacked():
            results.add(weights_of(block, *args, **kwargs, **selection))
        results.running = block
        try:
            return original(block, *args, **kwargs)
        finally:
            results.running = outer

    before, STATE.listener = STATE.listener, listen
    try:
        with ACTIVE.active():
            yield results
    finally:
        STATE.listener = before


def prepare_recorded(
    original: Forward, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a vision transformer's ``original`` on images, and tell recorders that a pass began."""
    with unrecorded() as recorders:  # an override calls the graft of its base
        tokens = original(model, *args, **kwargs)
    if is_compiling() or is_in_backward():  # the graft on the attention decides whether to raise
        return tokens
    images = args[0] if args else kwargs.get("x")
    for recorder in recorders:
        recorder.begin(model, images)
    return tokens


def run_recorded(
    original: Forward,
    module: Any,
    weights_of: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run ``original`` on an attention ``module``, and give its weights to the recorders.

    Nothing inside is recorded: the graft of the base class runs for the same module, and a
    recorder may run models itself.

    Raises:
        NotRecordedError: If ``qkv`` did not run once, or the pass becomes a graph.

    """
    wanting = [recorder for recorder in STATE.recorders if recorder.wants(module)]
    if wanting and is_transformed():
        raise in_a_graph()
    with unrecorded():
        if not wanting or is_in_backward():
            return original(module, *args, **kwargs)

        def take(projected: Tensor) -> None:
            weigh = partial(weights_of, module, args, kwargs, projected=projected)
            with unpacked():
                for recorder in wanting:
                    recorder.take(module, weigh)

        with _Listening(module.qkv, take) as listening:
            output = original(module, *args, **kwargs)
    if listening.calls != 1:
        raise NotRecordedError(
            f"{name_of(type(module))} to call its qkv once in a pass",
            f"{listening.calls} calls",
            "Where qkv itself was compiled, run it in eager mode to record.",
        )
    return output


def in_a_graph() -> NotRecordedError:
    """Return the error for a recording that a graph would not repeat."""
    return NotRecordedError(
        "a forward pass in eager mode inside record(...)",
        "one that torch.compile, torch.export or torch.func makes another function of, whose "
        "values end with it",
        "Run the eager module: compiled._orig_mod(images), or compiled(images) under "
        'torch.compiler.set_stance("force_eager"). Run exported and transformed models outside of '
        "record(...).",
    )


class _Listening:
    """Call ``take`` with what ``layer`` returns in this thread, as its last hook."""

    # Other threads may ask the same layer meanwhile, and must not see a difference.
    only_listens = True

    def __init__(self, layer: nn.Module, take: Callable[[Tensor], None]) -> None:
        self._layer, self._take, self._thread = layer, take, threading.get_ident()
        self._taking = False
        self.calls = 0

    def __enter__(self) -> _Listening:
        self._hook = self._layer.register_forward_hook(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def __call__(self, _: nn.Module, __: object, projected: Tensor) -> None:
        # Other threads run the same layer, and a recorder may run it too.
        if threading.get_ident() == self._thread and not self._taking:
            self.calls += 1
            self._taking = True
            self._take(projected)
            self._taking = False


def _same_draws(tokens: Any, *_: Any) -> AbstractContextManager[object]:
    device = tokens[0].device if isinstance(tokens, list) else tokens.device
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
